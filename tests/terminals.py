"""A terminal for tests: a command in a session of its own, with keys to press and a screen to read."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import signal
import termios
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from tests import ranks

CTRL_C, CTRL_D, UP = "\x03", "\x04", "\x1b[A"


@dataclass
class Terminal:
    """What runs on it, and all that it has shown."""

    pid: int
    descriptor: int
    shown: bytearray = field(default_factory=bytearray)
    code: int | None = None

    @property
    def screen(self) -> str:
        return self.shown.decode(errors="replace").replace("\r\n", "\n")

    def press(self, keys: str) -> None:
        os.write(self.descriptor, keys.encode())

    def await_text(self, text: str, since: int = 0) -> None:
        """Wait until `text` is on the screen, behind its first `since` characters."""
        self.await_match(re.escape(text), since)

    def await_match(self, text: str, since: int = 0) -> None:
        """Wait until the screen has what a regular expression says, behind its first `since` characters."""
        ends = time.monotonic() + ranks.LIMIT_S
        while not re.search(text, self.screen[since:], re.DOTALL):
            assert time.monotonic() < ends, f"no {text!r} within {ranks.LIMIT_S} s: {self.screen!r}"
            assert self.poll() is None, f"ended with {self.code}: {self.screen!r}"
            time.sleep(0.02)

    def poll(self) -> int | None:
        """The exit status, as a shell has it; None while it runs."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                code = os.waitstatus_to_exitcode(status)
                self.code = code if code >= 0 else 128 - code
        return self.code

    def wait(self, limit_s: float = ranks.LIMIT_S) -> int:
        ends = time.monotonic() + limit_s
        while (code := self.poll()) is None:
            assert time.monotonic() < ends, f"still runs after {limit_s} s: {self.screen!r}"
            time.sleep(0.02)
        return code

    @property
    def is_as_it_was(self) -> bool:
        """Whether it is as a shell wants it."""
        settings = termios.tcgetattr(self.descriptor)
        return (
            bool(settings[3] & termios.ECHO and settings[3] & termios.ICANON) and settings[6][termios.VEOF] == b"\x04"
        )


@contextlib.contextmanager
def terminal(command: Sequence[str], env: Mapping[str, str] | None = None) -> Iterator[Terminal]:
    """Run a command on a new terminal, and end it with all that it has started."""
    pid, descriptor = pty.fork()
    if pid == 0:
        path = f"{ranks.BIN}:{os.environ['PATH']}"
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.execvpe(command[0], list(command), {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **(env or {})})
    running = Terminal(pid, descriptor)
    thread = threading.Thread(target=_collect, args=(running,), daemon=True)
    thread.start()
    try:
        yield running
    finally:
        below = ranks.descendants(pid) if running.poll() is None else []
        for process in [*below, pid] if running.code is None else []:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        if running.code is None:
            os.waitpid(pid, 0)
        os.close(descriptor)


def _collect(running: Terminal) -> None:
    with contextlib.suppress(OSError):
        while data := os.read(running.descriptor, 65536):
            running.shown += data
