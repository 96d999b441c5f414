"""Options of all verbs that ask hosts, and the yes that those need which change something."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hippo_mpi.cluster.hostfile import Hostfile, hostfile_of, read_hostfile
from hippo_mpi.config import checks
from hippo_mpi.config.parser import option
from hippo_mpi.errors import UserError
from hippo_mpi.transport.ports import THIS_MACHINE

HOSTFILE = Path("hosts.json")
"""What setup writes if no other name is given."""


@dataclass(frozen=True, kw_only=True)
class HostOptions:
    """Which hosts are meant, and how long they may take."""

    hosts: Sequence[str] = option(
        (), "hosts beside this one, as ssh knows them, instead of a hostfile", "hosts", nargs="*"
    )
    hostfile: Path | None = option(None, "JSON list of hosts, as for mlx.launch", check=Path, metavar="FILE")
    timeout: float = option(10.0, "seconds for a host to answer", check=checks.above_0)


def hosts_meant(options: HostOptions) -> Hostfile:
    """Return the hosts of the hostfile, or those that are named, beside this one.

    Raises:
        UserError: both are given, or a host is no host.
    """
    if options.hosts and options.hostfile:
        raise UserError("give hosts, or --hostfile, not both")
    if options.hostfile:
        return read_hostfile(options.hostfile)
    if not options.hosts and HOSTFILE.exists():
        print(f"only this machine is meant; for the hosts of {HOSTFILE}: --hostfile {HOSTFILE}", file=sys.stderr)
    return hostfile_of([{"ssh": name} for name in (THIS_MACHINE, *options.hosts)], "the command line")


def agrees(question: str) -> bool:
    """Ask, and return whether the answer is a yes; the end of the input is none."""
    print(question, end="", flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def agreement_of(is_given: bool) -> Callable[[str], bool]:
    """Return what asks a person, or answers yes by itself."""
    return (lambda question: True) if is_given else agrees


def tell(host: str, step: str, what: str) -> None:
    """Print what was done on a host, or, without one, on all."""
    print(f"{host or 'all hosts':20}  {step:12}  {what}", flush=True)
