"""Times things several times, as long as that is worth it, and equally often on every rank.

Speeds range over five orders of magnitude: a number of tries that is right for one machine takes minutes on another.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
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


def by_size(
    runs: Sequence[Callable[[], Sequence[Run]]],
    sizes: Sequence[int],
    efforts: Sequence[Effort],
    collective: Collective,
    on_progress: Callable[[], None],
) -> list[list[float]]:
    """Return the median seconds of each run, by size.

    Where a try would take too long, its times are those of the size before, and grow as the sizes do.

    Args:
        runs: what makes those of each size.
        sizes: how much there is to compute.
        efforts: how long to try each size.
        collective: what the ranks' parts add up with.
        on_progress: called after each try.
    """
    found: list[list[float]] = []
    for place, effort in enumerate(efforts):
        growth = sizes[place] / sizes[place - 1] if found else 0.0
        if found and growth * agreed(sum(found[-1]), collective) > _LONGEST_TRY_S:
            found.append([growth * seconds for seconds in found[-1]])
        else:
            found.append(in_turn(runs[place](), effort, collective, on_progress))
    return found


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
