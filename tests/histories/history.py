"""Histories: from a seed, which streams are asked for when, and what befalls the server meanwhile. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from tests.histories.kinds import KINDS, NUM_VARIANTS

_SPAN_S = 3.0  # in which streams and faults begin
_LEAVES, _IN_RECOVERY = 0.15, 0.5  # shares of streams whose client goes away, and of faults that follow another


@dataclass(frozen=True)
class Stream:
    """A request at `starts_s` into its history; its client goes away after `leaves_after` events (None: never)."""

    kind: str
    variant: int
    starts_s: float
    leaves_after: int | None = None


@dataclass(frozen=True)
class Fault:
    """What befalls `rank` (or the disk, or the model) at `at_s`, for `lasts_s` where it passes.

    Args:
        in_recovery: it waits until the ranks are gone, and `at_s` counts from there.
    """

    kind: str
    rank: int
    at_s: float
    lasts_s: float = 0.0
    in_recovery: bool = False


FAULT_KINDS = {
    "kill": 0.0, "raise": 0.0, "cut": 0.0, "half cut": 0.0, "stop": 6.0, "slow": 4.0, "silent": 6.0, "full disk": 12.0, "swap": 0.0,
}  # fmt: skip
"""Kinds of faults, and how many seconds they last at most; 0: for good."""


@dataclass(frozen=True)
class History:
    seed: int
    streams: tuple[Stream, ...]
    faults: tuple[Fault, ...]

    def __str__(self) -> str:
        """In one line, to be told beside its seed."""
        streams = ", ".join(f"{one.kind}/{one.variant}" for one in self.streams)
        faults = ", ".join(
            f"{one.kind} {one.rank} {'then ' if one.in_recovery else ''}at {one.at_s:.2f} s"
            + (f" for {one.lasts_s:.2f} s" if one.lasts_s else "")
            for one in self.faults
        )
        return f"seed {self.seed}: {faults or 'no fault'} | {streams}"


def draw_history(
    seed: int, num_streams: int = 8, num_ranks: int = 2, kinds: Sequence[str] = tuple(FAULT_KINDS)
) -> History:
    """The history of a seed; other `kinds` of faults give other histories."""
    draw = Random(seed)
    streams = tuple(
        Stream(
            draw.choice(list(KINDS)),
            draw.randrange(NUM_VARIANTS),
            round(draw.uniform(0, _SPAN_S) if draw.random() < 0.5 else 0.0, 3),
            draw.randint(1, 40) if draw.random() < _LEAVES else None,
        )
        for _ in range(num_streams)
    )
    faults: list[Fault] = []
    for _ in range(draw.choice((1, 1, 2, 2, 3))):
        kind, in_recovery = draw.choice(list(kinds)), bool(faults) and draw.random() < _IN_RECOVERY
        lasts_s = round(draw.uniform(0.05, FAULT_KINDS[kind]), 3) if FAULT_KINDS[kind] else 0.0
        faults.append(Fault(kind, draw.randrange(num_ranks), round(draw.uniform(0, _SPAN_S), 3), lasts_s, in_recovery))
    return History(seed, streams, tuple(faults))
