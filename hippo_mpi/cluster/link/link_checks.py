"""What is wrong with links that were measured: from figures to findings. Nothing is asked here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from hippo_mpi.cluster.asking.facts import Interface, Probed
from hippo_mpi.cluster.doctor.findings import ERROR, WARNING, Finding
from hippo_mpi.cluster.link.link import Links, name_of
from hippo_mpi.cluster.link.link_kinds import LinkKind, slower_of
from hippo_mpi.cluster.link.link_measure import SIZES, Measured, Traffic
from hippo_mpi.units import show_bytes

_MOST_LOPSIDED = 1.5
_MOST_JITTER, _LEAST_JITTER_S = 5.0, 1e-3  # p99 by the median; below a millisecond nobody minds
_OWN_SHARE = 0.5  # of our bytes, which an interface must have counted


def interfaces_of(link: Measured, hosts: Sequence[Probed]) -> tuple[Interface | None, Interface | None]:
    """Return the interfaces that should be used: the first host's in the address's network, and the one that has it."""
    near, far = hosts[link.pair.rank].facts, hosts[link.pair.other].facts
    return (
        near.interface_towards(link.pair.address) if near else None,
        far.interface_of(link.pair.address) if far else None,
    )


def used(traffic: Traffic, end: str, expected: Interface | None) -> str:
    """Return the interface by which our bytes went at an end, "sent" or "received"; "" if none has counted any.

    The expected one, if it has counted them: a bridge and its port count the same ones, and another interface may be
    busier with something else.
    """
    moved: Mapping[str, int] = getattr(traffic, end)
    if expected and moved.get(expected.name, 0) > _OWN_SHARE * traffic.num_bytes:
        return expected.name
    return max(moved, key=lambda name: moved[name], default="")


def kind_of(link: Measured, links: Links, hosts: Sequence[Probed]) -> LinkKind | None:
    """Return what kind of link this should be, by both ends; None: unknown."""
    near, far = interfaces_of(link, hosts)
    names = near.name if near else used(link.traffic_there, "sent", None), far.name if far else ""
    ends = zip((link.pair.rank, link.pair.other), names, strict=True)
    return slower_of(*(links.kinds[rank].get(name) for rank, name in ends))


def findings_of(links: Links, hosts: Sequence[Probed]) -> list[Finding]:
    """Return what is wrong with links, errors first."""
    found = [one for link in links.measured for one in _findings(link, kind_of(link, links, hosts), links, hosts)]
    return sorted(found, key=lambda one: one.weight != ERROR)


def _findings(link: Measured, kind: LinkKind | None, links: Links, hosts: Sequence[Probed]) -> Iterator[Finding]:
    host = hosts[link.pair.rank].host.ssh
    towards = f"{link.pair.address} of rank {link.pair.other} ({name_of(hosts, link.pair.other)})"
    if link.error:
        fix = "is the cable plugged in, is the interface up on both ends, does a firewall drop it?"
        yield Finding("link-down", host, f"{towards} can't be measured: {link.error}", fix)
    if link.there is None or link.back is None:
        return
    yield from _wrong_interface(link, links, hosts)
    there, back, small = link.there.best * 8, link.back.best * 8, link.round_trips[SIZES[0]]
    slower, faster = min(there, back), max(there, back)
    if kind and slower < kind.least_bits_per_s:
        found = f"{rate_of(slower)} Gbit/s to or from {towards}, over {kind.name}, which gives {rate_of(kind.usual_bits_per_s)}"
        fix = "is it the right cable and port, are the MTUs of both ends alike, does something else use the link?"
        yield Finding("link-slow", host, found, fix, WARNING)
    elif kind and small.median_s > kind.most_s:
        found = f"{ms_of(small.median_s)} ms to {towards} and back, over {kind.name}, which takes {ms_of(kind.usual_s)}"
        yield Finding("link-slow", host, found, "what lies between them: a VPN, a router, a busy machine?", WARNING)
    if faster > _MOST_LOPSIDED * slower and not (kind and slower >= kind.usual_bits_per_s):
        found = f"{rate_of(there)} Gbit/s to {towards}, but {rate_of(back)} back"
        fix = "give both ends the same MTU (9000 has cured it on Thunderbolt), or try another cable or port"
        yield Finding("link-lopsided", host, found, fix, WARNING)
    if small.p99_s > max(_MOST_JITTER * small.median_s, _LEAST_JITTER_S):
        found = (
            f"one round trip in a hundred to {towards} takes {ms_of(small.p99_s)} ms or more, the median"
            f" {ms_of(small.median_s)}: each token waits for the slowest"
        )
        yield Finding("link-jitter", host, found, "use a cable instead of Wi-Fi; end what else uses it", WARNING)


def _wrong_interface(link: Measured, links: Links, hosts: Sequence[Probed]) -> Iterator[Finding]:
    near, far = interfaces_of(link, hosts)
    rank, other = link.pair.rank, link.pair.other
    ways = ((rank, other, near, link.traffic_there), (other, rank, far, link.traffic_back))
    for sender, receiver, expected, traffic in ways:
        name = used(traffic, "sent", expected)
        if expected and name not in ("", expected.name):
            kinds = links.kinds[sender]
            found = (
                f"{show_bytes(traffic.num_bytes)} to rank {receiver} ({name_of(hosts, receiver)}) left by"
                f" {_with_kind(name, kinds)}, not by {_with_kind(expected.name, kinds)}, on whose network the link is"
            )
            fix = f"route them by {expected.name}: see there `ip route get` (macOS: route -n get), with the other's address"
            yield Finding("wrong-interface", hosts[sender].host.ssh, found, fix)
            return  # answers go back to wherever the questions came from


def _with_kind(name: str, kinds: Mapping[str, LinkKind]) -> str:
    return f"{name} ({kinds[name].name})" if name in kinds else name


def rate_of(bits_per_s: float) -> str:
    """Return bits per second as Gbit/s, with three digits."""
    value = bits_per_s / 1e9
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"


def ms_of(seconds: float) -> str:
    """Return seconds as milliseconds."""
    return f"{seconds * 1e3:.2f}"
