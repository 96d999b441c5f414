"""How Macs are cabled, and what follows: order of the ring, addresses, RDMA devices, and the backend. Pure.

`topology_of` is for what the doctor has asked (`remote.ask`), this machine first; it takes hosts that are no Macs, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from itertools import combinations

from hippo_mpi.cluster.asking.facts import Facts, Probed
from hippo_mpi.cluster.asking.macos import MacFacts
from hippo_mpi.cluster.asking.rdma import why_no_rdma
from hippo_mpi.cluster.cabling.address_plan import AddressPlan, Command, Link, LinkEnd, choose_addresses, commands_for
from hippo_mpi.cluster.cabling.cables import Cable, Pair, cables_of, closing_pair, longest_ring, usable
from hippo_mpi.cluster.hostfile import Host, Hostfile

_VPN = IPv4Network("100.64.0.0/10")


@dataclass(frozen=True)
class Topology:
    """What to do with some hosts.

    Args:
        cables: between them.
        ring: numbers of hosts, a longest cycle of cables, this machine first.
        hostfile: rank 0 is this machine; its addresses are those of `plan`, or the LAN's.
        plan: that gives the cables their addresses; without commands: they have them, or the LAN is used.
        why_not_jaccl: the one reason; None: JACCL it is.
        to_close: what cable would make a ring of all hosts; None: there is one, or a cable isn't enough.
    """

    cables: tuple[Cable, ...]
    ring: tuple[int, ...]
    hostfile: Hostfile
    plan: AddressPlan
    why_not_jaccl: str | None = None
    to_close: str | None = None


def topology_of(hosts: Sequence[Probed]) -> Topology:
    """Return how hosts are best joined: by their cables if these make a ring or a mesh of all, else by the LAN.

    Args:
        hosts: as asked, this machine first, which has answered; those that have not are left out.

    Raises:
        UserError: no network is free for the cables.
    """
    hosts = [host for host in hosts if host.facts]
    facts = [host.facts for host in hosts if host.facts]
    names = [host.host.ssh for host in hosts]
    macs = [one.mac for one in facts]
    cables = cables_of(macs)
    joined = usable(cables)
    ring = longest_ring(len(facts), joined)
    lan = lan_addresses(facts)
    backend, why_not = choose_backend(names, macs, joined, ring)
    if backend != "ring" and len(facts) > 2 and None in lan:
        backend, why_not = "ring", f"{names[lan.index(None)]} is in no LAN, where the ranks of JACCL meet"
    if len(ring) < len(facts) and backend == "ring":
        to_close = closing_pair(len(facts), joined)
        missing = None if to_close is None or not all(macs) else f"{names[to_close[0]]} and {names[to_close[1]]}"
        entries = tuple(
            replace(host.host, ips=(address,) if address else (), rdma=())
            for host, address in zip(hosts, lan, strict=True)
        )
        hostfile = Hostfile(entries, backend="ring")
        return Topology(tuple(cables), ring, hostfile, AddressPlan(), why_not, missing)
    order = tuple(range(len(facts))) if backend == "jaccl" else ring
    links = _links(joined, [mac for mac in macs if mac], backend)
    in_order = sorted((link for among in links.values() for link in among), key=lambda one: astuple(one[0]))
    plan, addresses = _addresses(names, facts, in_order)
    on_links = {pair: [addresses[link] for link in among] for pair, among in links.items()}
    hostfile = _hostfile([host.host for host in hosts], order, backend, on_links, joined, lan)
    return Topology(tuple(cables), ring, hostfile, plan, why_not)


def choose_backend(
    names: Sequence[str], macs: Sequence[MacFacts | None], joined: dict[Pair, list[Cable]], ring: Sequence[int]
) -> tuple[str, str | None]:
    """Return jaccl, jaccl-ring or ring, and the one reason why it isn't jaccl.

    RDMA is for all hosts or none, and never leads through a dock.
    """
    direct = {pair for pair, among in joined.items() if not among[0].behind}
    gap = next((pair for pair in combinations(range(len(macs)), 2) if pair not in direct), None)
    no_cable = f"no cable joins {names[gap[0]]} and {names[gap[1]]}" if gap else None
    if len(macs) < 2:
        return "ring", "there is one host"
    if None in macs:
        return "ring", f"{names[list(macs).index(None)]} is no Mac"
    hops = {_pair(one, ring[place - 1]) for place, one in enumerate(ring)}
    if no_cable and not (len(ring) == len(macs) and hops <= direct):
        return "ring", no_cable
    for name, mac in zip(names, macs, strict=True):
        if mac and (no := why_no_rdma(mac)):
            return "ring", f"{name}: {no.why}"
    if len({mac.build for mac in macs if mac}) > 1:
        found = ", ".join(f"{name} {mac.version} ({mac.build})" for name, mac in zip(names, macs, strict=True) if mac)
        return "ring", f"the hosts have different versions of macOS: {found}"
    return ("jaccl-ring" if no_cable else "jaccl"), no_cable


def lan_addresses(facts: Sequence[Facts]) -> list[str | None]:
    """Return an address of each host that is no cable's: in a network that all share, if there is one, else any."""
    candidates = [list(_lan_interfaces(one)) for one in facts]
    for shared in (address.network for address in candidates[0]):
        inside = [next((one for one in among if one.network == shared), None) for among in candidates]
        found = [str(one.ip) for one in inside if one]
        if len(set(found)) == len(candidates):  # one address on two hosts leads from neither to the other
            return [*found]
    return [str(among[0].ip) if among else None for among in candidates]


def _lan_interfaces(facts: Facts) -> Iterator[IPv4Interface]:
    """Return a host's addresses in LANs, Wi-Fi's last; not in networks of its own containers and virtual machines."""
    mac = facts.mac
    wireless = (mac.hardware_ports or {}).get("Wi-Fi") if mac else None
    outward = [one for one in facts.interfaces or () if not (one.is_of_guests or (mac and mac.is_cable(one.name)))]
    for one in sorted(outward, key=lambda one: one.name == wireless or one.name.startswith("wl")):
        for address in one.addresses:
            if not (address.ip.is_loopback or address.ip.is_link_local or address.ip in _VPN):
                yield address


def _pair(one: int, other: int) -> Pair:
    return min(one, other), max(one, other)


def _links(joined: dict[Pair, list[Cable]], macs: Sequence[MacFacts], backend: str) -> dict[Pair, list[Link]]:
    """Return what gets addresses: each cable, or the Thunderbolt Bridges of two Macs, which take all their cables."""
    found: dict[Pair, list[Link]] = {}
    for pair, among in joined.items():
        ends = [[LinkEnd(end.host, str(end.port.interface)) for end in cable.ends] for cable in among]
        bridge = _bridge_link(ends, macs) if len(macs) == 2 and backend == "ring" else None
        found[pair] = [bridge] if bridge else [(one, other) for one, other in ends]
    return found


def _bridge_link(ends: Sequence[Sequence[LinkEnd]], macs: Sequence[MacFacts]) -> Link | None:
    """Return the link between the bridges of two Macs; None: not all ports are in one, or it has no service."""
    bridges = []
    for side, mac in enumerate(macs):
        among = {mac.bridge_of(pair[side].interface) for pair in ends}
        bridge = among.pop()
        if among or bridge is None or not mac.service_of(bridge.name):
            return None
        bridges.append(LinkEnd(side, bridge.name))
    return bridges[0], bridges[1]


def _addresses(
    names: Sequence[str], facts: Sequence[Facts], links: Sequence[Link]
) -> tuple[AddressPlan, dict[Link, tuple[str, str]]]:
    """Return what sets the addresses of links, and these."""
    macs = [one.mac for one in facts if one.mac]
    blocked: list[tuple[LinkEnd | None, IPv4Network]] = []
    for host, one in enumerate(facts):
        blocked += [(LinkEnd(host, i.name), a.network) for i in one.interfaces or () for a in i.addresses]
        blocked += [(None, network) for network in one.routes or ()]
    chosen = choose_addresses(links, macs, blocked)
    commands: dict[str, list[Command]] = {}
    why_not = None
    for link, pair in zip(links, chosen, strict=True):
        for end, address in zip(link, pair, strict=True):
            wanted = list(commands_for(macs[end.host], end.interface, address))
            if wanted and _ssh_comes_by(facts[end.host], end.interface):
                why_not = f"ssh reaches {names[end.host]} by {end.interface}, whose address would change: give ssh the LAN's name"
            commands.setdefault(names[end.host], []).extend(wanted)
    by_host = {name: tuple(among) for name, among in commands.items() if among}
    plan = AddressPlan({} if why_not else by_host, why_not)
    return plan, {link: (str(one.ip), str(other.ip)) for link, (one, other) in zip(links, chosen, strict=True)}


def _ssh_comes_by(facts: Facts, interface: str) -> bool:
    words = facts.environment.get("SSH_CONNECTION", "").split()
    try:
        by = facts.interface_of(str(IPv4Address(words[2])))
    except (ValueError, IndexError):
        return False
    bridge = facts.mac.bridge_of(interface) if facts.mac else None
    return by is not None and by.name in (interface, bridge.name if bridge else interface)


def _hostfile(
    hosts: Sequence[Host],
    order: Sequence[int],
    backend: str,
    addresses: dict[Pair, list[tuple[str, str]]],
    joined: dict[Pair, list[Cable]],
    lan: Sequence[str | None],
) -> Hostfile:
    """Return the hostfile of a ring, or of JACCL with its matrix of devices; ranks are in the given order."""
    hops = [_pair(one, order[place - 1]) for place, one in enumerate(order)] if len(order) > 1 else []
    pairs = set(hops) if backend != "jaccl" else set(combinations(range(len(hosts)), 2))
    width = min((len((addresses if backend == "ring" else joined)[pair]) for pair in pairs), default=0)
    entries = []
    for place, host in enumerate(order):
        own, rdma = lan[host], []
        ips = [on[host > order[place - 1]] for on in addresses[hops[place]][:width]] if hops else []
        if backend != "ring":
            rdma = [_devices(joined, host, other, width) if _pair(host, other) in pairs else None for other in order]
            ips = [own] if own else ips
        entries.append(replace(hosts[host], ips=tuple(ips), rdma=tuple(rdma)))
    control = [f"HIPPO_CONTROL={lan[order[0]]}"] if backend == "ring" and lan[order[0]] and hops else []
    return Hostfile(tuple(entries), backend=backend, envs=tuple(control))


def _devices(joined: dict[Pair, list[Cable]], host: int, other: int, width: int) -> str | list[str] | None:
    if host == other:
        return None
    found = [f"rdma_{cable.end_at(host).port.interface}" for cable in joined[_pair(host, other)][:width]]
    return found[0] if width == 1 else found
