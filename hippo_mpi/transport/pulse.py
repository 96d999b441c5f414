"""Tracks a rank's own progress, so that a slow rank isn't taken for a dead one.

The main thread notes what it does; the watch thread asks whether there is progress. Three things move a deadline:
something was finished; the process uses the CPU for something other than waiting (a step of a big model can take
minutes on a CPU); and steps are known to take that long (on a GPU, a working process uses no CPU).
"""

from __future__ import annotations

import time
from enum import StrEnum
from typing import Protocol


class Activity(StrEnum):
    """A kind of what a rank does."""

    COMPUTING = "computing"
    """A step: how long these take tells how long the next one may."""
    TOGETHER = "computing together"
    """A step inside which ranks wait for each other, and use the CPU meanwhile."""
    FINISHING = "finishing"
    """A step whose graph was built before."""
    WAITING = "waiting"
    """For another rank, or for people: no work."""
    OTHER = "other"


class Progress(Protocol):
    """Told when something was finished, and what comes next, in words and by its kind."""

    def __call__(self, doing: str, activity: Activity = Activity.OTHER, /) -> None:
        """Take note."""


_STEPS = (Activity.COMPUTING, Activity.TOGETHER, Activity.FINISHING)
_WORKING_SHARE = 0.05  # of a core; reached even beside nine busy processes on two cores; an idle rank takes 0.002
_MAX_DEADLINES = 100  # that one thing may take while it uses the CPU: so an endless loop ends, too
_MAX_DEADLINES_TOGETHER = 4  # the same where a rank that only waits uses it, too


class Pulse:
    """This rank's progress.

    Args:
        timeout_s: seconds that a rank may go without progress.

    Attributes:
        count: how many things have been finished.
        doing, activity: what is being done.
        is_idle: whether nothing is due.
        longest_s: seconds of the longest step so far.
    """

    def __init__(self, timeout_s: float) -> None:
        self.count, self.is_idle = 0, False
        self.doing, self.activity = "starting", Activity.OTHER
        self.longest_s = 0.0
        self._timeout_s = timeout_s
        self._began_s = self._looked_s = time.monotonic()
        self._cpu_s = time.process_time()

    def progress(self, doing: str, activity: Activity = Activity.OTHER) -> None:
        """Note that something was finished and `doing` begins."""
        now = time.monotonic()
        if self.activity in _STEPS:
            self.longest_s = max(self.longest_s, now - self._began_s)
        self._began_s, self.is_idle = now, False
        self.doing, self.activity = doing, activity
        self.count += 1

    def idle(self) -> None:
        """Note that nothing is due until the next `progress`."""
        self.doing, self.activity, self.is_idle = "idle", Activity.WAITING, True

    def is_working(self) -> bool:
        """Return whether the CPU was used since the last call, for something that hasn't taken too long yet."""
        now, cpu_s = time.monotonic(), time.process_time()
        share = (cpu_s - self._cpu_s) / max(now - self._looked_s, 1e-9)
        self._looked_s, self._cpu_s = now, cpu_s
        deadlines = _MAX_DEADLINES_TOGETHER if self.activity == Activity.TOGETHER else _MAX_DEADLINES
        may_last = now - self._began_s < deadlines * self._timeout_s
        return may_last and not self.is_idle and self.activity != Activity.WAITING and share > _WORKING_SHARE
