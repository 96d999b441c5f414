"""Starts the ranks, sees when they fail, ends what is left of them and starts them again.

Local ranks are started one by one: under the ring backend mlx.launch would keep a core busy, and a server is idle
most of the time. For other hosts it is mlx.launch (or, with --backend mpi, its mpirun).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hippo_mpi.errors import LaunchError, UserError
from hippo_mpi.serving.front import Front
from hippo_mpi.serving.progress import TERMINAL
from hippo_mpi.serving.rank_link import FRONT, MAX_LINE_BYTES

_BACKOFF_S = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0)
_END_S = 3.0
_LOOK_S = 0.05


@dataclass(frozen=True)
class LaunchPlan:
    """How the ranks are started.

    Args:
        command: what every rank runs.
        num_local: ranks on this machine, without a launcher.
        launcher: the beginning of a launcher's command line, if they are elsewhere.
    """

    command: Sequence[str]
    num_local: int = 0
    launcher: Sequence[str] = ()


class RankGroup:
    """The processes of one start, in a session of their own each."""

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self, plan: LaunchPlan, folder: Path, find_ports: Callable[[int], int]) -> None:
        """Start them.

        Raises:
            OSError: this machine has no room for another process; those that were started are still to be ended.
        """
        env = {
            **os.environ,
            FRONT: str(folder / "front"),
            TERMINAL: str(int(sys.stderr.isatty())),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        }
        if plan.launcher:
            self._start([*plan.launcher, "--env", f"{FRONT}={env[FRONT]}", "--", *plan.command], env)
            return
        hostfile = folder / "hosts.json"
        first = find_ports(plan.num_local)
        hostfile.write_text(json.dumps([[f"127.0.0.1:{first + rank}"] for rank in range(plan.num_local)]))
        for rank in range(plan.num_local):
            self._start(plan.command, {**env, "MLX_RANK": str(rank), "MLX_HOSTFILE": str(hostfile)})

    def _start(self, command: Sequence[str], env: dict[str, str]) -> None:
        process = subprocess.Popen(list(command), env=env, stdin=subprocess.DEVNULL, start_new_session=True)
        self._processes.append(process)

    def ended(self) -> int | None:
        """The exit status of a process that has ended, a bad one first; None while all run."""
        codes = [code for process in self._processes if (code := process.poll()) is not None]
        return max(codes, key=abs, default=None)

    async def wait(self) -> None:
        """Until one has ended."""
        while self.ended() is None:
            await asyncio.sleep(_LOOK_S)

    async def end(self) -> None:
        """End what still runs: politely, so that a launcher can tell other hosts, then not, whatever happens."""
        try:
            self._signal(signal.SIGTERM)
            ends = time.monotonic() + _END_S
            while any(p.poll() is None for p in self._processes) and time.monotonic() < ends:
                await asyncio.sleep(_LOOK_S)
        finally:  # a launcher's children may outlive it
            self._signal(signal.SIGKILL)
            for process in self._processes:
                process.wait()

    def _signal(self, number: signal.Signals) -> None:
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)


class Supervisor:
    """Keeps ranks behind a front.

    Args:
        find_ports: the first of so many free ports in a row, for the ring of local ranks; new ones for every start.
        silence_s: after so long without a word from rank 0, it counts as lost.
        max_restarts: failures in a row that a request bears, without a token of it between.
    """

    def __init__(
        self, front: Front, plan: LaunchPlan, find_ports: Callable[[int], int], silence_s: float, max_restarts: int
    ) -> None:
        self._front, self._plan, self._find_ports = front, plan, find_ports
        self._silence_s, self._max_restarts = silence_s, max_restarts
        self.num_restarts = 0

    async def run(self) -> None:
        """Start the ranks, and start them again whenever they fail; ends by being cancelled.

        Raises:
            UserError: the first start failed by something that was typed or configured.
        """
        with tempfile.TemporaryDirectory(prefix="hippo-serve-") as name:
            folder = Path(name)
            arrived: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()
            server = await asyncio.start_unix_server(
                lambda reader, writer: arrived.put_nowait((reader, writer)), folder / "front", limit=MAX_LINE_BYTES
            )
            failures = 0
            async with server:
                while True:
                    self._front.has_progressed = False
                    while not arrived.empty():  # of a life that ended before it was looked at
                        arrived.get_nowait()[1].close()
                    try:
                        why = await self._serve_once(folder, arrived)
                    except (OSError, LaunchError) as error:  # no more processes, memory or ports: that may pass
                        if not self._front.num_starts:
                            raise UserError(f"the ranks can't be started: {error}") from None
                        why = str(error)
                    failures = 1 if self._front.has_progressed else failures + 1
                    sys.stderr.write(f"the ranks are gone ({why}); starting them again\n")
                    self._front.lose_ranks(why, self._max_restarts)
                    self.num_restarts += 1
                    await asyncio.sleep(_BACKOFF_S[min(failures - 1, len(_BACKOFF_S) - 1)])

    async def _serve_once(
        self, folder: Path, arrived: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]]
    ) -> str:
        """One life of the ranks; returns why it ended."""
        group = RankGroup()
        try:
            group.start(self._same_again(), folder, self._find_ports)
            ended, connected = asyncio.ensure_future(group.wait()), asyncio.ensure_future(arrived.get())
            await asyncio.wait({ended, connected}, return_when="FIRST_COMPLETED", timeout=self._silence_s)
            if not connected.done():
                connected.cancel()
                ended.cancel()
                return self._refuse(group) or f"they didn't start within {self._silence_s:.0f} s"
            serving = asyncio.ensure_future(self._front.serve_ranks(*connected.result(), self._silence_s))
            try:
                await asyncio.wait({ended, serving}, return_when="FIRST_COMPLETED")
                await asyncio.wait({serving}, timeout=_END_S)  # rank 0 may still have something to tell
            finally:
                ended.cancel()
                serving.cancel()
            if not self._front.num_starts:
                self._refuse(group)
            return serving.result() if serving.done() and not serving.cancelled() else "a rank has ended"
        finally:
            await group.end()

    def _same_again(self) -> LaunchPlan:
        """The context that was promised stays, even if less memory is free by now: else answers could not go on."""
        about = self._front.about
        if about is None:
            return self._plan
        return replace(self._plan, command=[*self._plan.command, "--max-context", str(about.max_context)])

    def _refuse(self, group: RankGroup) -> str:
        """What the exit status says. Before any rank was ready, a user's mistake ends everything."""
        code = group.ended()
        if code is None:
            return ""
        if not self._front.num_starts and code == UserError.exit_code:
            raise UserError("the ranks didn't start; they said why")
        return f"exit status {code}"
