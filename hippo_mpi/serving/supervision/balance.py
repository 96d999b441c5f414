"""Whether the ranks share the work evenly: from what each has worked to a better layer split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from hippo_mpi.errors import PlanError
from hippo_mpi.planning.layer_split import LayerSplit, plan_split

_LEAST_GAIN = 0.1  # less isn't worth a start
_WINDOW_S = 60.0  # of work of the busiest rank


@dataclass(frozen=True)
class BetterSplit:
    """Layers per rank, and how much faster the slowest rank would be with them, as a share of its time."""

    counts: list[int]
    gain: float


class WorkWindow:
    """Adds up what each rank works, until the busiest has worked for a minute."""

    def __init__(self) -> None:
        self._life = 0
        self._since_s: list[float] = []

    def note(self, life: int, busy_s: Sequence[float]) -> list[float] | None:
        """Return the seconds that each rank has worked in the window that ends now; None if it goes on.

        Args:
            life: number of the ranks' start, with which sums begin anew.
            busy_s: seconds that each rank has worked since then.
        """
        if life != self._life or len(busy_s) != len(self._since_s):
            self._life, self._since_s = life, [*busy_s]
            return None
        worked_s = [now - before for now, before in zip(busy_s, self._since_s, strict=True)]
        if max(worked_s) < _WINDOW_S:
            return None
        self._since_s = [*busy_s]
        return worked_s


def may_be_better(worked_s: Sequence[float]) -> bool:
    """Return whether any split could be at least a tenth faster: with each, the slowest rank works the mean at least."""
    return 1 - sum(worked_s) / len(worked_s) / max(worked_s) >= _LEAST_GAIN


def better_split(split: LayerSplit, worked_s: Sequence[float]) -> BetterSplit | None:
    """Return a split that would be at least a tenth faster; None if there is none.

    Args:
        split: the present one.
        worked_s: seconds that each rank has worked in the same time.
    """
    if min(worked_s) <= 0:
        return None
    machines = [
        replace(stage.machine, speed=stage.machine.speed * stage.work / worked)
        for stage, worked in zip(split.stages, worked_s, strict=True)
    ]
    try:
        better = plan_split(split.info, machines, split.max_context)
    except PlanError:  # the present one was given by hand, and fits no longer
        return None
    gain = 1 - max(stage.work for stage in better.stages) / max(worked_s)
    return BetterSplit(better.counts, gain) if gain >= _LEAST_GAIN else None
