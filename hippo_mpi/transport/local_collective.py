"""Sums without other processes: between ranks that run in this one, or with ranks that aren't there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, TypeVar

import mlx.core as mx
from greenlet import getcurrent, greenlet

from hippo_mpi.errors import DesyncError
from hippo_mpi.transport.collective import Collective

_T = TypeVar("_T")


class LocalCollective(Collective):
    """Sums between ranks that are greenlets of `run_ranks`."""

    def sum(self, part: mx.array) -> mx.array:
        """Return the sum of all ranks' parts."""
        return self._ask(part, part.shape, lambda parts: reduce(mx.add, parts))

    def gather(self, part: mx.array, widths: Sequence[int]) -> mx.array:
        """Return all ranks' parts side by side."""
        return self._ask(part, (*part.shape[:-1], *widths), lambda parts: mx.concatenate(parts, -1))

    def note(self, choices: mx.array) -> None:
        """Do nothing: one processor rounds in one way."""

    def _ask(self, part: mx.array, shape: tuple[int, ...], operation: Callable[[list[mx.array]], mx.array]) -> mx.array:
        asker = hub = getcurrent()
        while hub.parent is not None:  # a rank may run code in greenlets of its own
            hub = hub.parent
        found: mx.array = hub.switch(_Asked(asker, part, shape, operation))
        return found


@dataclass(frozen=True)
class _Asked:
    """What a rank of `run_ranks` waits for."""

    asker: greenlet
    part: mx.array
    shape: tuple[int, ...]
    operation: Callable[[list[mx.array]], mx.array]


def run_ranks(ranks: Sequence[Callable[[], _T]]) -> list[_T]:
    """Run a function for each rank, all in this process; sums are made when every rank has asked for one.

    Raises:
        DesyncError: ranks ask for sums of different shapes, or one ends while others wait for a sum.
    """
    results: list[Any] = [None] * len(ranks)

    def run(rank: int) -> None:
        results[rank] = ranks[rank]()

    running = [greenlet(run) for _ in ranks]
    asked: list[_Asked | None] = [rank.switch(number) for number, rank in enumerate(running)]
    while any(asked):
        waiting = [one for one in asked if one is not None]
        shapes = [None if one is None else one.shape for one in asked]
        if len(set(shapes)) > 1:
            raise DesyncError(f"ranks add up different arrays: {shapes}")
        found = waiting[0].operation([one.part for one in waiting])
        asked = [one.asker.switch(found) for one in waiting]
    return results


class AbsentRanks(Collective):
    """Stands in for ranks that aren't there: what it returns has the right shape, at once."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def sum(self, part: mx.array) -> mx.array:
        """Return the rank's own part."""
        return part

    def note(self, choices: mx.array) -> None:
        """Do nothing: there is nobody to differ from."""

    def gather(self, part: mx.array, widths: Sequence[int]) -> mx.array:
        """Return the rank's own part beside zeros."""
        before, behind = sum(widths[: self._rank]), sum(widths[self._rank + 1 :])
        return mx.pad(part, [(0, 0)] * (part.ndim - 1) + [(before, behind)])


class CountingRanks(AbsentRanks):
    """Counts what a rank gives.

    Attributes:
        sizes: how many values it gave to each sum or gather.
    """

    def __init__(self, rank: int) -> None:
        super().__init__(rank)
        self.sizes: list[int] = []

    def sum(self, part: mx.array) -> mx.array:
        """Return the rank's own part, counted."""
        self.sizes.append(part.size)
        return super().sum(part)

    def gather(self, part: mx.array, widths: Sequence[int]) -> mx.array:
        """Return the rank's own part, counted, beside zeros."""
        self.sizes.append(part.size)
        return super().gather(part, widths)
