"""A view of a server's ranks, updated every second: a line of text, a table, and series to plot."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import Any

from hippo_mpi.units import layer_range, show_bytes

COLUMNS = ("rank", "host", "layers", "weights", "resident", "KV caches", "busy", "hop")
_LOOK_INTERVAL_S = 1.0
_MAX_LOOKS = 120  # that are remembered


@dataclass(frozen=True)
class Point:
    """The activity of a rank between two looks."""

    seconds: float  # before now: at most 0
    rank: str
    busy: float  # share of the time, in percent
    hop_ms: float  # mean over the messages to this rank since the last look; 0 if there was none


class ClusterView:
    """The state of a server, and the activity of its ranks in the last two minutes.

    Args:
        status: returns the body of GET /ready; raises OSError if the server can't be reached.
    """

    def __init__(self, status: Callable[[], dict[str, Any]]) -> None:
        self._fetch = status
        self._status: dict[str, Any] = {}
        self._points: deque[tuple[float, list[tuple[float, float]]]] = deque(maxlen=_MAX_LOOKS)
        self._before: list[dict[str, Any]] = []
        self._looked_at = self._beat_s = 0.0

    def look(self) -> None:
        """Fetch the server's status, unless that was less than a second ago: many pages may share one view."""
        now = time.monotonic()
        if now - self._looked_at < _LOOK_INTERVAL_S * 0.9:
            return
        self._looked_at = now
        try:
            self._status = self._fetch()
        except (OSError, ValueError) as error:  # a proxy may answer with a page of its own
            self._status = {"ready": False, "state": f"the server can't be reached: {error}"}
        ranks, beat_s = self._status.get("now", []), self._status.get("beat_s", 0.0)
        passed_s = beat_s - self._beat_s
        if passed_s > 0 and len(ranks) == len(self._before) and all(ranks) and all(self._before):
            pairs = zip(ranks, self._before, strict=True)
            self._points.append((now, [_rates(rank, before, passed_s) for rank, before in pairs]))
        self._before, self._beat_s = ranks, beat_s

    @property
    def line(self) -> str:
        """The state of the server in a sentence or two."""
        status = self._status
        if not status.get("ready"):
            return f"Not ready: {status.get('state', 'unknown')}. Answers in progress will continue by themselves."
        count, requests = len(status.get("ranks", [])), status.get("requests", 0)
        silent = status.get("silent_hosts") or []
        without = f" Without {', '.join(silent)} (no answer)." if silent else ""
        on = f"{status['model']}, {count} rank{'s' * (count != 1)}, " if count else ""
        following = status.get("state", "").partition("; ")[2]  # a model that is loaded next
        then = f" {following}." if following else ""
        return f"Ready: {on}{requests} request{'s' * (requests != 1)}.{then}{without}"

    @property
    def rows(self) -> list[list[str]]:
        """A row per rank, in the order of COLUMNS."""
        rows = []
        last = self._points[-1][1] if self._points and self._status.get("ready") else []
        now = self._status.get("now", [])
        for rank, about in enumerate(self._status.get("ranks", [])):
            start, stop = about["layers"]
            status = now[rank] if rank < len(now) else {}
            busy, hop_ms = last[rank] if rank < len(last) else (0.0, 0.0)
            rows.append([
                str(rank), about["host"], layer_range(start, stop) + (" and head" if rank == 0 else ""),
                show_bytes(about["weight_bytes"]), show_bytes(status.get("peak_resident_bytes", 0)),
                show_bytes(status.get("cache_bytes", 0)), f"{busy:.0f} %", f"{hop_ms:.2f} ms",
            ])  # fmt: skip
        return rows

    @property
    def html(self) -> str:
        """The rows as an HTML table; cells have their column's name, so that narrow pages can show cards instead."""
        head = "".join(f"<th>{name}</th>" for name in COLUMNS)
        cells = (
            "".join(f'<td data-name="{name}">{escape(cell)}</td>' for name, cell in zip(COLUMNS, row, strict=True))
            for row in self.rows
        )
        body = "".join(f"<tr>{row}</tr>" for row in cells)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    @property
    def points(self) -> list[Point]:
        """The activity of all ranks in the last two minutes, oldest first."""
        now = time.monotonic()
        return [
            Point(at - now, f"rank {rank}", busy, hop_ms)
            for at, ranks in self._points
            for rank, (busy, hop_ms) in enumerate(ranks)
        ]


def _rates(rank: dict[str, Any], before: dict[str, Any], passed_s: float) -> tuple[float, float]:
    """Return (busy percent, milliseconds per hop) between two looks, zeros for a rank that was restarted between."""
    hops = rank["num_hops"] - before["num_hops"]
    if hops < 0:
        return 0.0, 0.0
    busy = 100 * (rank["busy_s"] - before["busy_s"]) / passed_s
    return max(0.0, min(100.0, busy)), 1e3 * (rank["hop_s"] - before["hop_s"]) / hops if hops else 0.0
