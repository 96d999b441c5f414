"""hippo_mpi.cluster stop: end ranks whose starter is gone, after a yes."""

from __future__ import annotations

from dataclasses import dataclass

from hippo_mpi.cluster import stop
from hippo_mpi.cluster.asking.remote import ask
from hippo_mpi.cluster.doctor import doctor
from hippo_mpi.cluster.doctor.checks import diagnose
from hippo_mpi.cluster.verbs.host_options import HostOptions, agrees, hosts_meant
from hippo_mpi.config.parser import option
from hippo_mpi.errors import RankError, print_error


@dataclass(frozen=True, kw_only=True)
class Options(HostOptions):
    """All options of the verb."""

    yes: bool = option(False, "end them without asking")


def run(options: Options) -> int:
    """End ranks whose starter is gone, after a yes; return the exit status.

    Raises:
        UserError: the hosts aren't named in a way that can be read.
    """
    hosts = ask(hosts_meant(options), (), options.timeout)
    for host in hosts:
        if host.facts is None:
            print_error(f"{host.host.ssh} is not known: {host.error}")
    commands = stop.commands_of(hosts)
    for finding in diagnose(hosts, ["stale-ranks"]):
        print(f"{finding.host}: {finding.found}")
    if not commands:
        print("there is no rank whose starter is gone")
    elif not options.yes and not agrees("end them? [y/N] "):
        print("nothing was ended")
    else:
        for name, command in commands.items():
            if why := stop.end(command):
                print_error(f"{name}: {why}")
                return RankError.exit_code
            print(f"{name}: ended")
    return doctor.exit_code(hosts, [])
