"""Sets hosts up, from bare machines to a first token and a hostfile; and takes all of that away again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from ipaddress import IPv4Address
from pathlib import Path

from hippo_mpi.cluster.asking.facts import Probed
from hippo_mpi.cluster.asking.remote import ask
from hippo_mpi.cluster.cabling.topology import Topology, topology_of
from hippo_mpi.cluster.doctor.checks import diagnose
from hippo_mpi.cluster.setting_up import agent
from hippo_mpi.cluster.setting_up.fitting import There
from hippo_mpi.cluster.setting_up.made_hostfile import MadeHostfile
from hippo_mpi.cluster.setting_up.reaching import Say, at_all, sessions
from hippo_mpi.cluster.setting_up.session import MAX_COMMAND, Session
from hippo_mpi.cluster.setting_up.setup_steps import (
    Addresses,
    Cluster,
    Environment,
    FirstRun,
    Link,
    Project,
    Step,
    check_room,
)
from hippo_mpi.durable_files import check_place
from hippo_mpi.errors import LaunchError, RankError
from hippo_mpi.transport.ports import THIS_MACHINE
from hippo_mpi.units import visible

Agrees = Callable[[str], bool]


def set_up(path: Path, names: Sequence[str], agrees: Agrees, say: Say, timeout_s: float) -> bool:
    """Set hosts up, beside those of the hostfile; return False if that isn't wanted.

    Args:
        path: of the hostfile.
        names: of hosts, by ssh.
        agrees: asks a person.
        say: tells what was done.
        timeout_s: for a host to say what it is.

    Raises:
        RankError: a host can't be reached.
        UserError: something else is in the way; what was done stays, and another call goes on from there.
    """
    check_place(path, "--hostfile")
    file = MadeHostfile(path)
    hostfile = file.with_hosts(names)
    if len(hostfile.hosts) < 2:
        raise LaunchError(f"name the hosts to set up, such as mini2.local; {path} has none yet")
    with sessions([host.ssh for host in hostfile.hosts], agrees, say) as reached:
        cluster = _look(reached, ask(hostfile, (), timeout_s), say)
        project, environment = Project(cluster), Environment(cluster)
        check_room(cluster, [project, environment])
        copies: list[Step] = [project, environment]
        is_anew = any(step.describe() for step in copies)
        last = FirstRun(cluster, file, [project.bundle.name, *environment.mark], is_anew)
        steps = [Addresses(cluster), *copies, Link(cluster), last]
        if not _is_agreed(steps, agrees):
            new = [name for name, session in reached.items() if session.has_new_key]
            for name in new:
                say(name, "key", f"stays; to take it out: ./launch/cluster remove {name}")
            print(f"nothing {'else ' if new else ''}was changed")
            return False
        try:
            last.start_alone()
            for step in steps:
                step.do(say)
        finally:
            last.end()
    return True


def _look(reached: Mapping[str, Session], probed: Sequence[Probed], say: Say) -> Cluster:
    """Return what is known of hosts.

    Raises:
        RankError: one doesn't say what it is.
        LaunchError: two are one machine.
    """
    for host in probed:
        if host.facts is None:
            raise RankError(f"{host.host.ssh} doesn't say what it is: {visible(host.error)}")
    for finding in diagnose(probed, ["names-same"]):
        raise LaunchError(f"{finding.found}: {finding.fix}")
    said = at_all(list(reached), lambda name: There.read(reached[name].call(agent.hello)))
    for name, one in said.items():
        if name != THIS_MACHINE:
            say(name, "reached", visible(f"{one.system} {one.release}, {one.machine}, Python {one.version}"))
    topology = topology_of(probed)
    if topology.plan.why_not:
        raise LaunchError(topology.plan.why_not)
    return Cluster(reached, said, topology if len(topology.ring) == len(probed) else _by_ssh(topology, probed))


def _by_ssh(topology: Topology, probed: Sequence[Probed]) -> Topology:
    """Return a topology without cables, with the addresses by which ssh goes: other shared networks may lead nowhere."""
    addresses: dict[str, str] = {}
    for host in probed[1:]:
        words = host.facts.environment.get("SSH_CONNECTION", "").split() if host.facts else []
        with contextlib.suppress(ValueError, IndexError):
            # The first rank listens where the last one's ssh sees it, since that one calls it.
            ours, theirs = IPv4Address(words[0]), IPv4Address(words[2])
            own = probed[0].facts
            is_of_vpn = not (theirs.is_private or theirs.is_global)  # 100.64.0.0/10, as Tailscale's
            if own and own.interface_of(str(ours)) and not is_of_vpn:
                addresses |= {THIS_MACHINE: str(ours), host.host.ssh: str(theirs)}
    hosts = (
        replace(host, ips=(addresses.get(host.ssh) or host.ips[0],)) if host.ips else host
        for host in topology.hostfile.hosts
    )
    return replace(topology, hostfile=replace(topology.hostfile, hosts=tuple(hosts)))


def _is_agreed(steps: Sequence[Step], agrees: Agrees) -> bool:
    """Print what would be changed, and ask, if anything would."""
    wanted = [(host, line) for step in steps for host, lines in step.describe().items() for line in lines]
    for host, line in wanted:
        print(f"  {'here' if host == THIS_MACHINE else host}: {visible(line, MAX_COMMAND)}")
    return not wanted or agrees("do this? [y/N] ")
