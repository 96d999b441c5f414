"""The supervisor while models change under faults, plans fail, or it is cancelled itself, at any moment."""

from __future__ import annotations

import asyncio
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hippo_mpi.errors import UserError
from hippo_mpi.serving.supervision import supervisor as product
from hippo_mpi.serving.supervision.supervisor import LaunchPlan
from tests.unit.fake_link import HANG_S, Client
from tests.unit.supervised import READY_AND_ANSWERS, Kept, Run, lives, other_tasks, plan_of, runner


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    found, folder = runner(monkeypatch)
    monkeypatch.setattr(product, "_END_S", 1.0)
    yield found
    folder.rmdir()


def test_models_take_turns(run: Run) -> None:
    async def work() -> None:
        kept = Kept(lives(READY_AND_ANSWERS))
        clients = [Client(kept.front, model, 3) for model in ("m", "n", "m", "o")]
        await kept.until_answered()
        for client in clients:
            client.check()
            assert not client.error
        await kept.front.load("m")
        assert kept.front.model == "m" and kept.front.num_restarts == 0 and kept.num_starts == 4
        await kept.end()

    run(work())


@pytest.mark.parametrize(
    "faults",
    [
        ["os._exit(3)", "beat()\nos._exit(3)"],
        ["beat()\nos._exit(1)", "begin()\nos._exit(3)"],
        ["begin()\nsend('{')\nos._exit(3)", "begin()\nbegun(1)\nos._exit(3)"],
    ],
    ids=["while it loads", "ready in between", "when it is ready"],
)
def test_faults_in_the_middle_of_a_change(run: Run, faults: list[str]) -> None:
    """The other model's ranks fail twice, then they come; and the first model's again, with who waits for it."""

    async def work() -> None:
        kept = Kept(lives(READY_AND_ANSWERS, n=[*faults, READY_AND_ANSWERS]))
        clients = [Client(kept.front, model, 3) for model in ("m", "n", "m")]
        await kept.until_answered()
        for client in clients:
            client.check()
            assert not client.error
        assert len(kept.whys) == 2 and kept.front.model in ("m", "n")
        await kept.end()

    run(work())


@pytest.mark.parametrize("life", ["os._exit(2)", "beat()\nos._exit(2)", "os._exit(3)", "beat()\nos._exit(1)"])
def test_a_model_that_never_comes_is_given_up(run: Run, life: str) -> None:
    """At once if its ranks refuse it, else after its tries; the model before goes on with who waits for it."""

    async def work() -> None:
        kept = Kept(lives(READY_AND_ANSWERS, n=[life]))
        first, other = Client(kept.front, "m", 3), Client(kept.front, "n", 3)
        loaded = asyncio.ensure_future(kept.front.load("n"))
        later = Client(kept.front, "m", 2)
        await kept.until_answered()
        for client in (first, other, later):
            client.check()
        assert not first.error and not later.error
        wanted = (
            "its ranks reject it"
            if "(2)" in life
            else "the ranks failed 3 times in a row|failed 3 times while loading it"
        )
        assert any(part in other.error for part in wanted.split("|")), other.error
        with pytest.raises(UserError, match="'n' can't be loaded"):
            await asyncio.wait_for(loaded, HANG_S)
        assert kept.front.model == "m"
        await kept.end()

    run(work())


def test_a_model_that_was_loaded_before_is_not_refused_at_once(run: Run) -> None:
    """Status 2 of its ranks may come from a disk that is full just now: they are started again."""

    async def work() -> None:
        kept = Kept(lives(READY_AND_ANSWERS, m=[READY_AND_ANSWERS, "os._exit(2)", READY_AND_ANSWERS]))
        await asyncio.wait_for(kept.front.load("n"), HANG_S)
        client = Client(kept.front, "m", 3)
        await kept.until_answered()
        client.check()
        assert not client.error and kept.whys == ["exit status 2"]
        await kept.end()

    run(work())


def test_the_ranks_die_as_a_change_is_due(run: Run) -> None:
    dies_with_its_last_answer = """
begin()
for number, prompt, tokens in told():
    for token in range(len(tokens), prompt[0]):
        output(number, token, "length" if token + 1 == prompt[0] else None)
    os._exit(3)
"""

    async def work() -> None:
        kept = Kept(lives(READY_AND_ANSWERS, m=[dies_with_its_last_answer, READY_AND_ANSWERS]))
        clients = [Client(kept.front, model, 3) for model in ("m", "n", "m")]
        await kept.until_answered()
        for client in clients:
            client.check()
            assert not client.error
        await kept.end()

    run(work())


@pytest.mark.parametrize(
    "error", [UserError("no such file"), FileNotFoundError("no mlx.launch")], ids=["ours", "of the system"]
)
def test_ranks_that_cannot_be_started(run: Run, error: Exception) -> None:
    """The first time that ends everything; later it is a failure like any other."""

    async def fails_at_first(model: str, start: int) -> LaunchPlan:
        raise error

    async def fails_later(model: str, start: int) -> LaunchPlan:
        if start in (2, 3):
            raise error
        return plan_of("begin()\nos._exit(3)" if start == 1 else READY_AND_ANSWERS)

    async def work() -> None:
        kept = Kept(fails_at_first)
        await asyncio.wait({kept.running}, timeout=HANG_S)
        found = kept.running.exception()
        assert type(found) is UserError and str(error) in str(found)
        kept = Kept(fails_later)
        client = Client(kept.front, "m", 3)
        await kept.until_answered()
        client.check()
        assert not client.error and kept.whys[1:] == [str(error)] * 2
        await kept.end()

    run(work())


def test_a_command_that_can_not_be_started(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "_BACKOFF_S", (0.0, 0.0, 0.0, HANG_S))

    async def plans(model: str, start: int) -> LaunchPlan:
        return LaunchPlan(["-c", "#" * (1 << 20)], 2) if start > 1 else plan_of("begin()\nos._exit(3)", 1)

    async def work() -> None:
        kept = Kept(plans)
        client = Client(kept.front, "m", 3)
        await kept.until_answered()
        assert "failed 3 times in a row, most recently: [Errno 7] Argument list too long" in client.error
        await kept.end()

    run(work())


# ---- its own end

STUBBORN = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
SLOW = """
begin()
for number, prompt, tokens in told():
    for token in range(len(tokens), prompt[0] or 0):
        output(number, token)
        time.sleep(0.005)
"""
Moment = Callable[[Kept], object]
MOMENTS: dict[str, tuple[str, Moment]] = {
    "at once": (READY_AND_ANSWERS, lambda kept: True),
    "while it plans": ("plan", lambda kept: kept.num_starts == 1),
    "before they connect": ("time.sleep(60)", lambda kept: kept.num_starts == 1),
    "while they load": ("beat()\ntime.sleep(60)", lambda kept: kept.front.beat.at_s),
    "while they are ready": (READY_AND_ANSWERS, lambda kept: kept.front.is_ready),
    "in an answer": (SLOW, lambda kept: kept.front.has_progressed),
    "while they end stubbornly": (
        f"{STUBBORN}begin()\nfront.close()\ntime.sleep(60)",
        lambda kept: kept.front.num_starts,
    ),
    "while it waits to start again": ("begin()\nos._exit(3)", lambda kept: kept.front.num_restarts),
}


async def ended_at(moment: str) -> tuple[Kept, list[Client]]:
    """A supervisor that has been cancelled at a moment, beside requests that wait or are answered."""
    life, is_time = MOMENTS[moment]

    async def plans(model: str, start: int) -> LaunchPlan:
        if life == "plan":
            await asyncio.sleep(HANG_S)
        return plan_of(life)

    kept = Kept(plans)
    clients = [Client(kept.front, model, 1000) for model in ("m", "m", "n")]
    await kept.until(lambda: is_time(kept))
    await kept.end()
    return kept, clients


@pytest.mark.parametrize("moment", MOMENTS)
def test_cancelled(run: Run, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    if "waits" in moment:
        monkeypatch.setattr(product, "_BACKOFF_S", (HANG_S,))

    async def work() -> None:
        kept, clients = await ended_at(moment)
        assert kept.running.cancelled()
        await kept.until(lambda: not kept.front.is_ready, also_if_ended=True)
        for client in clients:
            client.leave()
            client.check()

    run(work())


@pytest.mark.parametrize("moment", ["before they connect", "while they are ready"])
def test_no_task_is_left_of_a_supervisor_that_was_cancelled(run: Run, moment: str) -> None:
    async def work() -> None:
        await ended_at(moment)
        await asyncio.sleep(0)
        left = other_tasks()
        assert not left

    run(work())


def test_who_else_had_come_is_hung_up_on(run: Run) -> None:
    """As a rank of another life, or a stranger."""

    async def work() -> None:
        kept = Kept(lives(READY_AND_ANSWERS))
        await kept.until(lambda: kept.front.is_ready)
        (path,) = Path(tempfile.gettempdir()).glob("*/front")
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.connect(str(path))
            await asyncio.sleep(0.05)
            await kept.end()
            stranger.setblocking(False)
            assert await asyncio.wait_for(asyncio.get_running_loop().sock_recv(stranger, 1), HANG_S) == b""

    run(work())


def test_cancelled_twice(run: Run) -> None:
    """As by a second Ctrl-C, while what ends isn't killed yet."""

    async def work() -> None:
        kept = Kept(lives(f"{STUBBORN}ready()\ntime.sleep(60)"))
        await kept.until(lambda: kept.front.is_ready)
        kept.running.cancel()
        await asyncio.sleep(0.1)
        kept.running.cancel()
        await asyncio.wait({kept.running}, timeout=HANG_S)
        assert kept.running.cancelled()

    run(work())
