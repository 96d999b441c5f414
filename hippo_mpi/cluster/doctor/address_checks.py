"""What can be wrong with the addresses of hosts, and with the ways between them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from ipaddress import IPv4Interface, IPv4Network, ip_address

from hippo_mpi.cluster.asking.facts import Facts, Interface, Probed, Reach
from hippo_mpi.cluster.doctor.findings import WARNING, Check, Finding, as_root, known
from hippo_mpi.cluster.doctor.mac_checks import FIREWALL

_VPN = IPv4Network("100.64.0.0/10")
_LINK_LOCAL = IPv4Network("169.254.0.0/16")
_AT_ONCE = ("No route to host", "Network is unreachable")  # what no firewall that drops packets leads to


def _addresses(hosts: Sequence[Probed]) -> Iterator[Finding]:
    for _, host, facts in known(hosts):
        for address, why in facts.own.items():
            if why:
                has = ", ".join(str(a.ip) for _, a in _of_networks(facts))
                found = f"{address} is none of its addresses, which are {has or 'none'} ({why})"
                yield Finding("address-missing", host.host.ssh, found, _give_address(address, facts, hosts))
            elif ip_address(address) in _LINK_LOCAL:
                fix = "give the cable's ports fixed addresses: these change, and may be reached by another interface"
                yield Finding("self-assigned", host.host.ssh, f"{address} is one that it gave itself", fix, WARNING)
            elif ip_address(address) in _VPN:
                fix = "use the address of the LAN, or a cable's"
                yield Finding("vpn-path", host.host.ssh, f"{address} is a VPN's", fix, WARNING)


def _of_networks(facts: Facts) -> list[tuple[str, IPv4Interface]]:
    """Return a host's addresses in networks, with their interfaces."""
    return [(one.name, a) for one in facts.interfaces or () for a in one.addresses if not a.ip.is_loopback]


def _give_address(address: str, facts: Facts, hosts: Sequence[Probed]) -> str:
    """Return what gives a host an address: by a command, if one interface has none, and others are in its network."""
    free = [one.name for one in facts.interfaces or () if not one.addresses]
    near = [
        a.network for _, _, other in known(hosts) for _, a in _of_networks(other) if ip_address(address) in a.network
    ]
    if len(free) == 1 and near and not facts.mac:
        return as_root("ip", "addr", "add", f"{address}/{near[0].prefixlen}", "dev", free[0])
    return "give an interface that address, or name another in the hostfile"


def _address_clash(hosts: Sequence[Probed]) -> Iterator[Finding]:
    for _, host, facts in known(hosts):
        networks = _of_networks(facts)
        for number, (name, address) in enumerate(networks):
            for other, theirs in networks[:number]:
                if other != name and address.network.overlaps(theirs.network):
                    found = f"{address} on {name} overlaps {theirs} on {other}"
                    if _are_one_lan(facts, (name, address), (other, theirs)):
                        continue
                    fix = "give one of them another network"
                    wrong = [(a, one) for one, a in networks[: number + 1] if str(a.ip) not in host.host.ips]
                    wrong = [(a, one) for a, one in wrong if a in (address, theirs)]
                    if len(wrong) == 1 and not facts.mac:
                        fix += f": {as_root('ip', 'addr', 'del', str(wrong[0][0]), 'dev', wrong[0][1])}"
                    yield Finding("address-clash", host.host.ssh, found, fix)


def _are_one_lan(facts: Facts, one: tuple[str, IPv4Interface], other: tuple[str, IPv4Interface]) -> bool:
    """Return True if a host is in one LAN twice, as many are by cable and by Wi-Fi: it knows which of them to use."""
    if one[1].network != other[1].network:
        return False
    if facts.mac:
        return not any(facts.mac.is_cable(name) for name, _ in (one, other))
    return any(_kind(facts, name) == "Wi-Fi" for name, _ in (one, other))


def _neighbors(hosts: Sequence[Probed]) -> Iterator[Finding]:
    """Check how each rank's packets reach the next one."""
    for rank, host, facts in known(hosts):
        following = (rank + 1) % len(hosts)
        other = hosts[following]
        for address, reach in facts.reached.items():
            towards = f"{address} of rank {following} ({other.host.ssh})"
            leaving = facts.interface_of(reach.source) if reach.source else None
            leaving_by = reach.interface or (leaving.name if leaving else None)
            near = _better_way(facts, address, leaving_by)
            if near and leaving_by:
                found = (
                    f"packets to {towards} leave by {_in_words(facts, leaving_by)}, and not by"
                    f" {_in_words(facts, near.name)}, in whose network it is"
                )
                yield Finding("wrong-interface", host.host.ssh, found, _route_by(facts, address, near))
            elif reach.why and not reach.is_denied:
                through = f" by {leaving.name} ({reach.source})" if leaving else ""
                found = f"{towards} isn't reached{through}: {reach.why}"
                if _is_kept_out(reach, other.facts):
                    yield _firewall(host, other, found, reach.source)
                else:
                    yield _unreached(host, other, found, address)
            elif why := facts.called.get(address):
                found = f"{towards} isn't reached where a program listens: {why}"
                yield _firewall(host, other, found, reach.source)


def _better_way(facts: Facts, address: str, leaving_by: str | None) -> Interface | None:
    """Return the interface that packets should leave by; None: they do, or the address is the host's own.

    Of two that are in its network, Wi-Fi is the worse one.
    """
    inside = [one for one in facts.interfaces or () if any(ip_address(address) in a.network for a in one.addresses)]
    wired = [one for one in inside if _kind(facts, one.name) != "Wi-Fi"]
    if facts.interface_of(address) or leaving_by in [one.name for one in wired or inside]:
        return None
    return next(iter(wired or inside), None)


def _kind(facts: Facts, interface: str) -> str | None:
    """Return what an interface is, such as Wi-Fi or Thunderbolt 2; None: unknown."""
    ports = (facts.mac.hardware_ports if facts.mac else None) or {}
    wireless = "Wi-Fi" if interface.startswith("wl") else None
    return next((port for port, name in ports.items() if name == interface), wireless)


def _in_words(facts: Facts, interface: str) -> str:
    kind = _kind(facts, interface)
    return f"{interface} ({kind})" if kind else interface


def _route_by(facts: Facts, address: str, near: Interface) -> str:
    cost = "; a cable carries 10 to 100 times what Wi-Fi does"
    if facts.mac:
        return as_root("route", "-n", "change", address, "-interface", near.name) + cost
    return as_root("ip", "route", "replace", f"{address}/32", "dev", near.name) + cost


def _is_kept_out(reach: Reach, there: Facts | None) -> bool:
    """Return True if a firewall is what keeps calls from a host: it has one, or the link itself is well.

    Linux takes a neighbor that has gone for reachable half a minute longer; such a one doesn't answer ssh either.
    """
    if there is None:
        return False
    return reach.is_on_link or bool(there.has_firewall and reach.why not in _AT_ONCE)


def _firewall(host: Probed, other: Probed, found: str, source: str | None) -> Finding:
    facts = other.facts
    has = "it has a firewall" if facts and facts.has_firewall else "it answers on the link, but something drops calls"
    fix = f"let {source or 'the other ranks'} through its firewall"
    if facts and facts.mac:
        fix = as_root(FIREWALL, "--add", facts.python, "--unblockapp", facts.python)
    elif source:
        fix += f": {as_root('ufw', 'allow', 'from', source)}; or what your firewall has for it"
    return Finding("firewall", other.host.ssh, f"{has}, and from {host.host.ssh} {found}", fix)


def _unreached(host: Probed, other: Probed, found: str, address: str) -> Finding:
    facts = other.facts
    fix = "is the cable plugged in, is the interface up on both ends, does a firewall drop it?"
    is_off = [one.name for one in (facts.down if facts else ()) if any(str(a.ip) == address for a in one.addresses)]
    if is_off:
        fix = f"on {other.host.ssh}: {as_root('ip', 'link', 'set', 'dev', is_off[0], 'up')}"
    return Finding("link-down", host.host.ssh, found, fix)


def _mtu(hosts: Sequence[Probed]) -> Iterator[Finding]:
    found = known(hosts)
    for rank, host, facts in found:
        for next_rank, other, theirs in found:
            if next_rank != (rank + 1) % len(hosts) or rank == next_rank:
                continue
            for address in other.host.ips:
                near, far = facts.interface_towards(address), theirs.interface_of(address)
                if near and far and near.mtu and far.mtu and near.mtu != far.mtu:
                    what = f"{near.name} has MTU {near.mtu}, and {far.name} of {other.host.ssh}, on the same link, {far.mtu}"
                    small, where = (near, facts) if near.mtu < far.mtu else (far, theirs)
                    fix = _set_mtu(where, small.name, max(near.mtu, far.mtu))
                    on = host.host.ssh if small is near else other.host.ssh
                    yield Finding("mtu-differs", host.host.ssh, what, f"on {on}: {fix}", WARNING)


def _set_mtu(facts: Facts, interface: str, mtu: int) -> str:
    if facts.mac:
        return as_root("networksetup", "-setMTU", interface, str(mtu))
    return as_root("ip", "link", "set", "dev", interface, "mtu", str(mtu))


def _ports(hosts: Sequence[Probed]) -> Iterator[Finding]:
    for _, host, facts in known(hosts):
        for port, why in facts.taken.items():
            yield Finding(
                "port-taken",
                host.host.ssh,
                f"port {port}: {why}",
                "end who listens there, or give another --starting-port",
            )


CHECKS: tuple[Check, ...] = (_addresses, _address_clash, _neighbors, _ports, _mtu)
NAMES = (
    "address-missing", "address-clash", "vpn-path", "wrong-interface", "link-down", "mtu-differs", "port-taken",
)  # fmt: skip
