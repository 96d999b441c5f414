"""What each rank was doing, when: busy shares, and a trace that Perfetto opens.

The workers say what they begin to do ("computing step 7 ...", a kind of activity) to their progress callback; a timeline
listens.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from hippo_mpi.transport.pulse import Activity, Progress


@dataclass(frozen=True)
class Mark:
    """What a rank began to do, and when, in seconds of the wall clock."""

    at_s: float
    doing: str
    activity: Activity


class Timeline:
    """A progress callback that notes what it is told, and passes it on.

    Args:
        progress: who is told, too.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._marks: list[Mark] | None = None
        self._busy_s, self._busy_since = 0.0, 0.0

    def __call__(self, doing: str, activity: Activity = Activity.OTHER) -> None:
        """Note what begins, and pass it on."""
        self._account(activity)
        if self._marks is not None:
            self._marks.append(Mark(time.time(), doing, activity))
        self._progress(doing, activity)

    def pause(self) -> None:
        """Count what comes next, until the next mark, as no work."""
        self._account(Activity.WAITING)

    @property
    def busy_s(self) -> float:
        """Seconds of work so far: all but waiting."""
        since = self._busy_since
        return self._busy_s + (time.perf_counter() - since if since else 0.0)

    def _account(self, activity: Activity) -> None:
        now = time.perf_counter()
        if self._busy_since:
            self._busy_s += now - self._busy_since
        self._busy_since = 0.0 if activity == Activity.WAITING else now

    def start(self) -> None:
        """Begin to note marks."""
        self._marks = []

    def stop(self) -> list[Mark]:
        """Return what was noted since `start`; the last mark ends it."""
        marks, self._marks = self._marks or [], None
        return [*marks, Mark(time.time(), "end", Activity.OTHER)]


def busy_shares(marks_by_rank: list[list[Mark]]) -> list[dict[str, float]]:
    """Return, for each rank, the share of rank 0's time that went to each activity."""
    begin_s, end_s = marks_by_rank[0][0].at_s, marks_by_rank[0][-1].at_s
    shares = []
    for marks in marks_by_rank:
        by_activity: dict[str, float] = {}
        for mark, following in pairwise(marks):
            took_s = max(0.0, min(following.at_s, end_s) - max(mark.at_s, begin_s))
            by_activity[mark.activity] = by_activity.get(mark.activity, 0.0) + took_s / max(end_s - begin_s, 1e-9)
        shares.append(by_activity)
    return shares


def trace_events(marks_by_rank: list[list[Mark]]) -> dict[str, Any]:
    """Return a Chrome trace: a process per rank, times in microseconds."""
    events: list[dict[str, Any]] = []
    for rank, marks in enumerate(marks_by_rank):
        events.append({"name": "process_name", "ph": "M", "pid": rank, "args": {"name": f"rank {rank}"}})
        for mark, following in pairwise(marks):
            span = {"name": mark.doing, "cat": mark.activity, "ph": "X", "pid": rank, "tid": 0}
            events.append({**span, "ts": mark.at_s * 1e6, "dur": (following.at_s - mark.at_s) * 1e6})
    return {"traceEvents": events}
