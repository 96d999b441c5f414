"""What the ranks last said of themselves, and when: whether ranks that are there make progress."""

from __future__ import annotations

import time

from hippo_mpi.serving.supervision.messages import Beat
from hippo_mpi.transport.rank_status import RankStatus

_MAX_SILENT_S = 5.0  # of rank 0, which reports twice a second


class LastBeat:
    """The last beat of rank 0; without ranks there is none."""

    def __init__(self) -> None:
        self._made_s = time.monotonic()
        self._beat: Beat | None = None
        self._noted_s = 0.0

    def note(self, beat: Beat | None) -> None:
        """Take a new one; None: the ranks are gone."""
        self._beat, self._noted_s = beat, self.uptime_s

    @property
    def uptime_s(self) -> float:
        """Seconds since this server began to wait for beats."""
        return time.monotonic() - self._made_s

    @property
    def at_s(self) -> float:
        """When it came, on the clock of `uptime_s`; 0 without one."""
        return round(self._noted_s, 3) if self._beat else 0.0

    @property
    def waiting(self) -> int:
        """Requests that the ranks have and that no step has begun."""
        return self._beat.waiting if self._beat else 0

    @property
    def ranks(self) -> list[RankStatus | None]:
        """What each rank said of itself; None before it has a model."""
        return self._beat.ranks if self._beat else []

    @property
    def why_stuck(self) -> str:
        """Why ranks that are ready make no progress; empty if they do, as far as is known."""
        if self._beat is None:
            return ""
        if self._beat.stalled_s:
            return f"no rank has made progress for {self._beat.stalled_s:.0f} s"
        silent_s = self.uptime_s - self._noted_s
        return f"no heartbeat from rank 0 for {silent_s:.0f} s" if silent_s > _MAX_SILENT_S else ""
