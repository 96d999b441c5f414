"""hippo_mpi.cluster doctor: say what is wrong with hosts, and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hippo_mpi.cluster.doctor import doctor
from hippo_mpi.cluster.doctor.checks import NAMES, diagnose
from hippo_mpi.cluster.verbs.host_options import HostOptions, hosts_meant
from hippo_mpi.config import checks
from hippo_mpi.config.parser import option


@dataclass(frozen=True, kw_only=True)
class Options(HostOptions):
    """All options of the verb."""

    starting_port: int | None = option(
        None, "look whether this port and those of the other ranks are free", check=checks.port
    )
    check: Sequence[str] = option((), "only these checks, by their names", nargs="+", choices=NAMES, metavar="NAME")
    model: str | None = option(
        None, "look whether this model, a path or a repo on the hub, is there, fits, and can be downloaded"
    )
    json: bool = option(False, "print a JSON object")
    save: Path | None = option(
        None, "write what the hosts answered to this file, without what is private", check=Path, metavar="FILE"
    )
    from_: Path | None = option(
        None, "judge what --save has written, instead of asking", "--from", check=Path, metavar="FILE"
    )


def run(options: Options) -> int:
    """Print what is wrong with hosts; return the exit status.

    Raises:
        UserError: a file can't be read or written.
    """
    if options.from_:
        hosts = doctor.read_saved(options.from_)
    else:
        hostfile = hosts_meant(options)
        first = options.starting_port
        ports = range(first, first + sum(max(1, len(host.ips)) for host in hostfile.hosts)) if first else ()
        hosts = doctor.examine(hostfile, ports, options.timeout, options.model)
    if options.save:
        doctor.save(hosts, options.save)
    findings = diagnose(hosts, options.check)
    print(doctor.to_json(hosts, findings) if options.json else "\n".join(doctor.lines_of(hosts, findings)))
    return doctor.exit_code(hosts, findings)
