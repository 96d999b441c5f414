"""hippo_mpi.cluster sync: give each host the bytes of its own layers."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hippo_mpi.cluster.hostfile import Host, Hostfile
from hippo_mpi.cluster.sync.needs import Needs, ask_needs, introduce
from hippo_mpi.cluster.sync.report import SyncProgress, lines_of, object_of
from hippo_mpi.cluster.sync.session import HostState, SyncSession, state_of
from hippo_mpi.cluster.verbs.host_options import HostOptions, hosts_meant
from hippo_mpi.config.bundled import BUNDLED_NAMES
from hippo_mpi.config.options import DraftOptions, ModelOptions, RankOptions
from hippo_mpi.config.parser import option, with_default
from hippo_mpi.errors import print_error, printable
from hippo_mpi.transport.ports import THIS_MACHINE
from hippo_mpi.units import count_of

_MODEL = "model"


@dataclass(frozen=True, kw_only=True)
class Options(HostOptions):
    """All options of the verb."""

    model: str = option("", "folder or Hugging Face repo of an mlx-lm model, as for the run", "model")
    layer_split: tuple[int, ...] | None = with_default(RankOptions, "layer_split", None)
    max_context: int | None = with_default(RankOptions, "max_context", None)
    revision: str | None = with_default(ModelOptions, "revision", None)
    precision: str | None = with_default(ModelOptions, "precision", None)
    trust_remote_code: bool = with_default(ModelOptions, "trust_remote_code", False)
    adapter_path: str | None = with_default(ModelOptions, "adapter_path", None)
    draft_model: str | None = with_default(DraftOptions, "draft_model", None)
    whole: bool = option(False, "give every host all of the model, so that others can go on without it")
    verify: bool = option(False, "look first whether what hosts have is still as it arrived; fetch again what isn't")
    json: bool = option(False, "print a JSON object")


def run(options: Options) -> int:
    """Fill all hosts, and print what came of it; return the exit status.

    Raises:
        HippoError: there is no such model, or its layers can't be shared out.
    """
    hostfile = hosts_meant(options)
    envs = dict(one.split("=", 1) for one in hostfile.envs)
    environment = {**os.environ, **envs}
    asked = []
    for what, some, question in _questions(options, hostfile):  # of all, before anything is moved
        if not options.json:
            count = count_of(len(ranks_by_host(some)), "host")
            sys.stderr.write(f"looking at {printable(question['model'])}, and at what {count} should have of it\n")
        if not question["whole"] and question["layer_split"] is None:
            introduced = introduce([host for host, _ in ranks_by_host(some)], options.timeout, environment)
            by_name = {one["host"]: one for one in introduced}
            question["ranks"] = [by_name[host.ssh] for host in some.hosts]
        asked.append((what, some, ask_needs(question, environment)))
    codes, found = [], {}
    for what, some, needs in asked:
        session = _fill(options, some, needs, envs, environment)
        found[what] = object_of(session, needs)
        codes += [state.code for state in session.hosts]
        if not options.json:
            if len(asked) > 1:
                print(f"{printable(needs.files.model)}:")
            print("\n".join(lines_of(session, needs)), flush=True)
        for state in session.hosts:
            if state.error:
                print_error(f"{state.host.ssh}: {state.error}; the same command goes on from what is there")
    if options.json:
        print(json.dumps({**found.pop(_MODEL), **found}, indent=1))
    return max(codes)


def _questions(options: Options, hostfile: Hostfile) -> Iterator[tuple[str, Hostfile, dict[str, Any]]]:
    """Return what is to be synced, to which hosts, and what to ask about it: the model, its adapter, its draft."""
    ranks = [{"host": host.ssh} for host in hostfile.hosts]
    model = {
        "model": options.model, "revision": options.revision, "precision": options.precision,
        "trust_remote_code": options.trust_remote_code, "whole": options.whole, "max_context": options.max_context,
        "layer_split": list(options.layer_split) if options.layer_split else None, "ranks": ranks,
    }  # fmt: skip
    whole = {**model, "revision": None, "whole": True}
    yield _MODEL, hostfile, model
    if options.adapter_path:
        yield "adapter", hostfile, {**whole, "model": options.adapter_path, "is_adapter": True}
    draft = options.draft_model
    if draft and (draft not in BUNDLED_NAMES or os.path.exists(draft)):  # all hosts have the bundled ones
        yield "draft", hostfile.only([0]), {**whole, "model": draft, "ranks": ranks[:1]}


def _fill(
    options: Options, hostfile: Hostfile, needs: Needs, envs: dict[str, str], environment: dict[str, str]
) -> SyncSession:
    hosts = [state_of(host, some, needs) for host, some in ranks_by_host(hostfile)]
    with_this = [state for state in hosts if state.host.ssh != THIS_MACHINE]
    with_this += [state for state in hosts if state.host.ssh == THIS_MACHINE] or [HostState(Host(THIS_MACHINE), [], {})]
    session = SyncSession(with_this, needs, os.getcwd(), envs, environment, options.timeout)
    try:
        session.open()
        if options.verify:
            session.verify()
        session.prepare()
        with SyncProgress(with_this, not options.json) as progress:
            session.fill(progress.arrive, progress.tell)
            session.compare(options.verify)
    finally:
        session.close()
    return session


def ranks_by_host(hostfile: Hostfile) -> list[tuple[Host, list[int]]]:
    """Return the ranks of each host, which may be named more than once."""
    names: dict[str, tuple[Host, list[int]]] = {}
    for rank, host in enumerate(hostfile.hosts):
        names.setdefault(host.ssh, (host, []))[1].append(rank)
    return [*names.values()]
