"""Input that mlx.launch or mpirun copies to rank 0, without its end.

Rank 0 is the launcher's child, so on Linux it can see what the launcher reads from: whether a file has been read to its
end, and whether anybody may still write into a pipe. A terminal is set to deliver Ctrl-D as a character. Where none of
that is possible, a long silence counts as the end.
"""

from __future__ import annotations

import contextlib
import os
import queue
import select
import stat
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path

from hippo_mpi.transport.terminal import changed_terminal

SILENCE_S = 600.0
_TEXT_END_SILENCE_S = 1.0  # silence after some text that counts as its end, where the end can't be seen
_POLL_INTERVAL_S = 0.25  # between looks at the launcher's input
_DRAIN_S = 2.0  # for what the launcher has read to reach us
_CTRL_D = b"\x04"


class _State(Enum):
    OPEN = "more may come"
    ENDED = "read to its end"
    UNKNOWN = "can't be seen"


class CopiedInput:
    """Lines and text from a pipe that a launcher fills.

    Args:
        descriptor: the pipe.
        launcher: id of the process that fills it; None: it is on another machine.
        on_gone: called when the pipe itself ends.
    """

    def __init__(self, descriptor: int, launcher: int | None, on_gone: Callable[[], None]) -> None:
        self._descriptor, self._launcher, self._on_gone = descriptor, launcher, on_gone
        self._chunks: queue.Queue[bytes] = queue.Queue()
        self._pending = b""
        self._is_ended = False
        self._has_warned = False
        threading.Thread(target=self._pump, name="hippo-stdin", daemon=True).start()

    def read_line(self) -> str | None:
        """Return the next line without its newline; None at the end of the input."""
        with self._ctrl_d_told():
            while b"\n" not in self._pending and not self._is_ended:
                self._take(SILENCE_S)
        line, newline, rest = self._pending.partition(b"\n")
        self._pending = rest
        return line.decode(errors="replace") if line or newline else None

    def read_all(self) -> str:
        """Return all of the input, once it has ended."""
        with self._ctrl_d_told():
            while not self._is_ended:
                self._take(_TEXT_END_SILENCE_S if self._pending else SILENCE_S)
        text, self._pending = self._pending, b""
        return text.decode(errors="replace")

    def _take(self, silence_s: float) -> None:
        """Wait for more input or its end; where the end can't be seen, `silence_s` without input count as one."""
        began_s = ended_s = time.monotonic()
        while True:
            with contextlib.suppress(queue.Empty):
                text, ctrl_d, _ = self._chunks.get(timeout=_POLL_INTERVAL_S).partition(_CTRL_D)
                self._pending += text
                self._is_ended = bool(ctrl_d)
                return
            now, state = time.monotonic(), _look(self._launcher)
            if state is _State.UNKNOWN:
                self._warn()
                self._is_ended = now - began_s > silence_s
            elif state is _State.ENDED:
                self._is_ended = now - ended_s > _DRAIN_S
            else:
                ended_s = now
            if self._is_ended:
                return

    def _warn(self) -> None:
        if not self._has_warned:
            self._has_warned = True
            sys.stderr.write(
                "(this launcher doesn't pass on the end of its input, and it can't be seen from here:"
                f" {SILENCE_S / 60:.0f} minutes of silence count as the end; ./launch/run passes it on)\n"
            )

    def _pump(self) -> None:
        while data := os.read(self._descriptor, 8192):
            self._chunks.put(data)
        self._chunks.put(_CTRL_D)
        self._on_gone()

    @contextlib.contextmanager
    def _ctrl_d_told(self) -> Iterator[None]:
        """Have the launcher's terminal deliver Ctrl-D as a character instead of as the end, during the block."""
        terminal = None if self._launcher is None else _open_terminal(self._launcher)
        if terminal is None:
            yield
            return
        try:
            disabled = bytes([os.fpathconf(terminal, "PC_VDISABLE")])
            with changed_terminal(terminal, {termios.VEOF: disabled, termios.VEOL: _CTRL_D}):
                yield
        finally:
            os.close(terminal)


def _open_terminal(launcher: int) -> int | None:
    """Open the terminal that a process reads from, or return None. A pipe isn't opened, as that would keep it open."""
    path = f"/proc/{launcher}/fd/0" if Path("/proc/self/fd").exists() else "/dev/tty"
    try:
        if stat.S_ISCHR(os.stat(path).st_mode):
            descriptor = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
            if os.isatty(descriptor):
                return descriptor
            os.close(descriptor)
    except OSError:  # none, or another user's launcher
        pass
    return None


def _look(launcher: int | None) -> _State:
    """Return what can be seen of a process's standard input without reading from it."""
    path = f"/proc/{launcher}/fd/0"
    try:
        target, mode = os.readlink(path), os.stat(path).st_mode
        if stat.S_ISREG(mode):
            position = int(Path(f"/proc/{launcher}/fdinfo/0").read_text().split()[1])
            return _State.ENDED if position >= os.stat(path).st_size else _State.OPEN
        if target.startswith("pipe:"):  # a named pipe doesn't show that its writers are gone
            return _State.OPEN if _has_writers(path) else _State.ENDED
    except (OSError, ValueError):  # no /proc, or another user's launcher
        return _State.UNKNOWN
    if target == os.devnull:
        return _State.ENDED
    return _State.OPEN if target.startswith(("/dev/pts/", "/dev/tty")) else _State.UNKNOWN


def _has_writers(path: str) -> bool:
    """True if a pipe holds data, or anybody may still write into it."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        events = poll.poll(0)
        return not events or bool(events[0][1] & select.POLLIN)
    finally:
        os.close(descriptor)
