"""Times things several times, as long as that is worth it, and equally often on every rank.

Speeds range over five orders of magnitude: a number of tries that is right for one machine takes minutes on another.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx

from hippo_mpi.transport.collective import Collective

Run = Callable[[], float]
"""Does once what is timed; returns its seconds."""

_LEAST_TRIES = 3  # the first one is a warm-up
_LONGEST_TRY_S = 4.0


@dataclass(frozen=True)
class Effort:
    """How long something is tried.

    Args:
        seconds: in which as many tries are made as fit, but three at least.
        most_tries: that are made.
    """

    seconds: float
    most_tries: int


_ROUGH = Effort(3600.0, 4)  # four tries, so that one pause of a rank decides nothing


def by_size(
    runs: Sequence[Callable[[float], Sequence[Run]]],
    sizes: Sequence[int],
    efforts: Mapping[int, Effort],
    collective: Collective,
    on_progress: Callable[[], None],
) -> list[list[float]]:
    """Return the median seconds of each run, by size.

    Where a try would take too long, or no effort is asked for, the times are those of the nearest place, and grow as the
    sizes do.

    Args:
        runs: what makes those of each size, given the seconds that one of them may be expected to take.
        sizes: how much there is to compute.
        efforts: how long to try, by place in `sizes`.
        collective: what the ranks' parts add up with.
        on_progress: called after each try.
    """
    near, near_size = in_turn(runs[0](math.inf), _ROUGH, collective, on_progress), sizes[0]
    found: dict[int, list[float]] = {}
    for place in sorted(efforts):
        growth = sizes[place] / near_size
        if growth > 1 and growth * agreed(sum(near), collective) > _LONGEST_TRY_S:
            near = [growth * seconds for seconds in near]
        else:
            expected_s = growth * agreed(max(near), collective)
            near = in_turn(runs[place](expected_s), efforts[place], collective, on_progress)
        near_size, found[place] = sizes[place], near
    nearest = [min(found, key=lambda tried: abs(tried - place)) for place in range(len(sizes))]
    return [
        [size / sizes[tried] * seconds for seconds in found[tried]] for size, tried in zip(sizes, nearest, strict=True)
    ]


def in_turn(
    runs: Sequence[Run], effort: Effort, collective: Collective, on_progress: Callable[[], None]
) -> list[float]:
    """Return the median seconds of each run; they take turns, so that what slows them down hits all.

    Args:
        runs: that are timed.
        effort: how long to try; every rank tries as often.
        collective: what the ranks' parts add up with.
        on_progress: called after each run.
    """
    tries: list[list[float]] = []
    num_tries = _LEAST_TRIES
    while len(tries) < num_tries:
        began, seconds = time.perf_counter(), []
        for run in runs:
            seconds.append(run())
            on_progress()
        tries.append(seconds)
        if len(tries) == 2:  # after the warm-up
            fitting = int(effort.seconds / agreed(time.perf_counter() - began, collective))
            num_tries = min(max(fitting, _LEAST_TRIES), effort.most_tries)
    return [statistics.median(trials) for trials in zip(*tries[1:], strict=True)]


def agreed(own: float, collective: Collective) -> float:
    """Return the mean of what the ranks have found, in the same bits on each."""
    collective.begin(notes=False)
    total, num_ranks = collective.sum(mx.array([own, 1.0])).tolist()  # type: ignore[misc]
    return float(total / num_ranks)  # type: ignore[operator,arg-type]
