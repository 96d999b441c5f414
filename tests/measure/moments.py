"""Ranks that are killed or stopped at any moment of a run, from the first import on, under each way to start them."""

from __future__ import annotations

import contextlib
import os
import random
import re
import secrets
import signal
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests import ranks
from tests.histories.stage import processes_with
from tests.ranks import Rank
from tests.servers import SERVE, Server
from tests.spmd.test_faults import endless

TIMEOUT_S, START_TIMEOUT_S = 4, 8
_SPAN_S = 6.0  # in which it happens, from when the rank's process is there
_SLACK_S = 6.0
_MARK = "HIPPO_MOMENT"
_LAUNCH = str(Path(__file__).parents[2] / "launch" / "run")
_AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
FAULTS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


def _generate() -> list[str]:
    return [*endless(TIMEOUT_S), "--start-timeout", str(START_TIMEOUT_S)]


def _mlx_launch(*options: str) -> list[str]:
    return [str(ranks.BIN / "mlx.launch"), "-n", "2", *options, "--", *_generate()]


WAYS: dict[str, Callable[[], list[str]]] = {
    "mlx.launch": lambda: _mlx_launch("--starting-port", str(ranks.consecutive_ports(2))),
    "mlx.launch --backend mpi": lambda: _mlx_launch("--backend", "mpi"),
    "mpirun": lambda: ranks.mpirun(2, _generate()),
    "./launch/run": lambda: [_LAUNCH, "-n", "2", *_generate()[1:]],
    "./launch/run --backend mpi": lambda: [_LAUNCH, "-n", "2", "--backend", "mpi", *_generate()[1:]],
    "serve": lambda: [
        SERVE, "--port", "0", "--timeout", str(TIMEOUT_S), "--start-timeout", str(START_TIMEOUT_S), "--max-restarts", "20",
    ],
}  # fmt: skip


@dataclass
class Trial:
    """What came of one.

    Args:
        moment_s: since the rank's process was there.
        took_s: from the fault to the end of the command (serve: until it was ready again).
        faults: what isn't as it should be.
    """

    way: str
    kind: str
    rank: int
    moment_s: float
    took_s: float
    faults: list[str]


def measure_moments(count: int, seed: int = 1, ways: list[str] | None = None) -> list[Trial]:
    """`count` trials of each way, and a line for each way and each trial that went wrong."""
    trials: list[Trial] = []
    limit_s = _start_s() + START_TIMEOUT_S + TIMEOUT_S + _SLACK_S
    for way in ways or WAYS:
        draw, mine = random.Random(f"{seed} {way}"), []
        for _ in range(count):
            mine.append(_try(way, draw.choice(list(FAULTS)), draw.randrange(2), draw.uniform(0, _SPAN_S), limit_s))
            one = mine[-1]
            if one.faults:
                what = "; ".join(one.faults)
                print(f"  {way}: rank {one.rank}, {one.kind} at {one.moment_s:.2f} s: {what}", flush=True)
        took = [one.took_s for one in mine]
        good = sum(not one.faults for one in mine)
        print(
            f"  {way}: {good} of {count} ended as they should; after {statistics.median(took):.1f} s, at most"
            f" {max(took):.1f} s (allowed: {limit_s:.1f} s)",
            flush=True,
        )
        trials += mine
    return trials


def _start_s() -> float:
    """How long a start takes here and now."""
    began = time.monotonic()
    with ranks.ring([_generate()] * 2) as running:
        running[0].await_output()
        return time.monotonic() - began


def _try(way: str, kind: str, rank: int, moment_s: float, limit_s: float) -> Trial:
    mark = secrets.token_hex(8)
    with ranks.single(WAYS[way](), env={_MARK: mark, **_AS_ROOT}) as running:
        try:
            pid = ranks.await_rank(running, rank)
            time.sleep(moment_s)
            trial = Trial(way, kind, rank, moment_s, 0.0, [])
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, FAULTS[kind])
            began = time.monotonic()
            check = _check_server if way == "serve" else _check_end
            check(running, trial, pid, began, limit_s)
            trial.took_s = trial.took_s or time.monotonic() - began
            if left := _await_gone(mark):
                trial.faults.append(f"{len(left)} processes left: {', '.join(map(_state, left))}")
            return trial
        finally:
            for left_pid in processes_with(f"{_MARK}={mark}".encode()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(left_pid, signal.SIGKILL)


def _check_end(running: Rank, trial: Trial, pid: int, began: float, limit_s: float) -> None:
    """The command ends in time with one line, which names a rank."""
    try:
        code = running.wait(2 * limit_s)
    except subprocess.TimeoutExpired:
        trial.faults.append(f"no end within {2 * limit_s:.0f} s: {running.err[-300:]!r}")
        return
    trial.took_s = time.monotonic() - began
    if trial.took_s > limit_s:
        trial.faults.append(f"ended after {trial.took_s:.1f} s")
    if code == 0 and not trial.way.startswith("mlx.launch"):  # which always says 0
        trial.faults.append("exit status 0")
    ours = [line for line in running.err.splitlines() if line.startswith("error:")]
    named = [line for line in running.err.splitlines() if re.search(r"\brank:? \d", line)]
    if len(ours) > 1 or not named or (ours and ours[0] not in named):
        trial.faults.append(f"not one line that names a rank: {ours or running.err[-400:]!r}")


def _check_server(running: Rank, trial: Trial, pid: int, began: float, limit_s: float) -> None:
    """The server answers again, without the process that was hurt, and ends when it is told to."""
    server = Server(running)
    while server.status()["ready"] is not True or _is_there(pid):
        if time.monotonic() - began > 2 * limit_s or running.process.poll() is not None:
            trial.faults.append(f"not ready again: {server.status()}: {running.err[-300:]!r}")
            break
        time.sleep(0.05)
    trial.took_s = time.monotonic() - began
    if trial.took_s > limit_s:
        trial.faults.append(f"ready after {trial.took_s:.1f} s")
    running.process.terminate()
    if running.wait(20):
        trial.faults.append(f"the server's exit status {running.process.returncode}")


def _is_there(pid: int) -> bool:
    return Path(f"/proc/{pid}/exe").exists() and ranks.is_alive(pid)


def _await_gone(mark: str, limit_s: float = 5.0) -> list[int]:
    ends = time.monotonic() + limit_s
    while (left := processes_with(f"{_MARK}={mark}".encode())) and time.monotonic() < ends:
        time.sleep(0.05)
    return left


def _state(pid: int) -> str:
    return subprocess.run(["ps", "-o", "stat=,args=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()[
        :90
    ]
