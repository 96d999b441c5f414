"""A supervisor over ranks that are a few lines of Python: whatever happens, nothing of them is left behind it."""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from hippo_mpi.serving.supervision import supervisor as product
from hippo_mpi.serving.supervision.request_broker import RequestBroker
from hippo_mpi.serving.supervision.supervisor import LaunchPlan, Supervisor
from tests.unit.fake_link import HANG_S, RANK_PROGRAM

MAX_RESTARTS = 2
READY_AND_ANSWERS = """
ready()
for number, prompt, tokens in told():
    for token in range(len(tokens), prompt[0] if prompt else 0):
        output(number, token, "length" if token + 1 == prompt[0] else None)
"""
"""The life of a rank that answers until its front is gone."""

Plans = Callable[[str, int], Awaitable[LaunchPlan]]


def plan_of(life: str, num_local: int = 1) -> LaunchPlan:
    return LaunchPlan(["-S", "-E", "-c", RANK_PROGRAM + life], num_local)


def lives(*programs: str, **of_model: Sequence[str]) -> Plans:
    """Plans whose n-th start (of a model) has the n-th program, later ones the last."""
    starts: dict[str, int] = {}

    async def plan(model: str, start: int) -> LaunchPlan:
        found = of_model.get(model, programs)
        starts[model] = starts.get(model, 0) + 1
        return plan_of(found[min(starts[model], len(found)) - 1])

    return plan


class Kept:
    """A front, and a supervisor that keeps its ranks."""

    def __init__(self, plans: Plans, start_s: float = HANG_S, silence_s: float = HANG_S) -> None:
        self.front, self.plans, self.num_starts = RequestBroker(100, "m"), plans, 0
        self.whys: list[str] = []
        lose = self.front.lose_ranks

        def noting_lose(why: str, most_failures: int) -> None:
            self.whys.append(why)
            lose(why, most_failures)

        self.front.lose_ranks = noting_lose  # type: ignore[method-assign]
        supervisor = Supervisor(self.front, self._plan, (), start_s, silence_s, MAX_RESTARTS)
        self.running = asyncio.ensure_future(supervisor.run())

    async def _plan(self, model: str, living: Sequence[int] | None) -> LaunchPlan:
        self.num_starts += 1
        return await self.plans(model, self.num_starts)

    async def until(self, is_so: Callable[[], object], also_if_ended: bool = False) -> None:
        ends_s = time.monotonic() + HANG_S
        while not is_so():
            assert time.monotonic() < ends_s, f"{self.front.state}; {self.whys}"
            assert also_if_ended or not self.running.done(), self.running
            await asyncio.sleep(0.005)

    async def until_answered(self) -> None:
        await self.until(lambda: not self.front.num_requests)

    async def end(self) -> None:
        self.running.cancel()
        await asyncio.wait({self.running}, timeout=HANG_S)
        assert self.running.done(), "the supervisor doesn't end"


def _children() -> set[str]:
    return {pid for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()}


def _descriptors() -> dict[str, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # that of the listing itself
            found[name] = os.readlink(f"/proc/self/fd/{name}")
    return found


def is_alive(pid: int) -> bool:
    """Return whether a process runs, and isn't just waited for by nobody."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


_SETTLE_S = 3.0


def other_tasks() -> list[str]:
    """Return what tasks of this loop do, but for the present one."""
    return [task.get_coro().__qualname__ for task in asyncio.all_tasks() - {asyncio.current_task()}]  # type: ignore[union-attr]


@asynccontextmanager
async def _nothing_left(folder: Path) -> AsyncIterator[None]:
    children, descriptors = _children(), _descriptors()
    yield
    left = _left(children, descriptors, folder)
    ends_s = time.monotonic() + _SETTLE_S
    while any(left.values()) and time.monotonic() < ends_s:  # what was said last is still being read
        await asyncio.sleep(0.01)
        left = _left(children, descriptors, folder)
    assert not any(left.values()), left


def _left(children: set[str], descriptors: dict[str, str], folder: Path) -> dict[str, object]:
    return {
        "processes": _children() - children,
        "tasks": other_tasks(),
        "descriptors": dict(_descriptors().items() - descriptors.items()),
        "files": list(folder.iterdir()),
    }


Run = Callable[[Coroutine[Any, Any, None]], None]


def runner(monkeypatch: pytest.MonkeyPatch) -> tuple[Run, Path]:
    """A function that runs a test and looks whether anything is left, and the folder for temporary files."""
    folder = Path(tempfile.mkdtemp(prefix="hippo-"))  # a short path, as sockets need
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setattr(product, "_BACKOFF_S", (0.0,))
    monkeypatch.setattr(product, "_LOOK_S", 0.01)

    def run(work: Coroutine[Any, Any, None]) -> None:
        async def main() -> None:
            async with _nothing_left(folder):
                await work

        asyncio.run(main())

    return run, folder
