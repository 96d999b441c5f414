"""What can be wrong with the Thunderbolt cables between Macs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hippo_mpi.cluster.asking.facts import Facts, Probed
from hippo_mpi.cluster.asking.macos import MacFacts
from hippo_mpi.cluster.asking.rdma import has_thunderbolt_5
from hippo_mpi.cluster.cabling.cables import Cable, End, cables_of, one_sided
from hippo_mpi.cluster.doctor.findings import WARNING, Check, Finding, as_root

_GBPS = {True: 80, False: 40}  # of a port, by whether it is Thunderbolt 5


def macs_of(hosts: Sequence[Probed]) -> list[MacFacts | None]:
    """Return what each host's macOS says, by rank; None: it has none, or didn't answer."""
    return [host.facts.mac if host.facts else None for host in hosts]


def port_name(end: End, hosts: Sequence[Probed]) -> str:
    """Return an end of a cable in words."""
    interface = f" ({end.port.interface})" if end.port.interface else ""
    return f"Thunderbolt {end.port.receptacle}{interface} of {hosts[end.host].host.ssh}"


def _cable_absent(hosts: Sequence[Probed]) -> Iterator[Finding]:
    """Check that a cable leads to each host whose data address is on one."""
    macs = macs_of(hosts)
    cables = cables_of(macs)
    for rank in range(len(hosts) if len(hosts) > 1 else 0):
        following = (rank + 1) % len(hosts)
        mac, facts = macs[following], hosts[following].facts
        if not mac or not facts or not mac.ports or not macs[rank] or not (macs[rank] or mac).ports:
            continue  # what isn't known isn't absent
        for address in hosts[following].host.ips:
            interface = interface_meant(facts, mac, address)
            is_bridge = any(bridge.name == interface and bridge.members for bridge in mac.bridges or ())
            if not interface or not (is_bridge or mac.port_of(interface)):
                continue
            if following not in _reached(rank, cables, is_bridge):
                yield _absent(rank, following, f"{address} is for one, on {interface}", hosts, macs)
                break
    yield from _indirect(hosts, macs, cables)


def interface_meant(facts: Facts, mac: MacFacts, address: str) -> str | None:
    """Return the interface that has an address, or would have it if its cable were plugged in."""
    if found := facts.interface_of(address):
        return found.name
    return next((one.interface for one in mac.services or () if one.is_on and address in one.address[:1]), None)


def _reached(rank: int, cables: Sequence[Cable], is_bridge: bool) -> set[int]:
    """Return the Macs to which a cable leads, or for bridges, a chain of them."""
    found = {rank}
    for _ in range(len(cables) if is_bridge else 1):
        found |= {other for cable in cables if found & set(cable.pair) for other in cable.pair}
    return found


def _absent(rank: int, following: int, why: str, hosts: Sequence[Probed], macs: Sequence[MacFacts | None]) -> Finding:
    free = []
    for host in (rank, following):
        mac = macs[host]
        idle = [port for port in (mac.ports if mac else None) or () if not port.linked_gbps and not port.neighbors]
        free += [End(host, port) for port in idle[:1]]
    found = f"no cable joins it with {hosts[following].host.ssh}, though {why}"
    names = [port_name(end, hosts) for end in free]
    if names:
        found += f"; nothing is plugged into {' and '.join(names)}"
    fix = f"connect {' with '.join(names)}" if len(names) == 2 else "plug a cable into both"
    return Finding("cable-absent", hosts[rank].host.ssh, found, fix)


def _indirect(hosts: Sequence[Probed], macs: Sequence[MacFacts | None], cables: Sequence[Cable]) -> Iterator[Finding]:
    direct = {cable.pair for cable in cables if not cable.behind}
    for cable in cables:
        if cable.behind and cable.pair not in direct:
            one, other = (hosts[end.host].host.ssh for end in cable.ends)
            found = f"it hangs with {one} behind {cable.behind!a}, which has no RDMA"
            yield Finding("cable-absent", other, found, "plug the cable into both Macs", WARNING)
    for end, other_end in one_sided(macs):
        found = f"{port_name(end, hosts)} sees {port_name(other_end, hosts)}, which doesn't see it"
        yield Finding("cable-absent", hosts[other_end.host].host.ssh, found, "plug the cable in again", WARNING)


def _cable_slow(hosts: Sequence[Probed]) -> Iterator[Finding]:
    macs = macs_of(hosts)
    for cable in cables_of(macs):
        kinds = [has_thunderbolt_5(mac) for end in cable.ends if (mac := macs[end.host])]
        can = min((_GBPS[kind] for kind in kinds if kind is not None), default=0)
        if cable.gbps and None not in kinds and cable.gbps < can:
            one, other = (port_name(end, hosts) for end in cable.ends)
            found = f"{cable.gbps} Gbit/s from {one} to {other}, which can {can}"
            fix = f"use a cable that is made for Thunderbolt {5 if can == _GBPS[True] else 4}"
            yield Finding("cable-slow", hosts[cable.ends[0].host].host.ssh, found, fix, WARNING)


def _bridge_loop(hosts: Sequence[Probed]) -> Iterator[Finding]:
    """Check for cycles of cables whose bridges pass frames on, for ever. Two cables between two Macs make none."""
    macs = macs_of(hosts)
    group = list(range(len(hosts)))
    pairs, closing = set(), []
    for cable in cables_of(macs):
        if cable.pair in pairs or not all(_bridge_of(end, macs) for end in cable.ends):
            continue
        pairs.add(cable.pair)
        one, other = (group[host] for host in cable.pair)
        if one == other:
            closing.append(cable.ends[0])
        group = [one if number == other else number for number in group]
    if closing:
        found = "cables and bridges make a ring, in which packets go round for ever, by "
        found += ", ".join(port_name(end, hosts) for end in closing)
        commands = [
            as_root("ifconfig", str(_bridge_of(end, macs)), "deletem", str(end.port.interface)) for end in closing
        ]
        where = [f"on {hosts[end.host].host.ssh}: {command}" for end, command in zip(closing, commands, strict=True)]
        fix = "take these ports out of their bridges; " + ", ".join(where)
        yield Finding("bridge-loop", hosts[closing[0].host].host.ssh, found, fix)


def _bridge_of(end: End, macs: Sequence[MacFacts | None]) -> str | None:
    mac = macs[end.host]
    bridge = mac.bridge_of(end.port.interface) if mac and end.port.interface else None
    return bridge.name if bridge and bridge.is_up else None


def _self_assigned(hosts: Sequence[Probed]) -> Iterator[Finding]:
    """Check the addresses of ports that have a cable, and of their bridges: one fixed one is enough."""
    macs = macs_of(hosts)
    seen = set()
    for end in (end for cable in cables_of(macs) for end in cable.ends):
        host, facts = hosts[end.host], hosts[end.host].facts
        names = {end.port.interface, _bridge_of(end, macs)}
        found = [
            (one.name, a.ip) for one in (facts and facts.interfaces) or () if one.name in names for a in one.addresses
        ]
        own = [(name, ip) for name, ip in found if ip.is_link_local]
        if own and own == found and own[0] not in seen and str(own[0][1]) not in host.host.ips:  # which says it itself
            seen.add(own[0])
            name, ip = own[0]
            fix = "give it a fixed one: that changes with each plug, and packets to it leave by the LAN"
            what = f"{ip} on {name}, which has a cable, is one that it gave itself"
            yield Finding("self-assigned", host.host.ssh, what, fix, WARNING)


CHECKS: tuple[Check, ...] = (_bridge_loop, _cable_absent, _cable_slow, _self_assigned)
NAMES = ("bridge-loop", "cable-absent", "cable-slow", "self-assigned")
