"""Measures links between hosts: a program on each end, round trips, rates, and by which interfaces the bytes went."""

from __future__ import annotations

import asyncio
import secrets
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hippo_mpi.cluster.link.link_end import CONNECT_S, WAIT_S
from hippo_mpi.cluster.programs.host_program import HostLost, HostProgram
from hippo_mpi.units import visible

SIZES = (64, 8 << 10)
STREAMS = (1, 4)
_ROUND_TRIPS = 400
_MAX_PING_S = 10.0  # on slow links there are fewer
_MAX_NAME, _MAX_NUMBER = 40, 1e18  # of what hosts say
_SPARE_S = CONNECT_S + WAIT_S + 10.0  # beyond what an end was told to take


@dataclass(frozen=True)
class Pair:
    """Two ranks, and the address of the second that the first calls."""

    rank: int
    other: int
    address: str


@dataclass(frozen=True)
class RoundTrips:
    """Seconds of round trips.

    Args:
        median_s: as a rank would wait, with the time that programs on both ends take to wake up.
        p95_s, p99_s: what 95 and 99 of a hundred don't exceed.
        count: of them.
        least_s: of the fastest one, which is nearest to what the link itself takes.
    """

    median_s: float
    p95_s: float
    p99_s: float
    count: int
    least_s: float

    @classmethod
    def of(cls, times: Sequence[float]) -> RoundTrips:
        """Return the figures of some times.

        Raises:
            OSError: there are too few.
        """
        if len(times) < 2:
            raise OSError("no round trip came to an end")
        ordered = sorted(times)
        p95, p99 = (ordered[len(ordered) * percent // 100] for percent in (95, 99))
        return cls(statistics.median(ordered), p95, p99, len(ordered), ordered[0])


@dataclass(frozen=True)
class Traffic:
    """Bytes in one direction: those that we sent, and what the interfaces of both ends have counted meanwhile."""

    num_bytes: int = 0
    sent: Mapping[str, int] = field(default_factory=dict)
    received: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Rate:
    """Bytes per second: of one connection, of several, and of one while all neighbors send; None: not measured."""

    one: float
    several: float
    at_once: float | None = None

    @property
    def best(self) -> float:
        """What the link can, in this direction."""
        return max(self.one, self.several)


@dataclass(frozen=True)
class Measured:
    """What was found about a link.

    Args:
        pair: its ends.
        error: why it couldn't be measured, or ""; then there is nothing else.
        round_trips: by bytes of the message.
        there: from the first rank to the second.
        back: the other way.
        traffic_there: where the bytes went.
        traffic_back: the other way.
        loaded: round trips of small messages while all neighbors send; None: not measured.
    """

    pair: Pair
    error: str = ""
    round_trips: Mapping[int, RoundTrips] = field(default_factory=dict)
    there: Rate | None = None
    back: Rate | None = None
    traffic_there: Traffic = field(default_factory=Traffic)
    traffic_back: Traffic = field(default_factory=Traffic)
    loaded: RoundTrips | None = None


Ends = tuple[HostProgram, HostProgram]


async def measure_alone(ends: Ends, pair: Pair, seconds: float) -> Measured:
    """Measure a link while nothing else is on it; `seconds` for each rate."""
    try:
        round_trips = {}
        for size in SIZES:
            found, _ = await _run(ends, pair, ("ping", "echo"), 1, _MAX_PING_S, size=size, count=_ROUND_TRIPS)
            round_trips[size] = RoundTrips.of(_numbers(found.get("times")))
        snapshots, rates = [await _counters(ends)], []
        for roles in (("send", "receive"), ("receive", "send")):
            for streams in STREAMS:
                found = (await _run(ends, pair, roles, streams, seconds))[roles.index("receive")]
                rates.append(_number(found.get("bytes_per_s")))
            snapshots.append(await _counters(ends))
    except HostLost as lost:
        return Measured(pair, str(lost))
    except OSError as error:
        return Measured(pair, str(error))
    before, between, after = snapshots
    num_there, num_back = (int(sum(both) * seconds) for both in (rates[:2], rates[2:]))
    there = Traffic(num_there, _moved(before[0], between[0], 1), _moved(before[1], between[1], 0))
    back = Traffic(num_back, _moved(between[1], after[1], 1), _moved(between[0], after[0], 0))
    return Measured(pair, "", round_trips, Rate(*rates[:2]), Rate(*rates[2:]), there, back)


async def measure_at_once(
    links: Sequence[Measured], programs: Sequence[HostProgram | None], seconds: float
) -> list[Measured]:
    """Measure what is left of each link while all are used in the ring's direction; add it to what was found of them."""
    return list(await asyncio.gather(*(_measure_loaded(link, programs, seconds) for link in links)))


async def _measure_loaded(link: Measured, programs: Sequence[HostProgram | None], seconds: float) -> Measured:
    one, other = programs[link.pair.rank], programs[link.pair.other]
    if link.error or one is None or other is None or link.there is None:
        return link
    try:
        sending = _run((one, other), link.pair, ("send", "receive"), 1, seconds)
        asking = _run((one, other), link.pair, ("ping", "echo"), 1, seconds, size=SIZES[0], count=_ROUND_TRIPS)
        (_, received), (asked, _) = await asyncio.gather(sending, asking)
        rate = replace(link.there, at_once=_number(received.get("bytes_per_s")))
        return replace(link, there=rate, loaded=RoundTrips.of(_numbers(asked.get("times"))))
    except HostLost as lost:
        return replace(link, error=str(lost))
    except OSError as error:
        return replace(link, error=f"with all neighbors at once: {error}")


async def _run(
    ends: Ends, pair: Pair, roles: tuple[str, str], streams: int, seconds: float, **settings: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Let both ends do something over connections from the first to the second; return what each says.

    Raises:
        OSError: one of them couldn't; the other is left to its own deadline.
        HostLost: one doesn't answer.
    """
    one, other = ends
    port = (await other.ask(_SPARE_S, do="listen", address=pair.address)).get("port")
    if not isinstance(port, int) or not 0 < port < 1 << 16:
        raise OSError("its answer can't be read")
    told = {"port": port, "token": secrets.token_hex(32), "streams": streams, "seconds": seconds, **settings}
    limit_s = seconds + _SPARE_S
    calling = asyncio.ensure_future(one.ask(limit_s, do="call", address=pair.address, role=roles[0], **told))
    accepting = asyncio.ensure_future(other.ask(limit_s, do="accept", role=roles[1], **told))
    try:
        await asyncio.wait([calling, accepting], return_when="FIRST_EXCEPTION")
        for ended in (calling, accepting):
            if ended.done():
                ended.result()
        return calling.result(), accepting.result()
    finally:
        calling.cancel()
        accepting.cancel()
        await asyncio.gather(calling, accepting, return_exceptions=True)


async def _counters(ends: Ends) -> list[dict[str, Any]]:
    return list(await asyncio.gather(*(one.ask(_SPARE_S, do="counters") for one in ends)))


def _moved(before: Mapping[str, Any], after: Mapping[str, Any], column: int) -> dict[str, int]:
    """Return by how much each interface's counter has grown."""
    found = {}
    for name in before.keys() & after.keys():
        grown = int([*_numbers(after[name]), 0, 0][column] - [*_numbers(before[name]), 0, 0][column])
        if grown > 0:
            found[visible(name, _MAX_NAME)] = grown
    return found


def _numbers(value: Any) -> list[float]:
    if not isinstance(value, list) or not all(isinstance(one, int | float) and 0 <= one < _MAX_NUMBER for one in value):
        raise OSError("its answer can't be read")
    return value


def _number(value: Any) -> float:
    return _numbers([value])[0]
