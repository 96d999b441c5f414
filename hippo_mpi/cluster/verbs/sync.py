"""hippo_mpi.cluster sync: give each host the bytes of its own layers."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

from hippo_mpi.cluster.hostfile import Host, Hostfile
from hippo_mpi.cluster.sync.needs import Needs, ask_needs, introduce
from hippo_mpi.cluster.sync.report import SyncProgress, lines_of, to_json
from hippo_mpi.cluster.sync.session import HostState, SyncSession, state_of
from hippo_mpi.cluster.verbs.host_options import HostOptions, hosts_meant
from hippo_mpi.config.options import ModelOptions, RankOptions
from hippo_mpi.config.parser import option, with_default
from hippo_mpi.errors import print_error, printable
from hippo_mpi.transport.ports import THIS_MACHINE
from hippo_mpi.units import count_of


@dataclass(frozen=True, kw_only=True)
class Options(HostOptions):
    """All options of the verb."""

    model: str = option("", "folder or Hugging Face repo of an mlx-lm model, as for the run", "model")
    layer_split: tuple[int, ...] | None = with_default(RankOptions, "layer_split", None)
    max_context: int | None = with_default(RankOptions, "max_context", None)
    revision: str | None = with_default(ModelOptions, "revision", None)
    precision: str | None = with_default(ModelOptions, "precision", None)
    trust_remote_code: bool = with_default(ModelOptions, "trust_remote_code", False)
    whole: bool = option(False, "give every host all of the model, so that others can go on without it")
    verify: bool = option(False, "look first whether what hosts have is still as it arrived; fetch again what isn't")
    json: bool = option(False, "print a JSON object")


def run(options: Options) -> int:
    """Fill all hosts, and print what came of it; return the exit status.

    Raises:
        HippoError: there is no such model, or its layers can't be shared out.
    """
    hostfile = hosts_meant(options)
    ranks = ranks_by_host(hostfile)
    envs = dict(one.split("=", 1) for one in hostfile.envs)
    environment = {**os.environ, **envs}
    if not options.json:
        sys.stderr.write(
            f"looking at {printable(options.model)}, and at what {count_of(len(ranks), 'host')} should have of it\n"
        )
    needs = _needs(options, hostfile, environment)
    hosts = [state_of(host, some, needs) for host, some in ranks]
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
    finally:
        session.close()
    print(to_json(session, needs) if options.json else "\n".join(lines_of(session, needs)))
    for state in session.hosts:
        if state.error:
            print_error(f"{state.host.ssh}: {state.error}; the same command goes on from what is there")
    return max(state.code for state in session.hosts)


def ranks_by_host(hostfile: Hostfile) -> list[tuple[Host, list[int]]]:
    """Return the ranks of each host, which may be named more than once."""
    names: dict[str, tuple[Host, list[int]]] = {}
    for rank, host in enumerate(hostfile.hosts):
        names.setdefault(host.ssh, (host, []))[1].append(rank)
    return [*names.values()]


def _needs(options: Options, hostfile: Hostfile, environment: dict[str, str]) -> Needs:
    """Ask what each rank needs; how fast hosts are, and how much they hold, only if that isn't given."""
    unique = [host for host, _ in ranks_by_host(hostfile)]
    by_name = {}
    if not options.whole and options.layer_split is None:
        by_name = {one["host"]: one for one in introduce(unique, options.timeout, environment)}
    question = {
        "model": options.model, "revision": options.revision, "precision": options.precision,
        "trust_remote_code": options.trust_remote_code, "whole": options.whole, "max_context": options.max_context,
        "layer_split": list(options.layer_split) if options.layer_split else None,
        "ranks": [by_name.get(host.ssh) or {"host": host.ssh} for host in hostfile.hosts],
    }  # fmt: skip
    return ask_needs(question, environment)
