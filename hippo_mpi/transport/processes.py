"""Processes of this host: their command lines and priorities, and the end of ranks that can't end themselves.

mlx.launch waits forever for a rank that a signal has stopped, because no SIGTERM ends it. So whoever ends a run must
kill such ranks. MPI's launchers do that themselves.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

_NICE = 10  # of threads that give way
MPI_LAUNCHERS = {"mpirun", "mpiexec", "prterun", "orterun"}


def command_line(pid: int) -> list[str]:
    """Return the words of a process's command line; [""] if it is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    return subprocess.run(["ps", "-p", str(pid), "-o", "args="], capture_output=True, text=True).stdout.split(" ")


def is_mlx_launch(pid: int) -> bool:
    """Return whether a process is an mlx.launch."""
    return any(Path(word).name == "mlx.launch" for word in command_line(pid)[:2])  # an interpreter may come first


def is_stopped(pid: int) -> bool:
    """Return whether a process is stopped by a signal (SIGSTOP, SIGTSTP)."""
    state = subprocess.run(["ps", "-p", str(pid), "-o", "stat="], capture_output=True, text=True).stdout
    return state.startswith("T")


def kill_rank_if_stopped(pid: int) -> None:
    """Kill a rank of this run if it is stopped by a signal; ranks that run end by themselves, or by SIGTERM.

    All ranks of a run have the same command line; a process with another one isn't killed.
    """
    if pid != os.getpid() and command_line(pid) == command_line(os.getpid()) and is_stopped(pid):
        _kill(pid)


def kill_stopped_ranks(launcher: int) -> None:
    """Kill the children of an mlx.launch on this host that are stopped by a signal."""
    if not is_mlx_launch(launcher):
        return  # a shell, for example, whose other jobs must not be touched
    listing = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,stat="], capture_output=True, text=True).stdout
    for pid, parent, state in (line.split() for line in listing.splitlines()):
        if int(parent) == launcher and state.startswith("T"):
            _kill(int(pid))


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)


def give_way() -> None:
    """Give this thread a lower priority than ranks, on systems where threads have priorities of their own."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
