"""A run of mlx.launch from a terminal: its ranks' streams, its messages, its signals and its end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from hippo_mpi.cluster.launcher_messages import LauncherMessages
from hippo_mpi.environment import CONSOLE, STATUS_FILE
from hippo_mpi.errors import LaunchError, RankError
from hippo_mpi.transport.console import Console
from hippo_mpi.transport.run_key import RunKey
from hippo_mpi.transport.status_file import read_status
from hippo_mpi.transport.terminal import kept_terminal

_LOOK_S = 0.1
_END_S = 5.0  # for ranks and their launcher, from SIGTERM to SIGKILL
_OUTLIVE_S = 10.0  # for them from a rank's end to SIGKILL: mlx.launch waits for a rank that is stopped, say, for ever
# Open MPI refuses to start anything as root without these.
_AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


class Launch:
    """One run. A Ctrl-C, SIGTERM or SIGHUP ends all ranks; a second one, or seconds, kills them."""

    def __init__(self) -> None:
        self._launcher: subprocess.Popen[bytes] | None = None
        self._console: Console | None = None
        self._ended_by: int | None = None
        self._kill_at_s = float("inf")

    def run(self, command_line: list[str], key: RunKey) -> int:
        """Run mlx.launch to its end, with ranks that know a key; the exit status of rank 0, or what a shell has for the signal that ended us.

        Raises:
            LaunchError: rank 0 can't be lent our streams.
        """
        with tempfile.TemporaryDirectory(prefix="hippo-run-") as folder, self._signals_handled():
            status = Path(folder) / "status"
            try:
                self._console = Console(Path(folder))
            except OSError as error:
                raise LaunchError(f"no socket in {folder}: {error} (a shorter TMPDIR may help)") from None
            given = {STATUS_FILE: str(status), CONSOLE: str(self._console.path), **key.passed_on}
            # A host that isn't called 127.0.0.1 is reached through ssh, which passes no environment on.
            words = [word for name, value in given.items() for word in ("--env", f"{name}={value}")]
            # In a group of its own no Ctrl-C reaches it: it would live on, with nobody to read its ranks' output.
            self._launcher = subprocess.Popen(
                [command_line[0], *words, *command_line[1:]], env={**_AS_ROOT, **os.environ, **given, **key.environment},
                stdin=subprocess.PIPE, stderr=subprocess.PIPE, process_group=0,
            )  # fmt: skip
            if self._ended_by is not None:  # while it was started
                self._signal(signal.SIGTERM)
            messages = LauncherMessages(self._launcher)
            with kept_terminal():
                self._await_end(messages)
                messages.await_end()
            if self._ended_by is not None:
                return 128 + self._ended_by
            if found := read_status(status):
                return found[0]
            messages.show()  # rank 0 has said nothing: the launcher may know why
            return RankError.exit_code if self._console.pid else self._launcher.returncode or 1

    def _await_end(self, messages: LauncherMessages) -> None:
        """Wait for the launcher, then for the ranks, of which rank 0 says its last words itself; kill what doesn't end."""
        assert self._launcher and self._console
        while self._launcher.poll() is None:
            if time.monotonic() > self._kill_at_s:
                self._signal(signal.SIGKILL)
            if self._console.is_rank_gone or messages.has_lost_a_rank:
                self._kill_at_s = min(self._kill_at_s, time.monotonic() + _OUTLIVE_S)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._launcher.wait(_LOOK_S)
        if self._ended_by is None:
            self._signal(signal.SIGTERM)  # ranks that have outlived it
        ends_s = time.monotonic() + _END_S
        while self._is_group_alive() or self._console.is_rank_alive:
            if time.monotonic() > min(ends_s, self._kill_at_s):
                self._signal(signal.SIGKILL)
                return
            time.sleep(_LOOK_S)

    def _is_group_alive(self) -> bool:
        """Whether anything of the launcher's group runs; zombies, which init has yet to look at, don't."""
        assert self._launcher
        command = ["ps", "-A", "-o", "pgid=,stat="]
        listing = subprocess.run(command, capture_output=True, text=True).stdout
        pairs = (line.split() for line in listing.splitlines())
        return any(group == str(self._launcher.pid) and not state.startswith("Z") for group, state in pairs)

    @contextlib.contextmanager
    def _signals_handled(self) -> Iterator[None]:
        """Handle what would end us, unless it is ignored, as nohup and a script's background jobs have it."""
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        previous = {number: signal.getsignal(number) for number in numbers}
        for number, handler in previous.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, self._handle)
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        if number == signal.SIGINT and self._console and self._console.takes_interrupts:
            self._console.interrupt()
        elif self._ended_by is None:
            self._ended_by, self._kill_at_s = number, time.monotonic() + _END_S
            self._signal(signal.SIGTERM)
        else:
            self._kill_at_s = 0.0

    def _signal(self, number: signal.Signals) -> None:
        """Signal the launcher with all of its local ranks, and rank 0, which has a group of its own.

        At once for both, so that neither sees the other end, and calls that a failure.
        """
        if self._console:
            self._console.signal(signal.SIGSTOP)
        if self._launcher:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # all gone
                os.killpg(self._launcher.pid, number)
        if self._console:
            self._console.signal(number)
            self._console.signal(signal.SIGCONT)
