"""Progress for people: a bar on a terminal, nothing elsewhere."""

from __future__ import annotations

import os
import sys

from rich.console import Console
from rich.progress import BarColumn, TaskID, TaskProgressColumn, TextColumn
from rich.progress import Progress as RichProgress

TERMINAL = "HIPPO_TERMINAL"


class _Console(Console):
    """Never hides the cursor: a rank that ends in the middle of a bar couldn't show it again."""

    def show_cursor(self, show: bool = True) -> bool:
        return False


class Progress:
    """Bars on stderr for loading and prefilling; they vanish when done."""

    def __init__(self, is_shown: bool) -> None:
        self._bars: RichProgress | None = None
        self._tasks: dict[str, TaskID] = {}
        if is_shown and _is_terminal():
            columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
            self._bars = RichProgress(*columns, console=_Console(stderr=True, force_terminal=True), transient=True)

    def loading(self, done: int, total: int) -> None:
        self._show("loading", done, total)

    def prefill(self, done: int, total: int) -> None:
        self._show("prefill", done, total)

    def clear(self) -> None:
        if self._bars:
            self._bars.stop()
            for task in self._tasks.values():
                self._bars.remove_task(task)
            self._tasks.clear()

    def _show(self, name: str, done: int, total: int) -> None:
        if not self._bars:
            return
        self._bars.start()
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(name, total=total)
        self._bars.update(self._tasks[name], completed=done, total=total)


def _is_terminal() -> bool:
    """Whether a person sees our stderr. Under mlx.launch it is a pipe to the launcher's."""
    told = os.environ.get(TERMINAL)  # ./launch/run knows
    if told is not None:
        return told == "1"
    # mlx.launch tells the size of its terminal, if it has one.
    return sys.stderr.isatty() or ("MLX_HOSTFILE" in os.environ and "COLUMNS" in os.environ)
