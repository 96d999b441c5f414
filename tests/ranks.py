"""Real ranks for tests: processes of ours, started under the ring or MPI, watched, and always ended."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hippo_mpi.transport.ports import HeldPorts

BIN = Path(sys.executable).parent
LIMIT_S = 60.0
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and so would ranks
_held: list[HeldPorts] = []


@dataclass
class Rank:
    """One process, with what it has written so far."""

    process: subprocess.Popen[bytes]
    stdout: bytearray = field(default_factory=bytearray)
    stderr: bytearray = field(default_factory=bytearray)
    threads: list[threading.Thread] = field(default_factory=list)

    @property
    def out(self) -> str:
        return self.stdout.decode(errors="replace")

    @property
    def err(self) -> str:
        return self.stderr.decode(errors="replace")

    def await_output(self, text: str = "", stream: str = "stdout") -> None:
        """Wait until something (that contains `text`) was written."""
        ends = time.monotonic() + LIMIT_S
        while time.monotonic() < ends:
            data = self.out if stream == "stdout" else self.err
            if data and text in data:
                return
            assert self.process.poll() is None, f"ended with {self.process.returncode}: {self.err}"
            time.sleep(0.01)
        raise AssertionError(f"nothing with {text!r} on {stream} within {LIMIT_S} s: {self.out!r} {self.err!r}")

    def await_chat(self) -> None:
        """Wait until a chat that reads a pipe answers."""
        assert self.process.stdin is not None
        self.process.stdin.write(b"/help\n")
        self.process.stdin.flush()
        self.await_output("/help, h: this help", "stderr")

    def wait(self, limit_s: float = LIMIT_S) -> int:
        code = self.process.wait(limit_s)
        for thread in self.threads:
            thread.join(5)
        return code


def start(command: Sequence[str], env: dict[str, str] | None = None, stdin: int = subprocess.DEVNULL) -> Rank:
    """Start a process in a group of its own."""
    process = subprocess.Popen(
        list(command),
        env={
            **{k: v for k, v in os.environ.items() if k != "COLUMNS"},
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            **(env or {}),
        },
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    rank = Rank(process)
    for stream, into in ((process.stdout, rank.stdout), (process.stderr, rank.stderr)):
        assert stream is not None
        thread = threading.Thread(target=_collect, args=(stream.fileno(), into), daemon=True)
        thread.start()
        rank.threads.append(thread)
    return rank


def _collect(descriptor: int, into: bytearray) -> None:
    with contextlib.suppress(OSError):
        while data := os.read(descriptor, 65536):
            into += data


def free_ports(count: int) -> list[int]:
    first = consecutive_ports(count)
    return list(range(first, first + count))


def consecutive_ports(count: int) -> int:
    """The first of `count` ports in a row that are ours until this process ends: other tests run beside these."""
    _held.append(HeldPorts(count))
    return _held[-1].first


@contextlib.contextmanager
def ring(commands: Sequence[Sequence[str]], first_stdin: int = subprocess.DEVNULL) -> Iterator[list[Rank]]:
    """One process per command, as the ranks of a ring, started without mlx.launch (which takes a core)."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as hostfile:
        json.dump([[f"127.0.0.1:{port}"] for port in free_ports(len(commands))], hostfile)
        hostfile.flush()
        ranks: list[Rank] = []
        try:
            for index, command in enumerate(commands):
                env = {"MLX_RANK": str(index), "MLX_HOSTFILE": hostfile.name}
                ranks.append(start(command, env, first_stdin if index == 0 else subprocess.DEVNULL))
            yield ranks
        finally:
            end(ranks)


@contextlib.contextmanager
def single(
    command: Sequence[str], stdin: int = subprocess.DEVNULL, env: dict[str, str] | None = None
) -> Iterator[Rank]:
    """One process (a launcher, say)."""
    process = start(command, env, stdin)
    try:
        yield process
    finally:
        end([process])


def mpirun(num_ranks: int, command: Sequence[str]) -> list[str]:
    """The command line that starts `command` under the wheel's Open MPI."""
    return [str(BIN / "mpirun"), "-n", str(num_ranks), "--oversubscribe", *command]


def end(ranks: Sequence[Rank]) -> None:
    """Kill whatever is left of the ranks, by process group."""
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(rank.process.pid, signal.SIGKILL)
        rank.process.wait()


def descendants(pid: int) -> list[int]:
    """All processes below `pid`."""
    listing = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    children: dict[int, list[int]] = {}
    for line in listing.splitlines():
        child, parent = map(int, line.split())
        children.setdefault(parent, []).append(child)
    found, todo = [], [pid]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return found


def await_rank(launcher: Rank, number: int) -> int:
    """Wait for the process of a rank below a launcher (Linux)."""
    marks = [f"MLX_RANK={number}\0".encode(), f"OMPI_COMM_WORLD_RANK={number}\0".encode()]
    ends = time.monotonic() + LIMIT_S
    while time.monotonic() < ends:
        for pid in descendants(launcher.process.pid):
            with contextlib.suppress(OSError):
                environment = Path(f"/proc/{pid}/environ").read_bytes()
                is_ours = Path(os.readlink(f"/proc/{pid}/exe")).name.startswith("python")
                if is_ours and any(mark in environment for mark in marks):
                    return pid
        time.sleep(0.02)
    raise AssertionError(f"no rank {number} within {LIMIT_S} s: {launcher.err}")


def is_alive(pid: int) -> bool:
    """Whether a process runs (zombies don't)."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(state) and not state.startswith("Z")


def await_end(pids: Sequence[int], limit_s: float = 10.0) -> list[int]:
    """Those of `pids` that are still alive after at most `limit_s`."""
    ends = time.monotonic() + limit_s
    while (left := [pid for pid in pids if is_alive(pid)]) and time.monotonic() < ends:
        time.sleep(0.05)
    return left


def cpu_seconds(pid: int) -> float:
    """CPU time that a process has used (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
