"""hippo_mpi.cluster: look after the machines of a run.

hippo_mpi.cluster doctor --hostfile hosts.json                # what is wrong with them, and what to do
hippo_mpi.cluster doctor mini2.local anna@mini3.local         # of hosts that are in no hostfile yet
hippo_mpi.cluster doctor --save report.json                   # for a bug report; --from judges it again
hippo_mpi.cluster stop --hostfile hosts.json                  # ranks whose starter is gone
hippo_mpi.cluster convert $PBS_NODEFILE --to mlx              # lists of hosts of other launchers
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hippo_mpi.cluster import doctor, stop
from hippo_mpi.cluster.checks import NAMES, diagnose
from hippo_mpi.cluster.host_formats import FORMATS, read_any, written
from hippo_mpi.cluster.hostfile import Hostfile, hostfile_of, read_hostfile
from hippo_mpi.cluster.remote import ask
from hippo_mpi.config import checks
from hippo_mpi.config.parser import OptionsParser, option
from hippo_mpi.errors import HippoError, RankError, UserError, print_error
from hippo_mpi.transport.ports import THIS_MACHINE

_VERBS = ("doctor", "stop", "convert")


@dataclass(frozen=True, kw_only=True)
class ClusterOptions:
    """All options of hippo_mpi.cluster."""

    verb: str = option(
        "",
        "doctor: say what is wrong with hosts, and what to do; stop: end ranks whose starter is gone; convert: print a list of hosts in another format",
        "verb",
        choices=_VERBS,
    )
    hosts: Sequence[str] = option(
        (),
        "doctor, stop: hosts beside this one, as ssh knows them, instead of a hostfile; convert: the file",
        "hosts",
        nargs="*",
    )
    to: str = option(
        "mlx", "format to convert to: openmpi, mpich, lines (a host a line, as of PBS), or mlx", choices=FORMATS
    )
    hostfile: Path | None = option(None, "JSON list of hosts, as for mlx.launch", check=Path, metavar="FILE")
    starting_port: int | None = option(
        None, "look whether this port and those of the other ranks are free", check=checks.port
    )
    check: Sequence[str] = option((), "only these checks, by their names", nargs="+", choices=NAMES, metavar="NAME")
    timeout: float = option(10.0, "seconds for a host to answer", check=checks.above_0)
    json: bool = option(False, "print a JSON object")
    yes: bool = option(False, "stop: end them without asking")
    save: Path | None = option(
        None, "write what the hosts answered to this file, without what is private", check=Path, metavar="FILE"
    )
    from_: Path | None = option(
        None, "judge what --save has written, instead of asking", "--from", check=Path, metavar="FILE"
    )


def make_parser() -> OptionsParser[ClusterOptions]:
    """Return the parser of the command's options."""
    return OptionsParser(ClusterOptions, prog="hippo_mpi.cluster", description=(__doc__ or "").splitlines()[0])


def _hostfile(options: ClusterOptions) -> Hostfile:
    """Return the hosts that are meant: of the hostfile, or named, beside this one.

    Raises:
        UserError: both are given, or a host is no host.
    """
    if options.hosts and options.hostfile:
        raise UserError("give hosts, or --hostfile, not both")
    if options.hostfile:
        return read_hostfile(options.hostfile)
    return hostfile_of([{"ssh": name} for name in (THIS_MACHINE, *options.hosts)], "the command line")


def examine(options: ClusterOptions) -> int:
    """Print what is wrong with hosts; return the exit status.

    Raises:
        UserError: a file can't be read or written.
    """
    if options.from_:
        hosts = doctor.read_saved(options.from_)
    else:
        hostfile = _hostfile(options)
        first = options.starting_port
        ports = range(first, first + sum(max(1, len(host.ips)) for host in hostfile.hosts)) if first else ()
        hosts = ask(hostfile, ports, options.timeout)
    if options.save:
        doctor.save(hosts, options.save)
    findings = diagnose(hosts, options.check)
    print(doctor.to_json(hosts, findings) if options.json else "\n".join(doctor.lines_of(hosts, findings)))
    return doctor.exit_code(hosts, findings)


def end_ranks(options: ClusterOptions) -> int:
    """End ranks whose starter is gone, after a yes; return the exit status.

    Raises:
        UserError: the hosts aren't named in a way that can be read.
    """
    hosts = ask(_hostfile(options), (), options.timeout)
    for host in hosts:
        if host.facts is None:
            print_error(f"{host.host.ssh} is not known: {host.error}")
    commands = stop.commands_of(hosts)
    for finding in diagnose(hosts, ["stale-ranks"]):
        print(f"{finding.host}: {finding.found}")
    if not commands:
        print("there is no rank whose starter is gone")
    elif not options.yes and not _agrees("end them? [y/N] "):
        print("nothing was ended")
    else:
        for name, command in commands.items():
            if why := stop.end(command):
                print_error(f"{name}: {why}")
                return RankError.exit_code
            print(f"{name}: ended")
    return doctor.exit_code(hosts, [])


def _agrees(question: str) -> bool:
    """Ask, and return whether the answer is a yes; the end of the input is none."""
    print(question, end="", flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def convert(options: ClusterOptions) -> int:
    """Print a list of hosts in another format; return the exit status.

    Raises:
        UserError: there isn't one file, or it names no hosts.
    """
    if len(options.hosts) != 1:
        raise UserError("convert takes one file: hippo_mpi.cluster convert FILE --to FORMAT")
    print(written(read_any(Path(options.hosts[0])), options.to), end="")
    return 0


def main() -> None:
    """Run the command and exit with its status."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing is left half done by a Ctrl-C
    try:
        options = make_parser().read()
        code = {"doctor": examine, "stop": end_ranks, "convert": convert}[options.verb](options)
    except HippoError as error:
        print_error(str(error))
        code = error.exit_code
    sys.exit(code)


if __name__ == "__main__":
    main()
