"""Starts a rank on each host, and ends all of them with the first that fails: python -m hippo_mpi.cluster.starting.start.

Standard input is the lifeline here, too: its first line is a `StartPlan`, and its end is the end of all ranks. Each rank
has a keeper on its host, which is reached through ssh, if it isn't this one. The exit status is rank 0's.

The standard library only. It sleeps while the ranks work, and speaks twice a second to the keepers on other hosts.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import signal
import subprocess
import sys
from typing import Any

from hippo_mpi.cluster.starting.keeper import SILENCE_S, Errand
from hippo_mpi.cluster.starting.start_plan import StartPlan, quoted
from hippo_mpi.errors import INTERRUPTED, RankError, print_error
from hippo_mpi.transport.ports import THIS_MACHINE

_BEAT_S = SILENCE_S / 5
_LAST_WORDS_S = 5.0  # for rank 0 to say why, and for the others to end, after the first has ended
_END_S = 4.0  # for keepers to end
_CONNECT_S = 10
_SSH_FAILED = 255
_TOLD = (1, 2, 3)  # exit statuses of ranks that have said why
_SSH = ("ssh", "-T", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={_CONNECT_S}", "-o", "LogLevel=ERROR")


class Starter:
    """The keepers of all ranks."""

    def __init__(self, plan: StartPlan) -> None:
        self._plan = plan
        self._keepers: list[asyncio.subprocess.Process] = []
        self._is_told_to_end = asyncio.Event()
        self._first_bad: tuple[int, int] | None = None  # the rank that ended first, if not well, and its exit status
        self._some_end = asyncio.Event()  # rank 0, or any that didn't end well

    async def run(self) -> int:
        """Start all ranks, and wait until all have ended; return rank 0's exit status."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._is_told_to_end.set)
        loop.add_reader(0, self._read_lifeline)
        for rank in range(len(self._plan.ranks)):
            self._keepers.append(await self._keep(rank))
        beating = asyncio.create_task(self._beat())
        told: asyncio.Future[Any] = asyncio.create_task(self._is_told_to_end.wait())
        ended: asyncio.Future[Any] = asyncio.gather(*(self._await_end(rank) for rank in range(len(self._keepers))))
        try:
            some_end = asyncio.create_task(self._some_end.wait())
            await asyncio.wait([told, some_end], return_when="FIRST_COMPLETED")
            await asyncio.wait({told, ended}, timeout=_LAST_WORDS_S, return_when="FIRST_COMPLETED")
            code = self._status(is_told=told.done())
            await self._end_all(ended)
            return code
        finally:
            beating.cancel()

    async def _keep(self, rank: int) -> asyncio.subprocess.Process:
        """Start a rank's keeper, and give it its errand."""
        plan, start = self._plan, self._plan.ranks[rank]
        is_here, module = start.host == THIS_MACHINE, ["-m", "hippo_mpi.cluster.starting.keeper"]
        command = (
            [start.python, *module]
            if is_here
            else [*_SSH, start.host, f"exec {quoted(start.python)} {shlex.join(module)}"]
        )
        keeper = await asyncio.create_subprocess_exec(
            *command,
            stdin=subprocess.PIPE,
            stdout=None if is_here else subprocess.DEVNULL,  # a shell's greeting
        )
        environment = {**plan.environment, **start.environment}
        errand = Errand(plan.words, environment, plan.files, plan.folder, beats=not is_here)
        assert keeper.stdin is not None
        keeper.stdin.write(errand.encode())
        return keeper

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(_BEAT_S)
            for keeper, start in zip(self._keepers, self._plan.ranks, strict=True):
                if start.host != THIS_MACHINE and keeper.returncode is None:
                    assert keeper.stdin is not None
                    keeper.stdin.write(b"\n")

    async def _await_end(self, rank: int) -> None:
        code = await self._keepers[rank].wait()
        if code and self._first_bad is None:
            self._first_bad = rank, code
        if code or rank == 0:
            self._some_end.set()

    def _read_lifeline(self) -> None:
        if not os.read(0, 1 << 16):
            asyncio.get_running_loop().remove_reader(0)
            self._is_told_to_end.set()

    def _status(self, is_told: bool) -> int:
        """Return the status to end with, by what has ended so far; say what no rank can have said itself."""
        own = self._keepers[0].returncode
        if own == INTERRUPTED:  # by a person, who knows
            return own
        if is_told or self._first_bad is None:
            return 128 + signal.SIGTERM if own is None else own
        rank, code = self._first_bad
        start = self._plan.ranks[rank]
        if not any(keeper.returncode in _TOLD for keeper in self._keepers):
            how = f"was killed by signal {code - 128}" if code > 128 else f"exited with status {code}"
            if code == _SSH_FAILED and start.host != THIS_MACHINE:
                how = "was lost: its ssh connection closed or failed"
            print_error(f"rank {rank} ({start.host}) {how}")
        status = own if own in (0, *_TOLD) else code
        return status if status in (0, *_TOLD) else RankError.exit_code

    async def _end_all(self, ended: asyncio.Future[Any]) -> None:
        """End what is left: keepers end their ranks when their lifelines end."""
        for keeper in self._keepers:
            assert keeper.stdin is not None
            keeper.stdin.close()
        await asyncio.wait([ended], timeout=_END_S)
        for keeper in self._keepers:
            if keeper.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    keeper.kill()


def _read_plan() -> StartPlan | None:
    """Return the plan of the first line; None if nobody is there any more."""
    line = bytearray()
    while not line.endswith(b"\n"):
        if not (byte := os.read(0, 1)):
            return None
        line += byte
    return StartPlan.decode(bytes(line))


def main() -> None:
    """Start the ranks of the plan on standard input; ends the process."""
    plan = _read_plan()
    sys.exit(1 if plan is None else asyncio.run(Starter(plan).run()))


if __name__ == "__main__":
    main()
