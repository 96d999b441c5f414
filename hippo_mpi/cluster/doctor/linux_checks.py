"""What can be wrong with a Linux machine beside its addresses: loops of bridges, sleep, and heat."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hippo_mpi.cluster.asking.facts import Probed
from hippo_mpi.cluster.doctor.findings import WARNING, Check, Finding, as_root, known


def _bridge_loop(hosts: Sequence[Probed]) -> Iterator[Finding]:
    """Check whether bridges have more ports than cables without a ring would need.

    Nothing says where a port's cable leads. But a tree of bridges has two ends of cables for each but one of them, and
    a bridge with the spanning tree protocol opens one ring. So this may be wrong where ports lead to other machines.
    """
    found = [
        (host, bridge)
        for _, host, facts in known(hosts)
        for bridge in (facts.linux.bridges if facts.linux else None) or ()
        if bridge.ports
    ]
    num_ends = sum(len(bridge.ports) for _, bridge in found)
    num_rings = num_ends // 2 - len(found) + 1 - sum(bridge.has_stp for _, bridge in found)
    passing = [(host, bridge) for host, bridge in found if len(bridge.ports) > 1 and not bridge.has_stp]
    names = list(dict.fromkeys(host.host.ssh for host, _ in found))
    if num_rings > 0 and len(names) > 1 and passing:
        host, bridge = passing[0]
        others = ", ".join(name for name in names if name != host.host.ssh)
        seen = (
            f"its bridge {bridge.name} passes packets on between {' and '.join(bridge.ports)}, and there are bridges on"
            f" {others}: if cables join their ports in a ring, packets go round for ever"
        )
        fix = f"{as_root('ip', 'link', 'set', 'dev', bridge.name, 'type', 'bridge', 'stp_state', '1')}; or take a port out"
        yield Finding("bridge-loop", host.host.ssh, seen, fix, WARNING)


def _power(hosts: Sequence[Probed]) -> Iterator[Finding]:
    for _, host, facts in known(hosts):
        linux, name = facts.linux, host.host.ssh
        if linux is None:
            continue
        if linux.is_on_battery:
            yield Finding("sleeps", name, "it runs on its battery", "plug it in", WARNING)
        elif linux.idle:
            action, after = linux.idle
            found = f"logind is told to {action} once nobody has typed for {after}, whatever runs"
            fix = (
                "set IdleAction=ignore in /etc/systemd/logind.conf, and then:"
                f" {as_root('systemctl', 'restart', 'systemd-logind')}"
            )
            yield Finding("sleeps", name, found, fix, WARNING)
        if linux.heat:
            fix = "give it air; see /sys/class/thermal"
            yield Finding("hot", name, "; ".join(linux.heat[:3]), fix, WARNING)


CHECKS: tuple[Check, ...] = (_bridge_loop, _power)
