"""What a server's ranks do, second by second, for people: a line of words, a table, and series to plot."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import Any

from hippo_mpi.config.serve_options import API_KEYS
from hippo_mpi.units import show_bytes

COLUMNS = ("rank", "host", "layers", "weights", "resident", "KV caches", "busy", "hop")
_LOOK_S = 1.0
_MOST_LOOKS = 120
_ASK_S = 5.0


def own_key() -> str:
    """Return the API key for the server that the environment has; "none" if it has none."""
    return os.environ.get(API_KEYS, "").split(",")[0].strip() or "none"


def fetch_status(url: str) -> dict[str, Any]:
    """Return what GET /ready of the server at `url` says, ready or not.

    Raises:
        OSError: it doesn't answer.
    """
    request = urllib.request.Request(f"{url}/ready", headers={"Authorization": f"Bearer {own_key()}"})
    try:
        with urllib.request.urlopen(request, timeout=_ASK_S) as answer:
            return dict(json.loads(answer.read()))
    except urllib.error.HTTPError as error:  # 503: not ready, and why
        return dict(json.loads(error.read()))


@dataclass(frozen=True)
class Point:
    """A rank in one second."""

    seconds: float  # before now: at most 0
    rank: str
    busy: float  # share of the time, in percent
    hop_ms: float  # mean over the messages to this rank since the last look; 0 if there was none


class ClusterView:
    """Keeps the last two minutes.

    Args:
        status: what GET /ready says; raises OSError if the server can't be reached.
    """

    def __init__(self, status: Callable[[], dict[str, Any]]) -> None:
        self._fetch = status
        self._status: dict[str, Any] = {}
        self._points: deque[tuple[float, list[tuple[float, float]]]] = deque(maxlen=_MOST_LOOKS)
        self._before: list[dict[str, Any]] = []
        self._looked_at = self._beat_s = 0.0

    def look(self) -> None:
        """Ask the server, if that was long enough ago: many pages may share one view."""
        now = time.monotonic()
        if now - self._looked_at < _LOOK_S * 0.9:
            return
        self._looked_at = now
        try:
            self._status = self._fetch()
        except OSError as error:
            self._status = {"ready": False, "state": f"the server can't be reached: {error}"}
        ranks, beat_s = self._status.get("now", []), self._status.get("beat_s", 0.0)
        passed_s = beat_s - self._beat_s
        if passed_s > 0 and len(ranks) == len(self._before) and all(ranks) and all(self._before):
            pairs = zip(ranks, self._before, strict=True)
            self._points.append((now, [_rates(rank, before, passed_s) for rank, before in pairs]))
        self._before, self._beat_s = ranks, beat_s

    @property
    def line(self) -> str:
        """How it stands."""
        status = self._status
        if not status.get("ready"):
            return f"Not ready: {status.get('state', 'nothing is known yet')}. Answers that have begun go on by themselves."
        count, requests = len(status.get("ranks", [])), status.get("requests", 0)
        silent = status.get("silent_hosts") or []
        without = f" Without {', '.join(silent)}, who doesn't answer." if silent else ""
        on = f"{status['model']}, {count} rank{'s' * (count != 1)}, " if count else ""
        following = status.get("state", "").partition("; ")[2]  # a model that is loaded next
        then = f" {following}." if following else ""
        return f"Ready: {on}{requests} request{'s' * (requests != 1)}.{then}{without}"

    @property
    def rows(self) -> list[list[str]]:
        """A row per rank, in the order of COLUMNS."""
        found = []
        last = self._points[-1][1] if self._points and self._status.get("ready") else []
        now = self._status.get("now", [])
        for rank, about in enumerate(self._status.get("ranks", [])):
            start, stop = about["layers"]
            status = now[rank] if rank < len(now) else {}
            busy, hop_ms = last[rank] if rank < len(last) else (0.0, 0.0)
            found.append([
                str(rank), about["host"], f"{start}-{stop - 1}" + (" and head" if rank == 0 else ""),
                show_bytes(about["weight_bytes"]), show_bytes(status.get("peak_resident_bytes", 0)),
                show_bytes(status.get("cache_bytes", 0)), f"{busy:.0f} %", f"{hop_ms:.2f} ms",
            ])  # fmt: skip
        return found

    @property
    def html(self) -> str:
        """Return the rows as a table whose cells know their column's name, so that it can be shown as cards, too."""
        head = "".join(f"<th>{name}</th>" for name in COLUMNS)
        cells = (
            "".join(f'<td data-name="{name}">{escape(cell)}</td>' for name, cell in zip(COLUMNS, row, strict=True))
            for row in self.rows
        )
        body = "".join(f"<tr>{row}</tr>" for row in cells)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    @property
    def points(self) -> list[Point]:
        """All that is remembered, oldest first."""
        now = time.monotonic()
        return [
            Point(at - now, f"rank {rank}", busy, hop_ms)
            for at, ranks in self._points
            for rank, (busy, hop_ms) in enumerate(ranks)
        ]


def _rates(rank: dict[str, Any], before: dict[str, Any], passed_s: float) -> tuple[float, float]:
    """(busy percent, milliseconds per hop) between two looks; a rank that was started anew counts from 0."""
    hops = rank["num_hops"] - before["num_hops"]
    if hops < 0:
        return 0.0, 0.0
    busy = 100 * (rank["busy_s"] - before["busy_s"]) / passed_s
    return max(0.0, min(100.0, busy)), 1e3 * (rank["hop_s"] - before["hop_s"]) / hops if hops else 0.0
