"""The standard streams of ./launch/run, lent to rank 0 on the same machine.

mlx.launch and mpirun copy their input into a pipe, never pass on its end, and gather what ranks write. So ./launch/run
listens on a socket in a folder of its own, and rank 0 fetches the descriptors themselves: it then reads, writes and
ends like a process that the shell has started. Over the socket each side also learns when the other is gone, and rank 0
learns of a Ctrl-C.

Knows descriptors and process groups. Must not load MLX.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hippo_mpi.environment import CONSOLE
from hippo_mpi.errors import LaunchError, RankError
from hippo_mpi.transport.terminal import set_foreground

_STREAMS = (0, 1, 2)
_TAKES_INTERRUPTS, _INTERRUPT = b"i", b"c"
_CONNECT_TIMEOUT_S = 5.0
_POLL_INTERVAL_S = 0.1  # between looks at whether ./launch/run has come to the foreground


class Console:
    """The lender's side, in ./launch/run.

    Args:
        folder: a private folder for the socket.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "console"
        self.pid: int | None = None  # rank 0's, once it has connected
        self.takes_interrupts = False
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen(1)
        self._connection: socket.socket | None = None
        self._thread = threading.Thread(target=self._lend, name="hippo-console", daemon=True)
        self._thread.start()

    def interrupt(self) -> None:
        """Tell rank 0 of a Ctrl-C."""
        if self._connection:
            with contextlib.suppress(OSError):  # it is gone
                self._connection.sendall(_INTERRUPT)

    @property
    def is_rank_alive(self) -> bool:
        """True if rank 0 has connected and is alive."""
        return self._connection is not None and self._thread.is_alive()

    @property
    def is_rank_gone(self) -> bool:
        """True if rank 0 has connected and ended."""
        return not self._thread.is_alive()

    def signal(self, number: int) -> None:
        """Send rank 0 a signal, if it has connected and is alive."""
        if self.is_rank_alive and self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def _lend(self) -> None:
        connection, _ = self._listener.accept()
        with contextlib.suppress(OSError, ValueError):  # rank 0 has died; its launcher says so
            self.pid = int(connection.recv(32))
            socket.send_fds(connection, [str(os.getpgrp()).encode()], _STREAMS)
            self._connection = connection
            while data := connection.recv(1):
                self.takes_interrupts = data == _TAKES_INTERRUPTS


@dataclass(frozen=True)
class LentConsole:
    """The borrower's side, in rank 0, whose standard streams are those of ./launch/run."""

    connection: socket.socket
    launcher_input: int  # descriptor of the standard input that the launcher gave
    lender: int  # the process group of ./launch/run

    def take_interrupts(self) -> None:
        """Have each further Ctrl-C passed to this process instead of ending the run."""
        with contextlib.suppress(OSError):
            self.connection.sendall(_TAKES_INTERRUPTS)

    @contextlib.contextmanager
    def foreground(self) -> Iterator[None]:
        """Make this process the terminal's foreground group during the block: only that may read, and gets Ctrl-C."""
        own = os.getpgrp()
        try:
            while os.tcgetpgrp(0) != self.lender:  # ./launch/run itself is in the background
                time.sleep(_POLL_INTERVAL_S)
        except OSError:  # no terminal, or one of another session (ssh's): nothing keeps us from reading
            yield
            return
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTSTP)}
        if handlers[signal.SIGINT] is signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTSTP, signal.SIG_IGN)  # the shell wouldn't notice that we have stopped
        set_foreground(own)
        try:
            yield
        finally:
            set_foreground(self.lender)
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def await_interrupt(self) -> bool:
        """Wait for a Ctrl-C that ./launch/run received; return False if it is gone."""
        try:
            return bool(self.connection.recv(1))
        except OSError:
            return False


def borrow_console() -> LentConsole | None:
    """Make the streams of ./launch/run this process's own; return None if it didn't start us.

    Raises:
        LaunchError: it has started us, but on another machine.
        RankError: it has started us, but is gone.
    """
    path = os.environ.pop(CONSOLE, None)
    if path is None:
        return None
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(_CONNECT_TIMEOUT_S)
    try:
        connection.connect(path)
        connection.sendall(str(os.getpid()).encode())
        data, lent, _, _ = socket.recv_fds(connection, 1024, len(_STREAMS))
    except ConnectionRefusedError:
        raise RankError("./launch/run has exited") from None
    except OSError as error:
        raise LaunchError(
            f"rank 0 ({socket.gethostname()}) can't connect to ./launch/run ({error}): the hostfile's first host must be the"
            " machine on which it was started"
        ) from None
    connection.settimeout(None)
    launcher_input = os.dup(0)
    for descriptor, own in zip(lent, _STREAMS, strict=True):
        os.dup2(descriptor, own)
        os.close(descriptor)
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # write to the terminal also while others are in the foreground
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)  # Ctrl-C is for the terminal's group, and must not reach the launcher
    return LentConsole(connection, launcher_input, int(data))
