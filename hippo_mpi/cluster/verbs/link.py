"""hippo_mpi.cluster link: measure the links between hosts, and say what is wrong with them."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from hippo_mpi.cluster.asking.facts import Probed
from hippo_mpi.cluster.asking.remote import ask
from hippo_mpi.cluster.doctor import doctor
from hippo_mpi.cluster.doctor.checks import diagnose
from hippo_mpi.cluster.doctor.findings import Finding
from hippo_mpi.cluster.link import link, link_report
from hippo_mpi.cluster.link.link_checks import findings_of
from hippo_mpi.cluster.link.link_cost import cost_of
from hippo_mpi.cluster.verbs.host_options import HostOptions, hosts_meant
from hippo_mpi.config import checks
from hippo_mpi.config.parser import option
from hippo_mpi.errors import RankError, UserError

_NOT_REACHED = ("ssh-refused", "ssh-host-key", "no-answer", "python-missing", "address-missing")


@dataclass(frozen=True, kw_only=True)
class Options(HostOptions):
    """All options of the verb."""

    all: bool = option(False, "every pair of hosts, not only neighbors in the ring")
    seconds: float = option(1.5, "how long each rate is measured", check=checks.above_0)
    model: str | None = option(None, "say what the links cost when this model runs over them, as predicted")
    json: bool = option(False, "print a JSON object; times in seconds, rates in bytes per second")


def run(options: Options) -> int:
    """Print what was found about links; return the exit status.

    Raises:
        UserError: there is one host only, or no prediction.
    """
    hostfile = hosts_meant(options)
    if len(hostfile.hosts) < 2:
        raise UserError("links are between hosts: name another, or give a --hostfile with two or more")
    hosts = ask(hostfile, (), options.timeout)
    links = asyncio.run(link.measure(hosts, options.all, options.seconds, options.timeout, _show_progress))
    _show_progress("")
    findings = [*_unreached(hosts, links), *findings_of(links, hosts)]
    cost = cost_of(options.model, links, hosts) if options.model else None
    if options.json:
        print(link_report.to_json(links, hosts, findings, cost))
    else:
        print("\n".join(link_report.lines_of(links, hosts, findings, cost)))
    return RankError.exit_code if links.lost else doctor.exit_code(hosts, findings)


def _unreached(hosts: Sequence[Probed], links: link.Links) -> list[Finding]:
    """Return why hosts are left out."""
    lost = [
        Finding("ssh-refused", hosts[rank].host.ssh, why, "see hippo_mpi.cluster doctor, with the same hosts")
        for rank, why in links.lost.items()
    ]
    return [*diagnose(hosts, _NOT_REACHED), *lost]


def _show_progress(what: str) -> None:
    if os.isatty(2):
        sys.stderr.write(f"\r\x1b[K{what}")
        sys.stderr.flush()
