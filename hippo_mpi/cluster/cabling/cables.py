"""Which Macs are joined by which cables, and the longest ring that these make. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from hippo_mpi.cluster.asking.macos import MacFacts
from hippo_mpi.cluster.asking.thunderbolt import Port

_MOST_STEPS = 50_000  # of a search; six Macs, each joined with all, take some hundreds
Pair = tuple[int, int]
"""Two Macs, the lower number first."""


@dataclass(frozen=True)
class End:
    """An end of a cable: a port of a Mac, by the Mac's number."""

    host: int
    port: Port


@dataclass(frozen=True)
class Cable:
    """A cable between two Macs, the lower number first.

    Args:
        ends: both.
        gbps: the rate that both agree on, in Gbit/s; None: unknown.
        behind: a dock or hub in between; None: none is.
    """

    ends: tuple[End, End]
    gbps: int | None = None
    behind: str | None = None

    @property
    def pair(self) -> Pair:
        """Return the Macs."""
        return self.ends[0].host, self.ends[1].host

    def end_at(self, host: int) -> End:
        """Return the end at one of its Macs."""
        return self.ends[0] if self.ends[0].host == host else self.ends[1]


def _sights(macs: Sequence[MacFacts | None]) -> Iterator[tuple[End, End, str | None]]:
    """Return each port that sees another, that other, and the dock or hub in between."""
    ends = [End(host, port) for host, mac in enumerate(macs) if mac for port in mac.ports or ()]
    owners: dict[str, End] = {}
    for end in ends:
        if end.port.domain:
            owners.setdefault(end.port.domain, end)
    for end in ends:
        for neighbor in end.port.neighbors:
            other = owners.get(neighbor.domain)
            if other and other.host != end.host and end.port.domain:
                yield end, other, neighbor.behind


def cables_of(macs: Sequence[MacFacts | None]) -> list[Cable]:
    """Return the cables between Macs: those that both ends see, or that one sees through a dock or hub.

    Args:
        macs: what each says; None: it is no Mac, or hasn't answered.
    """
    seen: dict[tuple[End, End], dict[int, str | None]] = {}
    for end, other, dock in _sights(macs):
        ends = (end, other) if end.host < other.host else (other, end)
        seen.setdefault(ends, {})[end.host] = dock
    found = []
    for ends, sights in seen.items():
        behind = next(filter(None, sights.values()), None)
        if len(sights) == 2 or behind:
            rates = [end.port.linked_gbps for end in ends if end.port.linked_gbps]
            found.append(Cable(ends, min(rates, default=None), behind))
    return sorted(found, key=lambda one: [(end.host, end.port.interface or "") for end in one.ends])


def one_sided(macs: Sequence[MacFacts | None]) -> list[tuple[End, End]]:
    """Return each port that sees another directly, and that other, which doesn't see it."""
    sights = list(_sights(macs))
    both = {(end, other) for end, other, _ in sights}
    return [(end, other) for end, other, dock in sights if (other, end) not in both and not dock]


def usable(cables: Sequence[Cable]) -> dict[Pair, list[Cable]]:
    """Return the cables of each pair whose interfaces are known: those without a dock, if there are any."""
    found: dict[Pair, list[Cable]] = {}
    for cable in cables:
        if all(end.port.interface for end in cable.ends):
            found.setdefault(cable.pair, []).append(cable)
    return {pair: [one for one in among if not one.behind] or among for pair, among in found.items()}


def longest_ring(count: int, pairs: Collection[Pair]) -> tuple[int, ...]:
    """Return a longest cycle that begins with number 0, of pairs that are joined; two that are joined are one.

    Of several, the one whose numbers come first.
    """
    near = [[other for other in range(count) if (min(one, other), max(one, other)) in pairs] for one in range(count)]
    best: tuple[int, ...] = (0,)
    steps = 0
    path = [0]
    left = [iter(near[0])]
    while left and len(best) < count and steps < _MOST_STEPS:
        steps += 1
        following = next(left[-1], None)
        if following is None:
            left.pop()
            path.pop()
        elif following == 0:
            best = max(best, tuple(path), key=len)
        elif following not in path:
            path.append(following)
            left.append(iter(near[following]))
    return best


def closing_pair(count: int, pairs: Collection[Pair]) -> Pair | None:
    """Return two Macs that a cable must join to make a ring of all; None: one cable isn't enough."""
    missing = (pair for pair in combinations(range(count), 2) if pair not in pairs)
    return next((pair for pair in missing if len(longest_ring(count, {*pairs, pair})) == count), None)
