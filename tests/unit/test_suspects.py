"""What ranks fail of comes back alone and is given up; others lose nothing but time. Ranks are a few lines here."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hippo_mpi.engine.messages import ErrorMessage, OutputMessage
from hippo_mpi.engine.request import FinishReason, Request, SamplingParams
from hippo_mpi.errors import ForeignError, HippoError, RankError
from hippo_mpi.serving.supervision.answer import Answer, Told
from hippo_mpi.serving.supervision.messages import Add, Begun, Ready, Refused, Report, Taking, line_of, read_order
from hippo_mpi.serving.supervision.request_broker import RequestBroker
from hippo_mpi.serving.supervision.suspects import may_begin

MOST_FAILURES = 5
NUM_TOKENS = 4


@dataclass
class Life:
    """One life of the ranks, as the front sees it: requests by their number, each with as many steps as it was given.

    A prompt is [what happens in its first step, steps until its first token].
    """

    front: RequestBroker
    rows: int
    reader: asyncio.StreamReader = field(default_factory=asyncio.StreamReader)
    waiting: list[Request] = field(default_factory=list)
    running: dict[int, Request] = field(default_factory=dict)
    steps: dict[int, int] = field(default_factory=dict)  # that each of these has had
    told: list[list[int]] = field(default_factory=list)  # the numbers at work, by step

    def write(self, line: bytes) -> None:
        if isinstance(order := read_order(line), Add):
            self.waiting.append(order.request)

    def close(self) -> None:
        pass

    async def say(self, report: Report) -> None:
        """Say it, and let the front hear it."""
        self.reader.feed_data(line_of(report))
        for _ in range(10):
            await asyncio.sleep(0)

    async def run(self) -> bool:
        """Answer what comes until nothing is left (True), or a request ends this life."""
        serving = asyncio.ensure_future(self.front.serve_ranks(self.reader, cast(Any, self), 60.0))
        await self.say(Ready(1000, 1000))
        survives = True
        while survives and (self.waiting or self.running):
            survives = await self.step()
        self.reader.feed_eof()
        await serving
        return survives

    async def step(self) -> bool:
        while self.waiting and len(self.running) < self.rows:
            request = self.waiting.pop(0)
            await self.say(Taking(request.id))
            if request.prompt[0] == READING:
                return False
            await self.say(Taking(None))
            self.running[request.id], self.steps[request.id] = request, 0
            await self.say(Begun([request.id]))
        self.told.append(list(self.running))
        if any(request.prompt[0] == POISON for request in self.running.values()):
            return False
        for number, request in list(self.running.items()):
            self.steps[number] += 1
            if (num_more := self.steps[number] - request.prompt[1]) >= 0:
                made = (len(request.resume.tokens) if request.resume else 0) + 1 + num_more
                reason: FinishReason | None = "length" if made == NUM_TOKENS else None
                await self.say(OutputMessage(number, "x", made, finish_reason=reason))
                if reason:
                    del self.running[number]
        return True


PLAIN, POISON, READING = 1, 2, 3


async def answer_all(prompts: Sequence[tuple[int, int]], rows: int) -> tuple[list[Answer], list[Life]]:
    """Ask for all, and give ranks a new life until nothing is left."""
    front, lives = RequestBroker(1000, "m"), []
    answers = [front.submit(list(prompt), SamplingParams(), "m") for prompt in prompts]
    while front.num_requests:
        lives.append(Life(front, rows))
        if not await lives[-1].run():
            front.lose_ranks("the test says so", MOST_FAILURES)
        assert len(lives) < 100
    return answers, lives


def check(answers: Sequence[Answer], prompts: Sequence[tuple[int, int]]) -> None:
    for answer, (kind, _) in zip(answers, prompts, strict=True):
        if kind == PLAIN:
            assert answer.outcome == "length"
            assert answer.timings.token_ids == [1, 2, 3, 4]
        else:
            assert answer.outcome.startswith(f"error: the ranks failed {MOST_FAILURES + 1} times in a row")


def test_a_poison_takes_nobody_with_it() -> None:
    """Those that wait are never begun beside it for long; those that get tokens go on; it ends after its own tries."""
    prompts = [(PLAIN, 1), (PLAIN, 3), (POISON, 1), *[(PLAIN, 1)] * 8]
    answers, lives = asyncio.run(answer_all(prompts, 4))
    check(answers, prompts)
    assert len(lives) == MOST_FAILURES + 2
    assert all(life.told[-1].count(2) for life in lives[:-1] if life.told)


@given(
    st.lists(st.tuples(st.sampled_from([PLAIN, PLAIN, PLAIN, POISON, READING]), st.integers(1, 4)), max_size=12),
    st.integers(1, 6),
)
@settings(max_examples=60, deadline=None)
def test_only_poison_is_given_up(prompts: list[tuple[int, int]], rows: int) -> None:
    answers, lives = asyncio.run(answer_all(prompts, rows))
    check(answers, prompts)
    num_poisons = sum(kind != PLAIN for kind, _ in prompts)
    assert len(lives) <= num_poisons * (MOST_FAILURES + 1) + 1


def test_suspects_come_one_at_a_time() -> None:
    """The least suspicious first, the others in their order, beside all that aren't suspect."""
    failures = {1: 0, 2: 3, 3: 2, 4: 1, 5: 2}
    assert may_begin(failures, set()) == [1, 4, 3]
    assert may_begin(failures, {1, 3}) == [4]
    assert may_begin({**failures, 3: 0}, {1, 3, 4}) == [5]
    assert may_begin({}, set()) == []


@pytest.mark.parametrize("was_ready", [True, False])
def test_who_waits_loses_a_try_only_if_ranks_dont_start(was_ready: bool) -> None:
    front = RequestBroker(10, "m")
    answer = front.submit([1], SamplingParams(), "m")

    async def lose() -> None:
        for _ in range(MOST_FAILURES + 1):
            if was_ready:
                life = Life(front, 0)
                life.reader.feed_data(line_of(Ready(1000, 1000)))
                life.reader.feed_eof()
                await front.serve_ranks(life.reader, cast(Any, life), 60.0)
            front.lose_ranks("no reason", MOST_FAILURES)

    asyncio.run(lose())
    assert front.num_requests == was_ready
    assert answer.outcome == (
        "abort" if was_ready else "error: the ranks failed 6 times in a row, most recently: no reason"
    )


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (ForeignError("internal error"), ForeignError),
        (RankError("no room for a process"), RankError),
        (HippoError("x"), ForeignError),
    ],
)
def test_an_error_of_ours_ends_one_answer(sent: HippoError, expected: type[HippoError]) -> None:
    front, ends, told = RequestBroker(10, "m"), list[str](), list[Told]()
    front.on_early_end = ends.append
    first, second = (front.submit([1], SamplingParams(), "m", told.append) for _ in range(2))

    async def refuse() -> None:
        life = Life(front, 4)
        serving = asyncio.ensure_future(front.serve_ranks(life.reader, cast(Any, life), 60.0))
        await life.say(Ready(1000, 1000))
        await life.say(Refused(first.request.id, ErrorMessage.of(sent)))
        (error,) = told
        assert type(error) is expected and str(error) == str(sent)
        life.reader.feed_eof()
        await serving

    asyncio.run(refuse())
    assert second.outcome == "abort" and front.num_requests == 1
    front.abort(second)
    assert ends == ["error", "abort"]
