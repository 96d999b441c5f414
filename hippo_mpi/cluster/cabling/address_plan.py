"""Addresses for the cables between Macs: networks that nothing overlaps, and the commands that set them and put them back.

Pure: nothing is run here. Only settings of Thunderbolt ports are touched, never those of Ethernet or Wi-Fi.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Interface, IPv4Network

from hippo_mpi.cluster.asking.macos import MacFacts, Service
from hippo_mpi.errors import UserError

_NETWORKSETUP = "/usr/sbin/networksetup"
_IFCONFIG = "/sbin/ifconfig"
_LENGTH = 30  # of a network for two
_MIN_LENGTH = 8  # of a network that is in the way; shorter ones are ways to everywhere else
# Where networks are looked for, in turn; the first begins where few others do.
_POOLS = (
    (IPv4Address("10.205.0.0"), IPv4Address("10.255.255.255")),
    (IPv4Address("172.16.0.0"), IPv4Address("172.31.255.255")),
    (IPv4Address("192.168.0.0"), IPv4Address("192.168.255.255")),
)


@dataclass(frozen=True)
class Command:
    """A command that changes a setting, and the one that puts it back.

    Args:
        do: its words.
        undo: those of the other.
        needs_root: whether both need sudo.
    """

    do: tuple[str, ...]
    undo: tuple[str, ...]
    needs_root: bool = True


@dataclass(frozen=True)
class AddressPlan:
    """What gives the cables their addresses.

    Args:
        commands: by ssh's name of the host, in the order to run them; undo them in the opposite order.
        why_not: why nothing may be changed, though something should; None: nothing is in the way.
    """

    commands: Mapping[str, tuple[Command, ...]] = field(default_factory=dict)
    why_not: str | None = None


@dataclass(frozen=True)
class LinkEnd:
    """An end of a link: an interface of a Mac, by the Mac's number."""

    host: int
    interface: str


Link = tuple[LinkEnd, LinkEnd]


def networks(blocked: Iterable[IPv4Network]) -> Iterator[IPv4Network]:
    """Return networks for two hosts each that overlap none of the blocked ones, nor each other, from 10.205.0.0 upwards."""
    taken = [(int(one.network_address), int(one.broadcast_address)) for one in blocked if one.prefixlen >= _MIN_LENGTH]
    size = 1 << (32 - _LENGTH)
    for first, last in _POOLS:
        begin = int(first)
        while begin + size - 1 <= int(last):
            ends = [end for start, end in taken if start < begin + size and end >= begin]
            if ends:
                begin = (max(ends) // size + 1) * size
            else:
                yield IPv4Network((begin, _LENGTH))
                begin += size


def choose_addresses(
    links: Sequence[Link], macs: Sequence[MacFacts], blocked: Sequence[tuple[LinkEnd | None, IPv4Network]]
) -> list[tuple[IPv4Interface, IPv4Interface]]:
    """Return the addresses of both ends of each link: those that are set already, where that is well, else new ones.

    Args:
        links: between interfaces.
        macs: by number.
        blocked: networks of all hosts, with the interface that has each; None: a route.

    Raises:
        UserError: no network is free.
    """
    kept: dict[Link, tuple[IPv4Interface, IPv4Interface]] = {}
    for link in links:
        elsewhere = [network for end, network in blocked if end is not None and end not in link]
        elsewhere += [one.network for pair in kept.values() for one in pair]
        if pair := _already(link, macs, elsewhere):
            kept[link] = pair
    found = []
    given = [pair[0].network for pair in kept.values()]
    for link in links:
        if link not in kept:
            given.append(_free_network(blocked, given))
        found.append(kept.get(link) or _pair_of(given[-1]))
    return found


def _free_network(blocked: Sequence[tuple[LinkEnd | None, IPv4Network]], given: Sequence[IPv4Network]) -> IPv4Network:
    """Return a network that overlaps no address or route; if all have a route, as some VPNs make, one without an address."""
    addresses = [network for end, network in blocked if end is not None]
    for taken in ([network for _, network in blocked], addresses):
        if found := next(networks([*taken, *given]), None):
            return found
    raise UserError("no private network is free for the cables: the hosts have addresses in all of them")


def _already(
    link: Link, macs: Sequence[MacFacts], elsewhere: Sequence[IPv4Network]
) -> tuple[IPv4Interface, IPv4Interface] | None:
    """Return what the ends have, or would if one of them joined the other's network."""
    has = [_manual_address(macs[end.host].service_of(end.interface)) for end in link]
    for one, other, is_first in ((has[0], has[1], True), (has[1], has[0], False)):
        if one is None or any(one.network.overlaps(network) for network in elsewhere):
            continue
        if other is None or other.network != one.network or other == one:
            theirs = next((host for host in one.network.hosts() if host != one.ip), None)
            if theirs is None or one.network.prefixlen != _LENGTH:
                continue
            other = IPv4Interface((theirs, one.network.prefixlen))
        return (one, other) if is_first else (other, one)
    return None


def _manual_address(service: Service | None) -> IPv4Interface | None:
    if service is None or service.method != "manual" or len(service.address) < 2:
        return None
    try:
        found = IPv4Interface("/".join(service.address[:2]))
    except ValueError:
        return None
    return None if found.ip.is_link_local else found


def _pair_of(network: IPv4Network) -> tuple[IPv4Interface, IPv4Interface]:
    first, second = network.hosts()
    return IPv4Interface((first, network.prefixlen)), IPv4Interface((second, network.prefixlen))


def commands_for(mac: MacFacts, interface: str, address: IPv4Interface) -> Iterator[Command]:
    """Return what gives an interface of a Mac an address for good; nothing if it has it.

    A port is first taken out of the bridge that has it (never by ending the bridge): until the next reboot.
    """
    if bridge := mac.bridge_of(interface):
        yield Command((_IFCONFIG, bridge.name, "deletem", interface), (_IFCONFIG, bridge.name, "addm", interface))
    service = mac.service_of(interface)
    if _manual_address(service) == address:
        return
    if service is None:
        service = next((one for one in mac.services or () if one.interface == interface), None)
        if service:
            on, off = ((_NETWORKSETUP, "-setnetworkserviceenabled", service.name, word) for word in ("on", "off"))
            yield Command(on, off)
        else:
            port = next((name for name, one in (mac.hardware_ports or {}).items() if one == interface), interface)
            service = Service(f"Hippo {port}", interface)
            create = (_NETWORKSETUP, "-createnetworkservice", service.name, port)
            yield Command(create, (_NETWORKSETUP, "-removenetworkservice", service.name))
    words = ("-setmanual", service.name, str(address.ip), str(address.netmask))
    yield Command((_NETWORKSETUP, *words), (_NETWORKSETUP, *_as_it_is(service)))


def _as_it_is(service: Service) -> tuple[str, ...]:
    """Return the options of networksetup that give a service the settings that it has."""
    if service.method == "manual" and len(service.address) >= 2:
        return "-setmanual", service.name, *service.address
    if service.method == "manual with dhcp router" and service.address:
        return "-setmanualwithdhcprouter", service.name, service.address[0]
    return ("-setv4off" if service.method == "off" else "-setdhcp"), service.name
