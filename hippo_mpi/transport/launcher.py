"""A rank under its launcher: where standard input comes from, and what happens when the launcher dies."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import stat
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn

from hippo_mpi.errors import RankError, print_error
from hippo_mpi.transport.console import LentConsole
from hippo_mpi.transport.copied_input import CopiedInput
from hippo_mpi.transport.processes import MPI_LAUNCHERS, command_line, is_mlx_launch
from hippo_mpi.transport.terminal import put_back_terminal
from hippo_mpi.transport.world import World

_POLL_INTERVAL_S = 0.5  # between looks at mlx.launch's main thread
_FROZEN_POLLS = 4  # in a row without a wake-up of that thread, after which it counts as ended
_MLX_VARIABLES = {"MLX_HOSTFILE", "MLX_IBV_DEVICES"}


class Launcher:
    """The process that started this rank: gives rank 0 its standard input, and ends the rank when it dies.

    Under mlx.launch a rank's input is a pipe; when it ends, mlx.launch is gone, and its ranks must end too. A SIGINT
    sent to mlx.launch alone ends only its main thread, while other threads keep the pipe open: so rank 0, on the same
    machine, watches that thread (on Linux; elsewhere the ranks end with the answer). Under ./launch/run rank 0 has the
    streams of ./launch/run, and a connection that ends with it. Otherwise the input is an ordinary standard input.

    Args:
        world: this rank.
        console: the streams that rank 0 has borrowed from ./launch/run.
    """

    def __init__(self, world: World, console: LentConsole | None) -> None:
        self._rank, self._console = world.rank, console
        self._copied = self._find_copied_input(os.getppid())
        if console:
            threading.Thread(target=self._listen, args=(console,), name="hippo-console", daemon=True).start()

    def _find_copied_input(self, parent: int) -> CopiedInput | None:
        """Begin to watch an mlx.launch; return the input that a launcher copies to us, if rank 0 has no other."""
        given = self._console.launcher_input if self._console else 0
        is_reader, is_pipe = self._rank == 0 and not self._console, _is_pipe(given)
        is_mlx = bool(_MLX_VARIABLES & set(os.environ))
        if is_pipe and is_mlx and is_mlx_launch(parent):
            if self._rank == 0:
                threading.Thread(target=self._watch, args=(parent,), name="hippo-launcher", daemon=True).start()
            if is_reader:
                return CopiedInput(given, parent, self._end)
            threading.Thread(target=self._await_end, args=(given,), name="hippo-stdin", daemon=True).start()
        elif is_reader and is_pipe and "OMPI_COMM_WORLD_SIZE" in os.environ:
            name = Path(command_line(parent)[0]).name
            return CopiedInput(given, parent if name in MPI_LAUNCHERS else None, lambda: None)
        elif is_reader and is_mlx and "sshd" in command_line(parent)[0]:  # mlx.launch is on another machine
            return CopiedInput(given, None, self._end)
        return None

    @property
    def is_terminal(self) -> bool:
        """True if our input and output are a terminal, so that a person types and reads."""
        return self._copied is None and os.isatty(0) and os.isatty(1)

    @property
    def may_be_typed(self) -> bool:
        """True unless our input is known to be no terminal: what a launcher copies may be a person's."""
        return self._copied is not None or os.isatty(0)

    def read_all(self) -> str:
        """Return all of the input, up to its end."""
        if self._copied:
            return self._copied.read_all()
        with self.foreground():
            return sys.stdin.read() if sys.stdin else ""

    def read_line(self) -> str | None:
        """Return the next line without its newline; None at the end of the input."""
        if self._copied:
            return self._copied.read_line()
        with self.foreground():
            line = sys.stdin.readline() if sys.stdin else ""
        return line.rstrip("\n") if line else None

    def foreground(self) -> contextlib.AbstractContextManager[None]:
        """Allow reading from standard input during the block, also from the terminal of ./launch/run."""
        return self._console.foreground() if self._console else contextlib.nullcontext()

    def take_interrupts(self) -> None:
        """Have each further Ctrl-C passed to this rank, also under ./launch/run."""
        if self._console:
            self._console.take_interrupts()

    def _listen(self, console: LentConsole) -> None:
        while console.await_interrupt():
            os.kill(os.getpid(), signal.SIGINT)
        self._end()

    def _await_end(self, descriptor: int) -> None:
        while os.read(descriptor, 8192):
            pass
        self._end()

    def _watch(self, launcher: int) -> None:
        """End this rank once the launcher's main thread, which wakes ten times a second, only waits for its threads."""
        seen, frozen = "", 0
        while frozen < _FROZEN_POLLS:
            time.sleep(_POLL_INTERVAL_S)
            try:
                waits_in = Path(f"/proc/{launcher}/wchan").read_text()
                status = Path(f"/proc/{launcher}/task/{launcher}/status").read_text()
            except OSError:
                return  # it is gone, which the end of the pipe shows
            switches = re.findall(r"^voluntary_ctxt_switches:.*", status, re.MULTILINE)[0]
            is_frozen = waits_in.startswith("futex") and switches == seen
            seen, frozen = switches, frozen + 1 if is_frozen else 0
        self._end()

    def _end(self) -> NoReturn:
        put_back_terminal()
        if self._rank == 0:
            print_error("the launcher has exited")
        os._exit(RankError.exit_code)


def _is_pipe(descriptor: int) -> bool:
    try:
        return stat.S_ISFIFO(os.fstat(descriptor).st_mode)
    except OSError:  # closed
        return False
