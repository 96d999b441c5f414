"""A server's log: lines with time and level on stderr, written through Python's logging."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import queue
import threading
import time

ANNOUNCEMENTS = "hippo_mpi.announcements"
"""Name of the logger for lines that scripts wait for, which are shown at every level."""
_MAX_WAITING = 10_000  # lines; more are dropped until some have been written
_FLUSH_TIMEOUT_S = 1.0  # at the end of the process


class _StderrHandler(logging.Handler):
    """A handler that writes from a thread, so that a stderr which nobody reads doesn't stop the server."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: queue.Queue[bytes] = queue.Queue(_MAX_WAITING)
        threading.Thread(target=self._write, name="hippo-log", daemon=True).start()
        atexit.register(self._write_rest)

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(queue.Full):
            self._lines.put_nowait(f"{self.format(record)}\n".encode(errors="backslashreplace"))

    def _write(self) -> None:
        while True:
            line = self._lines.get()
            with contextlib.suppress(OSError):
                os.write(2, line)
            self._lines.task_done()

    def _write_rest(self) -> None:
        ends = time.monotonic() + _FLUSH_TIMEOUT_S
        while self._lines.unfinished_tasks and time.monotonic() < ends:
            time.sleep(0.01)


def set_up_logging(level: str) -> None:
    """Log to stderr from `level` on; of other libraries show warnings and errors at most."""
    least = logging.getLevelNamesMapping()[level.upper()]
    handler = _StderrHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(max(least, logging.WARNING))
    logging.getLogger("hippo_mpi").setLevel(least)
    logging.getLogger(ANNOUNCEMENTS).setLevel(logging.INFO)
