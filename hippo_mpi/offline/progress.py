"""Progress on stderr: bars on a terminal; elsewhere nothing, or for batches a line now and then."""

from __future__ import annotations

import os
import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from hippo_mpi.environment import STATUS_FILE, TERMINAL
from hippo_mpi.units import show_rate

_LINE_INTERVAL_S = 10.0


class _Console(Console):
    """A console that never hides the cursor: a rank that ends in the middle of a bar couldn't show it again."""

    def show_cursor(self, show: bool = True) -> bool:
        return False


class Progress:
    """Bars on stderr for loading, prefilling and measuring, which `clear` removes.

    Args:
        is_shown: False turns all of them off; they also need a terminal.
    """

    def __init__(self, is_shown: bool) -> None:
        self._bars: RichProgress | None = None
        self._tasks: dict[str, TaskID] = {}
        if is_shown and _is_terminal():
            columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
            self._bars = RichProgress(*columns, console=_Console(stderr=True, force_terminal=True), transient=True)

    def loading(self, done: int, total: int) -> None:
        """Show how much of the weights is loaded."""
        self._show("loading", done, total)

    def prefill(self, done: int, total: int) -> None:
        """Show how many of a prompt's tokens are prefilled."""
        self._show("prefill", done, total)

    def measuring(self, done: int, total: int, what: str) -> None:
        """Show how far a measurement is, and what it measures."""
        self._show("measuring", done, total, f"measuring {what}")

    def clear(self) -> None:
        """Remove the bars."""
        if self._bars:
            self._bars.stop()
            for task in self._tasks.values():
                self._bars.remove_task(task)
            self._tasks.clear()

    def _show(self, name: str, done: int, total: int, description: str = "") -> None:
        if not self._bars:
            return
        self._bars.start()
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(name, total=total)
        self._bars.update(self._tasks[name], completed=done, total=total, description=description or name)


class BatchProgress:
    """The progress of a batch on stderr: a bar on a terminal, elsewhere a line every ten seconds or so.

    Args:
        total: number of requests.
        done: how many were done before this run.
    """

    def __init__(self, total: int, done: int) -> None:
        self.total, self.done, self.failed, self.num_tokens = total, done, 0, 0
        self.began_s = self._told_s = time.monotonic()
        self._before = done
        self._bar: RichProgress | None = None
        if _is_terminal():
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
            self._bar = RichProgress(*columns, console=_Console(stderr=True, force_terminal=True))
            self._task = self._bar.add_task("", total=total, completed=done)
            self._bar.start()

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens per second of this run."""
        return self.num_tokens / max(time.monotonic() - self.began_s, 1e-9)

    def count(self, num_tokens: int) -> None:
        """Add newly generated tokens."""
        self.num_tokens += num_tokens

    def finish_one(self, is_failed: bool) -> None:
        """Count a request as done, and update what is shown."""
        self.done, self.failed = self.done + 1, self.failed + is_failed
        text = f"{show_rate(self.tokens_per_s)} tok/s" + (f", {self.failed:,} failed" if self.failed else "")
        now = time.monotonic()
        if self._bar:
            self._bar.update(self._task, completed=self.done, description=text)
        elif now - self._told_s > _LINE_INTERVAL_S:
            self._told_s = now
            left_s = (self.total - self.done) * (now - self.began_s) / max(self.done - self._before, 1)
            sys.stderr.write(f"{self.done:,} of {self.total:,} done, {text}, {left_s / 60:.0f} min left\n")

    def close(self) -> None:
        """Stop the bar where it is, so that further output begins on a new line."""
        if self._bar:
            self._bar.stop()

    def summarise(self) -> None:
        """Print the totals of the batch and of this run."""
        took_s = time.monotonic() - self.began_s
        sys.stderr.write(
            f"{self.done:,} of {self.total:,} done ({self._before:,} of them earlier), {self.failed:,} failed;"
            f" {self.num_tokens:,} tokens in {took_s:.1f} s, {show_rate(self.tokens_per_s)} tok/s\n"
        )


def _is_terminal() -> bool:
    """Return True if our stderr, under mlx.launch a pipe to the launcher, ends on a terminal that can draw a bar."""
    if os.environ.get("TERM") == "dumb":
        return False
    told = os.environ.get(TERMINAL)  # the launcher knows, if it is one of ours
    if told is not None:
        return told == "1"
    # mlx.launch passes the size of its terminal on, if it has one; ./launch/run gives us its own stderr.
    is_copied = "MLX_HOSTFILE" in os.environ and STATUS_FILE not in os.environ
    return sys.stderr.isatty() or (is_copied and "COLUMNS" in os.environ)
