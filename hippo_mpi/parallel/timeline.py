"""What each rank was doing, when: busy shares, and a trace that Perfetto opens.

The workers say what they begin to do ("computing step 7 ...") to their progress callback; a timeline listens.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from hippo_mpi.transport.pulse import WAITING

Mark = tuple[float, str]
"""(seconds of the wall clock, what began)"""


class Timeline:
    """A progress callback that notes what it is told, and passes it on.

    Args:
        progress: who is told, too.
    """

    def __init__(self, progress: Callable[[str], None]) -> None:
        self._progress = progress
        self._marks: list[Mark] | None = None
        self._busy_s, self._busy_since = 0.0, 0.0

    def __call__(self, doing: str) -> None:
        self._account(doing)
        if self._marks is not None:
            self._marks.append((time.time(), doing))
        self._progress(doing)

    def pause(self) -> None:
        """What comes next until the next mark is no work."""
        self._account(WAITING)

    @property
    def busy_s(self) -> float:
        """Seconds of work so far: all but waiting."""
        since = self._busy_since
        return self._busy_s + (time.perf_counter() - since if since else 0.0)

    def _account(self, doing: str) -> None:
        now = time.perf_counter()
        if self._busy_since:
            self._busy_s += now - self._busy_since
        self._busy_since = 0.0 if doing.startswith(WAITING) else now

    def start(self) -> None:
        self._marks = []

    def stop(self) -> list[Mark]:
        """What was noted since `start`; the last mark ends it."""
        found, self._marks = self._marks or [], None
        return [*found, (time.time(), "end")]


def busy_shares(marks_by_rank: list[list[Mark]]) -> list[dict[str, float]]:
    """For each rank, the share of rank 0's time that went to each kind of doing (the first word of a mark)."""
    begin, end = marks_by_rank[0][0][0], marks_by_rank[0][-1][0]
    shares = []
    for marks in marks_by_rank:
        found: dict[str, float] = {}
        for (start, doing), (stop, _) in pairwise(marks):
            kind = doing.split()[0]
            took_s = max(0.0, min(stop, end) - max(start, begin))
            found[kind] = found.get(kind, 0.0) + took_s / max(end - begin, 1e-9)
        shares.append(found)
    return shares


def trace_events(marks_by_rank: list[list[Mark]]) -> dict[str, Any]:
    """A Chrome trace: a process per rank, times in microseconds."""
    events: list[dict[str, Any]] = []
    for rank, marks in enumerate(marks_by_rank):
        events.append({"name": "process_name", "ph": "M", "pid": rank, "args": {"name": f"rank {rank}"}})
        for (start, doing), (stop, _) in pairwise(marks):
            span = {"name": doing, "cat": doing.split()[0], "ph": "X", "pid": rank, "tid": 0}
            events.append({**span, "ts": start * 1e6, "dur": (stop - start) * 1e6})
    return {"traceEvents": events}
