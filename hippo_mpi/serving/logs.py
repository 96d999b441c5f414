"""A server's log: lines with time and level on stderr or in a file, written through Python's logging."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import queue
import shutil
import threading
import time
from pathlib import Path

from hippo_mpi.errors import LOG_TIME, UserError

ANNOUNCEMENTS = "hippo_mpi.announcements"
"""Name of the logger for lines that scripts wait for, which are shown at every level."""
_MAX_WAITING = 10_000  # lines; more are dropped until some have been written
_FLUSH_TIMEOUT_S = 1.0  # at the end of the process
_MAX_FILE_BYTES = 10 << 20
_FILES_BEFORE = 4


class _LogFile:
    """The file that stderr goes to, also that of the ranks; a full one is copied and emptied, so that all go on in it.

    What another process writes between the copy and the emptying is lost, as with logrotate's copytruncate.

    Raises:
        UserError: it can't be written.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._max_bytes = path, _MAX_FILE_BYTES
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            os.dup2(self._fd, 2)
        except OSError as error:
            raise UserError(f"--log-file {path}: {error.strerror}") from None

    def rotate(self) -> None:
        """Set the file aside if it is full: FILE.1 is the newest of those before."""
        size = os.fstat(self._fd).st_size
        if size < self._max_bytes:
            return
        copy = self._path.with_name(f"{self._path.name}.new")
        try:
            shutil.copyfile(self._path, copy)
        except OSError:  # a full disk: all goes on in this file, and nothing that is there is lost
            copy.unlink(missing_ok=True)
            self._max_bytes = size + _MAX_FILE_BYTES
            return
        before = [self._path.with_name(f"{self._path.name}.{number}") for number in range(1, _FILES_BEFORE + 1)]
        for older, newer in zip(reversed(before), [*reversed(before[:-1]), None], strict=True):
            if newer is not None and newer.exists():
                os.replace(newer, older)
        os.replace(copy, before[0])
        os.ftruncate(self._fd, 0)
        self._max_bytes = _MAX_FILE_BYTES


class _StderrHandler(logging.Handler):
    """A handler that writes from a thread, so that a stderr which nobody reads doesn't stop the server."""

    def __init__(self) -> None:
        super().__init__()
        self.file: _LogFile | None = None  # that stderr goes to, if it is one of ours
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
                if self.file is not None:
                    self.file.rotate()
            self._lines.task_done()

    def _write_rest(self) -> None:
        ends = time.monotonic() + _FLUSH_TIMEOUT_S
        while self._lines.unfinished_tasks and time.monotonic() < ends:
            time.sleep(0.01)


def set_up_logging(level: str) -> None:
    """Log to stderr from `level` on; of other libraries show warnings and errors at most."""
    least = logging.getLevelNamesMapping()[level.upper()]
    handler = _StderrHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", LOG_TIME))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(max(least, logging.WARNING))
    logging.getLogger("hippo_mpi").setLevel(least)
    logging.getLogger(ANNOUNCEMENTS).setLevel(logging.INFO)


def log_to(path: Path) -> None:
    """Make a file this process's stderr, and its log's; processes that it starts from here on write there, too.

    Raises:
        UserError: it can't be written.
    """
    file = _LogFile(path)
    for handler in logging.getLogger().handlers:
        if isinstance(handler, _StderrHandler):
            handler.file = file
