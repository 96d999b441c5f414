"""What `top` knows: of each host what it said last, and when; of a server its state. Pure: nothing is asked here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hippo_mpi.units import visible

SILENT_S = 1.5  # hosts speak every second
_LOOPBACK = ("lo", "lo0")
_MAX_INTERFACES = 64
_MAX_NUMBER = 1e18


@dataclass(frozen=True)
class Sample:
    """What a host said.

    Args:
        total_bytes: of memory.
        free_bytes: of memory.
        our_bytes: resident, of our processes.
        cpu: share of all cores that was busy.
        gpu: share of the GPU's time; None: unknown.
        links: bytes per second received and sent, by interface.
    """

    total_bytes: int
    free_bytes: int
    our_bytes: int
    cpu: float
    gpu: float | None
    links: Mapping[str, tuple[float, float]]

    @property
    def other_bytes(self) -> int:
        """Memory that neither is free nor ours."""
        return max(0, self.total_bytes - self.free_bytes - self.our_bytes)


def read_sample(message: Mapping[str, Any]) -> Sample:
    """Return what a host's line says.

    Raises:
        ValueError, LookupError, TypeError, AttributeError: it is no such line.
    """
    total, free, ours = (int(_number(message["memory"][name])) for name in ("total", "free", "ours"))
    links = list(message["links"].items())[:_MAX_INTERFACES]
    gpu = None if message["gpu"] is None else _number(message["gpu"])
    rates = {visible(name, 15): (_number(both[0]), _number(both[1])) for name, both in links}
    return Sample(total, free, ours, _number(message["cpu"]), gpu, rates)


def _number(value: Any) -> float:
    if not isinstance(value, int | float) or not 0 <= value < _MAX_NUMBER:
        raise ValueError(value)
    return float(value)


@dataclass
class HostState:
    """A host, as it changes.

    Args:
        name: for people.
        data: its interfaces for data; empty: unknown.
        sample: what it said last; None: nothing yet.
        heard_s: when, by our clock; before that, when it was first asked.
        why_lost: why its program doesn't run; empty: it does, or is being started.
    """

    name: str
    data: tuple[str, ...] = ()
    sample: Sample | None = None
    heard_s: float = 0.0
    why_lost: str = ""

    def hear(self, message: Mapping[str, Any], now_s: float) -> None:
        """Take a line of the host's; what isn't as expected is as if nothing was said."""
        try:
            self.sample = read_sample(message)
        except (ValueError, LookupError, TypeError, AttributeError):
            return
        self.heard_s, self.why_lost = now_s, ""

    def trouble(self, now_s: float) -> str:
        """Return what is wrong with it; "" if it speaks."""
        silent_s = now_s - self.heard_s
        if self.sample is None:
            return "no answer" if self.why_lost else "asked"
        return f"silent {silent_s:.0f} s" if silent_s > SILENT_S else ""

    def links(self) -> list[tuple[str, float, float]]:
        """Return the data interfaces, or else the busiest one, with bytes per second received and sent."""
        found = self.sample.links if self.sample else {}
        known = [name for name in self.data if name in found]
        others = [name for name in found if name not in _LOOPBACK and any(found[name])]
        busiest = sorted(others, key=lambda name: -sum(found[name]))[:1]
        return [(name, *found[name]) for name in known or busiest]


@dataclass(frozen=True)
class RankState:
    """A rank of a server: its host, its layers [start, stop), its busy share, and the milliseconds of a hop to it."""

    host: str
    layers: tuple[int, int]
    busy: float = 0.0
    hop_ms: float = 0.0


@dataclass
class ServerState:
    """A server, as it changes.

    Args:
        line: its state in words.
        ranks: what each does; empty: unknown.
        tokens_per_s: that it generated in the last second or so; None: unknown.
    """

    line: str = "asked"
    ranks: Sequence[RankState] = ()
    tokens_per_s: float | None = None
    _before: Mapping[str, Any] = field(default_factory=dict)
    _tokens: tuple[float, float] | None = None

    def hear(self, status: Mapping[str, Any]) -> None:
        """Take what GET /ready says."""
        try:
            self.ranks = _ranks(status, self._before)
            model = visible(str(status.get("model", "")), 60)
            counts = f"{_number(status['running']):,.0f} running, {_number(status['waiting']):,.0f} waiting"
        except (ValueError, LookupError, TypeError, AttributeError):
            self.fail("its answer can't be read")
            return
        state = "" if status.get("ready") else f"not ready: {visible(str(status.get('state', '')))}; "
        self.line = f"{state}{f'{model}, ' if model else ''}{counts}"
        self._before = status

    def hear_tokens(self, count: float, now_s: float) -> None:
        """Take how many tokens it has generated since its start."""
        if self._tokens and self._tokens[0] <= count and now_s > self._tokens[1]:
            self.tokens_per_s = (count - self._tokens[0]) / (now_s - self._tokens[1])
        self._tokens = count, now_s

    def fail(self, why: str) -> None:
        """Say why nothing is known."""
        self.line, self.ranks, self.tokens_per_s, self._tokens = visible(why), (), None, None


def _ranks(status: Mapping[str, Any], before: Mapping[str, Any]) -> list[RankState]:
    """Return the ranks of an answer, with what they did since the one before."""
    passed_s = _number(status.get("beat_s", 0.0)) - _number(before.get("beat_s", 0.0))
    now, earlier = status.get("now", []), before.get("now", [])
    found = []
    for rank, about in enumerate(status.get("ranks", [])):
        start, stop = (int(_number(one)) for one in about["layers"])
        busy = hop_ms = 0.0
        if passed_s > 0 and rank < len(now) and rank < len(earlier) and now[rank] and earlier[rank]:
            grown = {
                name: _number(now[rank][name]) - _number(earlier[rank][name])
                for name in ("busy_s", "hop_s", "num_hops")
            }
            busy = min(1.0, max(0.0, grown["busy_s"] / passed_s))
            hop_ms = 1e3 * max(0.0, grown["hop_s"]) / grown["num_hops"] if grown["num_hops"] > 0 else 0.0
        found.append(RankState(visible(str(about["host"]), 40), (start, stop), busy, hop_ms))
    return found
