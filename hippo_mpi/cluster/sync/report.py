"""What people are told of a sync: bars or lines while it goes on, and what came of it. Loads no MLX."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from itertools import accumulate
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from hippo_mpi.cluster.sync.needs import Needs
from hippo_mpi.cluster.sync.session import HostState, SyncSession
from hippo_mpi.cluster.sync.transfer import HERE, HOSTS, HUB
from hippo_mpi.units import show_bytes, show_layers
from hippo_mpi.views.spans import num_bytes

_LINE_INTERVAL_S = 10.0
_SOURCES = {HERE: "from this machine", HOSTS: "from other hosts", HUB: "from the hub"}


class _Console(Console):
    """A console that never hides the cursor: after a Ctrl-C nothing could show it again."""

    def show_cursor(self, show: bool = True) -> bool:
        return False


class SyncProgress:
    """A bar for each host on a terminal; elsewhere a line every ten seconds. On stderr.

    Args:
        hosts: by number.
        is_shown: False: neither.
    """

    def __init__(self, hosts: Sequence[HostState], is_shown: bool) -> None:
        self._names = [state.host.ssh for state in hosts]
        self._totals = [num_bytes(span for spans in state.lacks.values() for span in spans) for state in hosts]
        self._done = [0 for _ in hosts]
        self._is_shown, self._told_s, self._telling = is_shown, time.monotonic(), threading.Lock()
        self._bars: Progress | None = None
        if is_shown and sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True))
            self._bars = Progress(
                *columns, TransferSpeedColumn(), TimeRemainingColumn(), console=_Console(stderr=True), transient=True
            )
            self._tasks = {
                number: self._bars.add_task(self._names[number], total=total)
                for number, total in enumerate(self._totals)
                if total
            }

    def arrive(self, number: int, count: int) -> None:
        """Show that a piece is on a host's disk."""
        with self._telling:
            self._done[number] += count
            if self._bars:
                self._bars.update(self._tasks[number], completed=self._done[number])
            elif self._is_shown and time.monotonic() > self._told_s + _LINE_INTERVAL_S:
                self._told_s = time.monotonic()
                rows = zip(self._names, self._done, self._totals, strict=True)
                told = [f"{name} {show_bytes(done)} of {show_bytes(total)}" for name, done, total in rows if total]
                sys.stderr.write(f"{', '.join(told)}\n")

    def tell(self, line: str) -> None:
        """Show a line, above the bars."""
        if self._bars:
            self._bars.console.print(line, markup=False, highlight=False)
        elif self._is_shown:
            sys.stderr.write(f"{line}\n")

    def __enter__(self) -> SyncProgress:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self._bars:
            self._bars.stop()


def lines_of(session: SyncSession, needs: Needs) -> Iterator[str]:
    """Return what came of it: a line for each host, how much was saved, and with which split to run."""
    total = sum(needs.files.sizes.values())
    width = max(len(state.host.ssh) for state in session.hosts)
    for state in (state for state in session.hosts if state.ranks):
        own, parts = _own(state), []
        if state.damaged:
            parts.append(f"{show_bytes(state.damaged)} were damaged")
        if state.mismatched:
            parts.append(f"{', '.join(state.mismatched)} wasn't what the hub has")
        if state.unchecked:
            parts.append(f"{show_bytes(state.unchecked)} of other programs aren't checked")
        if state.error:
            yield f"{state.host.ssh:{width}}  {show_bytes(state.came)} came"
            continue
        rest = f" of {show_bytes(total)}: the rest is other hosts'" if own < total else ""
        came = f"{show_bytes(state.came)} came" if state.came else "all of it was there"
        about = f"{_layers(state, needs)}: " if needs.counts else ""
        yield f"{state.host.ssh:{width}}  {about}{show_bytes(own)}{rest}; {'; '.join([came, *parts])}"
    moved = [f"{show_bytes(count)} {_SOURCES[kind]}" for kind, count in session.num_bytes.items() if count]
    if moved:
        rate = sum(state.came for state in session.hosts) / 1e6 / max(session.took_s, 1e-3)
        direct = f" ({show_bytes(session.direct)} straight from host to host)" if session.direct else ""
        yield f"{', '.join(moved)}{direct}, in {session.took_s:.1f} s: {rate:.0f} MB/s"
    if needs.counts and len(needs.counts) > 1:
        yield f"run with --layer-split {','.join(map(str, needs.counts))}: another split may need other bytes"


def object_of(session: SyncSession, needs: Needs) -> dict[str, Any]:
    """Return the same for JSON, in bytes and seconds."""
    hosts = [
        {
            "host": state.host.ssh, "ranks": state.ranks, "needed": _own(state), "was_here": state.was_here,
            "came": state.came, "damaged": state.damaged, "unchecked": state.unchecked, "mismatched": state.mismatched,
            "error": state.error or None,
        }
        for state in session.hosts
        if state.ranks
    ]  # fmt: skip
    files = needs.files
    return {
        "model": files.model, "commit": files.commit, "total": sum(files.sizes.values()), "layer_split": needs.counts,
        "sources": session.num_bytes, "direct": session.direct, "notes": session.notes,
        "seconds": round(session.took_s, 3), "hosts": hosts,
    }  # fmt: skip


def _own(state: HostState) -> int:
    return sum(num_bytes(spans) for spans in state.needs.values())


def _layers(state: HostState, needs: Needs) -> str:
    assert needs.counts is not None
    starts = [0, *accumulate(needs.counts)]
    return ", ".join(show_layers(starts[rank], starts[rank + 1]) for rank in state.ranks)
