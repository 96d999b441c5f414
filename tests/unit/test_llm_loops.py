"""Loops over an LLM's answers on several ranks in one process: each rank a greenlet, over a runner without a model."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from greenlet import getcurrent, greenlet

from hippo_mpi.engine.engine import Engine
from hippo_mpi.engine.prefill import Limits
from hippo_mpi.engine.request import Request, SamplingParams
from hippo_mpi.errors import HippoError, RankError, UserError
from hippo_mpi.library.answering import LoadedModel
from hippo_mpi.transport.script_ring import ScriptRing
from tests.unit.fake_runner import POISON, VOCAB, FakeRunner, fake_tokenizer

PARAMS = SamplingParams(max_tokens=6, ignore_eos=True, logit_bias=((POISON, -1e4),))


class Wires:
    """What the ranks send to each other: rank 0's reports, and whether a message round the ring is the last one."""

    def __init__(self, size: int) -> None:
        self.reports: list[deque[Any]] = [deque() for _ in range(size)]
        self.steps: list[deque[bool]] = [deque() for _ in range(size)]

    def send_step(self, is_last: bool) -> None:
        for steps in self.steps[1:]:
            steps.append(is_last)

    def take_step(self, rank: int) -> SimpleNamespace | None:
        """Follow one step, as a Follower does."""
        _await(self.steps[rank])
        return None if self.steps[rank].popleft() else SimpleNamespace()


def _await(messages: deque[Any]) -> None:
    while not messages:
        getcurrent().parent.switch()


class FakeControl:
    """The control connections of one rank; a failure is raised."""

    def __init__(self, rank: int, wires: Wires) -> None:
        self.rank, self.wires = rank, wires

    def idle(self) -> None:
        pass

    def fail(self, error: HippoError) -> None:
        raise error

    def report(self, message: object, to: int) -> None:
        self.wires.reports[to].append(message)

    def next_report(self, kind: type, waits: bool = True) -> Any:
        reports = self.wires.reports[self.rank]
        if waits:
            _await(reports)
        if not reports:
            raise queue.Empty
        assert isinstance(reports[0], kind)
        return reports.popleft()

    def share(self, message: object, kind: type) -> Any:
        for reports in self.wires.reports[1:] if self.rank == 0 else ():
            reports.append(message)
        return message if self.rank == 0 else self.next_report(kind)


class SteppingRunner(FakeRunner):
    """Tells the followers of each step, and may be interrupted in one."""

    def __init__(self, wires: Wires) -> None:
        super().__init__()
        self.wires, self.interrupts_at = wires, -1

    def exchange(self, step: Any) -> Any:
        self.wires.send_step(is_last=False)
        if len(self.steps) == self.interrupts_at:
            self.interrupts_at = -1
            super().exchange(step)
            raise KeyboardInterrupt
        return super().exchange(step)


class Script:
    """A script's rank: asks its model for answers."""

    def __init__(self, rank: int, wires: Wires, num_models: int = 1) -> None:
        self.rank, self.control = rank, FakeControl(rank, wires)
        self.ring = ScriptRing.__new__(ScriptRing)
        world = SimpleNamespace(rank=rank, size=len(wires.reports))
        vars(self.ring).update(
            world=world, control=self.control, open_loop=None, _num_models=0, _thread=threading.current_thread()
        )
        self.runners: list[SteppingRunner] = []
        self.models = [self._model(wires) for _ in range(num_models)]

    def _model(self, wires: Wires) -> LoadedModel:
        model = LoadedModel.__new__(LoadedModel)
        self.runners.append(SteppingRunner(wires))
        pipeline = SimpleNamespace(release=lambda: wires.send_step(is_last=True))
        follower = SimpleNamespace(follow=lambda: wires.take_step(self.rank))
        engine = Engine(self.runners[-1], fake_tokenizer(), Limits(max_batch_size=2, can_batch=True), 99, VOCAB)
        vars(model).update(
            ring=self.ring, pipeline=pipeline, follower=follower, max_context=99, vocab_size=VOCAB, _engine=engine,
            _number=self.ring.next_number(), _num_requests=0, _num_loops=0, _loop=None,
        )  # fmt: skip
        return model

    def loop(self, *prompts: list[int], model: int = 0, params: SamplingParams = PARAMS) -> Any:
        numbers = self.models[model].next_numbers(len(prompts))
        requests = [Request(number, prompt, params) for number, prompt in zip(numbers, prompts, strict=True)]
        return self.models[model].answer(requests)

    def tokens(self, *prompts: list[int]) -> list[tuple[int, int | None]]:
        return [(output.request_id, output.token) for output in self.loop(*prompts)]


def run(script: Callable[[Script], Any], size: int = 2, num_models: int = 1) -> list[Any]:
    """Run a script on all ranks; return what each returns, or raises; a rank that waits for ever fails."""
    wires = Wires(size)
    found: list[Any] = [None] * size

    def rank(number: int) -> None:
        try:
            found[number] = script(Script(number, wires, num_models))
        except HippoError as error:
            found[number] = error

    running = [greenlet(rank) for _ in range(size)]
    for turn in range(10_000):
        alive = [(number, one) for number, one in enumerate(running) if not one.dead]
        for number, one in alive:
            one.switch(number) if turn == 0 else one.switch()
        if not alive or any(isinstance(one, HippoError) for one in found):
            return found  # a failure ends all ranks
    raise AssertionError("a rank waits for ever")


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_loop_may_be_left_and_another_begun(size: int) -> None:
    def script(here: Script) -> Any:
        alone = here.tokens([3, 4], [5])
        left = here.loop([7, 8])
        next(left)
        second = here.tokens([3, 4], [5])
        with pytest.raises(UserError, match="closed by a later generate"):
            next(left)
        next(here.loop([9]))  # and dropped
        return alone, second, here.tokens([3, 4], [5])

    found = run(script, size)
    assert found == [found[0]] * size
    assert len({str(tokens) for tokens in found[0]}) == 1 and len(found[0][0]) == 12


@pytest.mark.parametrize("size", [1, 2])
def test_loops_of_one_llm_in_turns_end_the_first(size: int) -> None:
    def script(here: Script) -> Any:
        with pytest.raises(UserError, match="closed by a later generate"):
            list(zip(here.loop([3]), here.loop([4]), strict=True))
        first, second = here.loop([3]), here.loop([4])  # of which none is begun
        return len(list(first)), len(list(second))

    assert run(script, size) == [(6, 6)] * size


@pytest.mark.parametrize("size", [1, 2])
def test_loops_of_two_llms_in_turns_are_refused(size: int) -> None:
    def script(here: Script) -> Any:
        first = here.loop([3])
        next(first)
        with pytest.raises(UserError, match="another LLM is in use"):
            next(here.loop([4], model=1))
        with pytest.raises(UserError, match="another LLM is in use"):
            here.ring.settle()  # as a model's call does
        rest = len(list(first))
        next(here.loop([3]))
        return rest, len(list(here.loop([4], model=1)))

    assert run(script, size, num_models=2) == [(5, 6)] * size


def leaves(rank: int, after: int) -> Callable[[Script], Any]:
    """Return a script in which one rank leaves its loop early, and begins another."""

    def script(here: Script) -> Any:
        for number, _ in enumerate(here.loop([3], [4])):
            if number == after and here.rank == rank:
                break
        return here.tokens([5])

    return script


@pytest.mark.parametrize("after", [0, 3, 9])
def test_a_loop_that_only_some_ranks_leave_ends_the_script(after: int) -> None:
    found = run(leaves(0, after))
    assert isinstance(found[1], RankError) and "rank 0 left a loop" in str(found[1])
    found = run(leaves(2, after), 3)
    assert isinstance(found[2], RankError) and "that rank 0 continues" in str(found[2])


def test_a_script_may_go_on_after_the_last_output_that_counts() -> None:
    def script(here: Script) -> Any:
        for output in here.loop([3]):
            if output.finish_reason and here.rank == 1:
                break
        return len(here.tokens([5]))

    assert run(script) == [6, 6]


@pytest.mark.parametrize("is_orderly", [True, False])
def test_the_end_of_with_ends_the_loop(is_orderly: bool) -> None:
    """After an exception this rank does nothing on its own, but ends the loop when all ranks use the ring again."""

    def script(here: Script) -> Any:
        left = here.loop([3])
        next(left)
        here.models[0].leave(is_orderly)
        assert (here.ring.open_loop is None) == is_orderly
        here.ring.settle()
        with pytest.raises(UserError, match="or with its LLM"):
            next(left)
        return len(list(here.loop([4], model=1)))

    assert run(script, num_models=2) == [6, 6]


def interrupted(here: Script) -> Any:
    """A script that catches Ctrl-C in the middle of a step and goes on."""
    here.runners[0].interrupts_at = 3
    try:
        list(here.loop([3]))
    except KeyboardInterrupt:
        here.models[0].leave(is_orderly=True)
    return "went on"


def test_an_interrupted_engine_is_not_run_to_its_end() -> None:
    assert run(interrupted, 1) == ["went on"]
    found = run(interrupted)
    assert isinstance(found[0], HippoError) and "interrupted" in str(found[0])
    assert found[1] is None  # ended with rank 0


def test_ranks_that_make_different_calls_are_told() -> None:
    def script(here: Script) -> Any:
        return here.tokens(*[[3]] * (1 + here.rank))

    found = run(script)
    assert "this rank is at generate() call 1 on model 1 with 2 prompts, but rank 0 at" in str(found[1])
