"""A run from a terminal: its ranks' streams, its messages, its signals and its end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from hippo_mpi.cluster.starting.launcher_messages import LauncherMessages
from hippo_mpi.cluster.starting.start_plan import START, StartPlan
from hippo_mpi.environment import CONSOLE, STATUS_FILE
from hippo_mpi.errors import LaunchError, RankError, print_error
from hippo_mpi.transport.console import Console
from hippo_mpi.transport.run_key import RunKey
from hippo_mpi.transport.status_file import read_status
from hippo_mpi.transport.terminal import kept_terminal

_POLL_INTERVAL_S = 0.1
_TERM_TIMEOUT_S = 5.0  # for ranks and their launcher, from SIGTERM to SIGKILL
# For them, from a rank's end to SIGKILL: otherwise mlx.launch would wait forever for a stopped rank, for example.
_RANK_END_TIMEOUT_S = 10.0
# Open MPI refuses to start anything as root without these.
_AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


class Launch:
    """One run, by our starter or by mlx.launch. Ctrl-C, SIGTERM or SIGHUP ends all ranks; a second one, or a timeout, kills them."""

    def __init__(self) -> None:
        self._launcher: subprocess.Popen[bytes] | None = None
        self._console: Console | None = None
        self._ended_by: int | None = None
        self._kill_at_s = float("inf")
        self._is_starter = False

    def run(self, job: StartPlan | list[str], key: RunKey) -> int:
        """Run ranks to their end, and pass the run key to them.

        Args:
            job: what our starter does, or the command line of mlx.launch.
            key: of the run.

        Returns:
            The exit status of rank 0, or 128 + the number of the signal that ended us.

        Raises:
            LaunchError: the socket through which rank 0 gets our standard streams can't be made.
        """
        with tempfile.TemporaryDirectory(prefix="hippo-run-") as folder, self._signals_handled():
            status = Path(folder) / "status"
            try:
                self._console = Console(Path(folder))
            except OSError as error:
                raise LaunchError(f"can't create a socket in {folder}: {error} (a shorter TMPDIR may help)") from None
            self._launcher = self._start(job, {STATUS_FILE: str(status), CONSOLE: str(self._console.path)}, key)
            if self._ended_by is not None:  # the signal came while the launcher was starting
                self._signal(signal.SIGTERM)
            messages = LauncherMessages(self._launcher)
            with kept_terminal():
                self._await_end(messages)
                messages.await_end()
            if self._ended_by is not None:
                return 128 + self._ended_by
            if rank_0_status := read_status(status):
                return rank_0_status[0]
            told = messages.show()  # rank 0 left no status: the launcher's own messages may say why
            code = self._launcher.returncode
            if self._is_starter and code > 0:
                return code
            if not told and (code or self._console.pid):
                print_error(f"rank 0 ended without an error message; its launcher exited with status {code}")
            return RankError.exit_code if self._console.pid else code or 1

    def _start(self, job: StartPlan | list[str], given: dict[str, str], key: RunKey) -> subprocess.Popen[bytes]:
        """Start a launcher, in a process group of its own, so that the terminal's Ctrl-C doesn't reach it.

        mlx.launch, for one, would live on without reading its ranks' output.
        """
        if isinstance(job, StartPlan):
            self._is_starter = True
            plan = replace(job, environment={**job.environment, **given, **key.environment})
            starter = subprocess.Popen(START, stdin=subprocess.PIPE, stderr=subprocess.PIPE, process_group=0)
            assert starter.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # it ends with an error of its own
                starter.stdin.write(plan.encode())
                starter.stdin.flush()
            return starter
        given = given | key.passed_on
        # Hosts other than 127.0.0.1 are reached through ssh, which doesn't pass the environment on.
        words = [word for name, value in given.items() for word in ("--env", f"{name}={value}")]
        return subprocess.Popen(
            [job[0], *words, *job[1:]], env={**_AS_ROOT, **os.environ, **given, **key.environment},
            stdin=subprocess.PIPE, stderr=subprocess.PIPE, process_group=0,
        )  # fmt: skip

    def _await_end(self, messages: LauncherMessages) -> None:
        """Wait for the launcher, then for the ranks (rank 0 may still be printing its error); kill what doesn't end."""
        assert self._launcher and self._console
        while self._launcher.poll() is None:
            if time.monotonic() > self._kill_at_s:
                self._signal(signal.SIGKILL)
            if self._console.is_rank_gone or messages.has_lost_a_rank:
                self._kill_at_s = min(self._kill_at_s, time.monotonic() + _RANK_END_TIMEOUT_S)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._launcher.wait(_POLL_INTERVAL_S)
        if self._ended_by is None:
            self._signal(signal.SIGTERM)  # ranks that have outlived the launcher
        ends_s = time.monotonic() + _TERM_TIMEOUT_S
        while self._is_group_alive() or self._console.is_rank_alive:
            if time.monotonic() > min(ends_s, self._kill_at_s):
                self._signal(signal.SIGKILL)
                return
            time.sleep(_POLL_INTERVAL_S)

    def _is_group_alive(self) -> bool:
        """Return True if a process of the launcher's group runs; zombies that init hasn't reaped yet don't count."""
        assert self._launcher
        command = ["ps", "-A", "-o", "pgid=,stat="]
        listing = subprocess.run(command, capture_output=True, text=True).stdout
        pairs = (line.split() for line in listing.splitlines())
        return any(group == str(self._launcher.pid) and not state.startswith("Z") for group, state in pairs)

    @contextlib.contextmanager
    def _signals_handled(self) -> Iterator[None]:
        """Handle the signals that would end us, but leave ignored ones so: nohup and shells' background jobs need it."""
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
            self._ended_by, self._kill_at_s = number, time.monotonic() + _TERM_TIMEOUT_S
            self._signal(signal.SIGTERM)
        else:
            self._kill_at_s = 0.0

    def _signal(self, number: signal.Signals) -> None:
        """Signal the launcher with all of its local ranks, and rank 0, which has a process group of its own.

        Rank 0 is stopped until both have the signal, so that neither sees the other end and reports that as a failure.
        """
        if self._console:
            self._console.signal(signal.SIGSTOP)
        if self._launcher:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # all have ended
                if self._is_starter:  # whose keepers must outlive it, to end their ranks
                    os.kill(self._launcher.pid, number)
                else:
                    os.killpg(self._launcher.pid, number)
        if self._console:
            self._console.signal(number)
            self._console.signal(signal.SIGCONT)
