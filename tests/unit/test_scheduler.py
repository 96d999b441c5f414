"""Every place where a sequence may be when it ends, joins or is aborted, by numbers alone: no slot of it stays."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from itertools import count
from typing import Any

import numpy as np
import pytest

from hippo_mpi.engine.prefill import Limits
from hippo_mpi.engine.prefix_cache import PrefixBudget, PrefixCache
from hippo_mpi.engine.request import Request, SamplingParams, Sequence, Timings
from hippo_mpi.engine.scheduler import Scheduler
from hippo_mpi.engine.slots import SlotChanges, Slots
from hippo_mpi.parallel.step import Step
from tests.unit import fake_runner
from tests.unit.fake_runner import logits_after


class Bench:
    """A scheduler, what its plans leave in the ranks' slots, and the steps that are under way."""

    def __init__(self, num_stages: int = 1, prefix_tokens: int | None = None, **limits: Any) -> None:
        budget = None if prefix_tokens is None else PrefixBudget(prefix_tokens, lambda num_tokens: num_tokens)
        self.held = fake_runner.Slots(can_trim=True)
        limits = {"max_batch_size": 8, "max_batch_tokens": 8, "prefill_chunk": 4, "can_batch": True, **limits}
        self.scheduler = Scheduler(num_stages, Limits(**limits), PrefixCache(budget, lambda slot: True), count())
        self.num_stages = num_stages
        self.in_flight: deque[tuple[Step, list[int]]] = deque()  # with each row's next token

    def add(self, prompt: list[int], max_tokens: int = 3, salt: str = "") -> Sequence:
        request = Request(next(_numbers), prompt, SamplingParams(max_tokens=max_tokens), cache_salt=salt)
        sequence = Sequence(request, list(prompt), None, None, Timings())
        self.scheduler.add(sequence)
        return sequence

    def begin(self) -> Step | None:
        step = self.scheduler.next_step()
        if step is not None:
            self.take(step, step.tokens)
        return step

    def begin_ahead(self) -> Step | None:
        """Of the oldest step."""
        step, tokens = self.in_flight[0]
        ahead = self.scheduler.step_ahead(step)
        if ahead is not None:
            self.take(ahead, [[token] for token in tokens])
        return ahead

    def take(self, step: Step, tokens: list[list[int]]) -> None:
        self.held.rearrange(step.plan)
        held = self.held.take(step.plan, tokens) if step.plan.has_rows else []
        if step.plan.wants_logits:
            self.in_flight.append((step, [int(np.argmax(logits_after(row)[2:])) + 2 for row in held]))

    def finish(self) -> Step:
        """The oldest step."""
        step, tokens = self.in_flight.popleft()
        ended = []
        for row, token in zip(step.rows, tokens, strict=True):
            if not row.is_ended:
                row.tokens += [] if row.is_aborted else [token]
                if row.is_aborted or len(row.tokens) == row.max_total_tokens:
                    ended.append(row)
        self.scheduler.commit(step, ended)
        return step

    def tick(self) -> Step | None:
        """Begin a step, or finish one if as many are under way as there are stages; the one that was begun."""
        step = self.begin() if len(self.in_flight) < self.num_stages else None
        if step is None and self.in_flight:
            self.finish()
        return step

    def run(self) -> None:
        for _ in range(400):
            if self.tick() is None and not self.in_flight and self.begin() is None:
                break
        assert self.scheduler.is_empty

    def check_nothing_left(self) -> None:
        self.run()
        assert self.scheduler.is_settled or self.begin() is not None
        assert all(company == {slot} for slot, company in self.held.company.items()), "kept ones share a cache"
        self.scheduler.forget_prefixes()
        self.run()
        assert self.scheduler.is_settled and not self.held.tokens
        slots = self.scheduler._slots
        assert sorted(slots._free) == list(range(slots._count))


_numbers = count()


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return [(seed + 5 * i * i + i) % 22 + 2 for i in range(length)]


def waits(bench: Bench) -> Sequence:
    for seed in range(8):
        bench.add(prompt_of(9, seed))
    wanted = bench.add([3, 4])
    bench.begin()
    assert bench.scheduler.num_waiting == 1
    return wanted


def has_no_slot_yet(bench: Bench) -> Sequence:
    bench.add(prompt_of(9))
    wanted = bench.add(prompt_of(30, 1))
    bench.begin()
    assert wanted.slot < 0 and not bench.scheduler.num_waiting
    return wanted


def is_half_read(bench: Bench) -> Sequence:
    wanted = bench.add(prompt_of(9))
    bench.begin()
    assert wanted.position == 4
    return wanted


def is_read(bench: Bench) -> Sequence:
    wanted = bench.add(prompt_of(5))
    bench.begin()
    assert wanted.position == 4 and bench.scheduler.running == [wanted]
    return wanted


def is_forked_in_the_next_step(bench: Bench) -> Sequence:
    bench.add(prompt_of(20), max_tokens=20)
    while not bench.in_flight:
        bench.begin()
    wanted = bench.add(prompt_of(19))
    bench.finish()
    bench.scheduler.next_alone()
    assert wanted.slot >= 0 and wanted.slot not in bench.held.tokens
    return wanted


def rests(bench: Bench) -> Sequence:
    """In a micro-batch of its own, while the other one is under way."""
    wanted, other = bench.add([3, 4]), bench.add([5, 6])
    while len(bench.in_flight) < 2:
        bench.begin()
    while bench.finish().rows != [wanted]:
        bench.begin()
    assert bench.scheduler.running == [wanted, other] or bench.scheduler.running == [other, wanted]
    return wanted


def joins_rows_in_flight(bench: Bench) -> Sequence:
    others = [bench.add([3, 4], 9), bench.add([5, 6], 9)]
    while len(bench.in_flight) < 2:
        bench.begin()
    wanted = bench.add([7, 8])
    bench.begin()
    assert len(bench.scheduler.running) == 3 and wanted.position == 1 and others[0].position == 2
    return wanted


def is_in_flight(bench: Bench) -> Sequence:
    wanted = bench.add([3, 4])
    while not bench.in_flight:
        bench.begin()
    return wanted


def is_in_flight_twice(bench: Bench) -> Sequence:
    wanted = is_in_flight(bench)
    assert bench.begin_ahead() is not None
    return wanted


MOMENTS: list[Callable[[Bench], Sequence]] = [
    waits, has_no_slot_yet, is_half_read, is_read, is_forked_in_the_next_step, rests, joins_rows_in_flight,
    is_in_flight, is_in_flight_twice,
]  # fmt: skip


@pytest.mark.parametrize("prefix_tokens", [None, 100])
@pytest.mark.parametrize("moment", MOMENTS, ids=lambda moment: str(moment.__name__))
def test_abort_at_any_moment(moment: Callable[[Bench], Sequence], prefix_tokens: int | None) -> None:
    bench = Bench(2, 1000 if moment is is_forked_in_the_next_step else prefix_tokens)
    sequence = moment(bench)
    num_tokens, is_under_way = len(sequence.tokens), "flight" in moment.__name__ and moment is not joins_rows_in_flight
    assert bench.scheduler.abort(sequence) is not is_under_way
    assert sequence.is_aborted == is_under_way
    others = [row for row in bench.scheduler.running if row is not sequence]
    bench.run()
    assert len(sequence.tokens) == num_tokens
    assert all(len(row.tokens) == row.max_total_tokens for row in others)
    bench.check_nothing_left()


def test_an_end_that_comes_while_a_step_ahead_is_under_way() -> None:
    """Its slot is free when that one, which is in vain, has come back."""
    bench = Bench()
    sequence = bench.add([3, 4], max_tokens=9)
    while not bench.in_flight:
        bench.begin()
    assert bench.begin_ahead() is not None
    (first, tokens) = bench.in_flight.popleft()
    sequence.tokens.append(tokens[0])
    bench.scheduler.commit(first, [sequence])  # an end token
    assert bench.scheduler.running == [sequence] and bench.scheduler.next_step() is None
    second, _ = bench.in_flight.popleft()
    bench.scheduler.commit(second, [])
    assert bench.scheduler.is_empty
    bench.check_nothing_left()


def test_what_may_come_before_a_step_ahead() -> None:
    bench = Bench(2)
    first = is_in_flight(bench)
    step, _ = bench.in_flight[0]
    joining = bench.add([5, 6])
    assert bench.begin_ahead() is None, "one waits"
    bench.begin()
    assert bench.begin_ahead() is None, "another micro-batch is ready"
    bench.begin()
    assert bench.begin_ahead() is not None
    bench.scheduler.abort(first)
    assert bench.scheduler.step_ahead(step) is None, "it is aborted"
    assert not joining.is_aborted
    bench.run()
    bench.check_nothing_left()
    last = is_in_flight(bench)
    for _ in range(last.request.sampling.max_tokens - 1):
        assert bench.begin_ahead() is not None
        bench.finish()
    assert bench.begin_ahead() is None, "it is its last token"


def test_micro_batches_stay_even_when_rows_end() -> None:
    bench = Bench(2, max_batch_tokens=100, prefill_chunk=100)
    lengths = [2, 2, 2, 12, 12, 12, 12]
    rows = [bench.add(prompt_of(5, seed), max_tokens=length) for seed, length in enumerate(lengths)]
    sizes = []
    for _ in range(200):
        if rows[-1].is_ended:
            break
        bench.tick()
        if all(row.is_ended for row in rows[:3]) and len(bench.in_flight) == 2:
            sizes.append(sorted(len(step.rows) for step, _ in bench.in_flight))
    assert sizes[4:] and all(found[0] + 1 >= found[1] for found in sizes[4:])
    bench.check_nothing_left()


@pytest.mark.parametrize("num_stages", [1, 2])
def test_rows_that_cannot_share_a_step_take_turns(num_stages: int) -> None:
    bench = Bench(num_stages, can_batch=False, max_batch_tokens=100)
    rows = [bench.add([3 + number, 4], max_tokens=9) for number in range(4)]
    spread = []
    for _ in range(200):
        bench.tick()
        made = [len(row.tokens) for row in rows]
        spread.append(max(made) - min(made))
    assert all(row.is_ended for row in rows) and max(spread) <= 2


def test_rows_that_end_together_part() -> None:
    """What is kept of them lies in caches of its own."""
    bench = Bench(prefix_tokens=100, max_batch_tokens=100, prefill_chunk=100)
    for seed in range(3):
        bench.add(prompt_of(20, seed), max_tokens=4)
    bench.run()
    assert len(bench.held.tokens) == 3
    bench.check_nothing_left()


def test_a_prompt_waits_for_another_that_begins_like_it() -> None:
    bench, read = Bench(prefix_tokens=1000, max_batch_tokens=64, prefill_chunk=64), 0
    rows = [bench.add([*prompt_of(40), seed, 9]) for seed in range(2, 6)]
    for _ in range(100):
        step = bench.tick()
        read += sum(step.plan.counts) if step is not None and not step.plan.wants_logits else 0
    assert all(row.is_ended for row in rows) and read == 41 + 3
    bench.check_nothing_left()


def test_each_request_begins_once() -> None:
    bench, told = Bench(2), list[int]()
    wanted = [bench.add(prompt_of(9, seed)).request.id for seed in range(4)]
    for _ in range(60):
        bench.tick()
        told += bench.scheduler.take_begun()
    assert sorted(told) == wanted


def test_no_more_are_let_in_than_caches_bear() -> None:
    bench = Bench(cache_tokens=40)
    for seed in range(4):
        bench.add(prompt_of(10, seed), max_tokens=3)
    big = bench.add(prompt_of(60, 5), max_tokens=3)  # one alone is let in, whatever it needs
    later = bench.add([3], max_tokens=1)
    for _ in range(200):
        bench.tick()
        under_way = [*bench.scheduler._prefill.prompts, *bench.scheduler.running]
        assert len(under_way) <= 1 or len(under_way) * max(row.max_total_tokens for row in under_way) <= 40
    assert big.is_ended and later.is_ended
    bench.check_nothing_left()


def test_prompts_let_rows_go_on() -> None:
    """Between two steps of a row at most so many prompt tokens go in, and at least some do."""
    bench = Bench(max_batch_tokens=8, prefill_chunk=4)
    bench.add([3, 4], max_tokens=40)
    while not bench.in_flight:
        bench.begin()
    bench.add(prompt_of(60))
    between = [0]
    for _ in range(30):
        step = bench.tick()
        if step is not None and step.plan.wants_logits:
            between.append(0)
        elif step is not None:
            between[-1] += step.plan.num_tokens
    assert max(between) == 8 and between.count(0) < len(between) / 2


def test_slots_are_handed_on_and_taken_back() -> None:
    """A whole prefix is taken over, a part is copied, and what is dropped is free only when ranks know."""
    slots = Slots(PrefixCache(PrefixBudget(60, lambda num_tokens: num_tokens), lambda slot: True))
    ended = Sequence(Request(0, prompt_of(20), SamplingParams()), prompt_of(20), None, None, Timings())

    def begin(prompt: list[int], *running: Sequence, salt: str = "") -> Sequence:
        sequence = Sequence(Request(1, prompt, SamplingParams(), cache_salt=salt), prompt, None, None, Timings())
        slots.begin(sequence, running)
        return sequence

    slots.release(ended)  # it never had one
    assert not slots.has_changes
    slots.begin(ended, [])
    ended.position = 20
    slots.release(ended, was_batched=True)
    assert not slots.is_settled and slots.take_changes() == SlotChanges(detached=(0,))
    stranger = begin([*prompt_of(20), 5], salt="other")
    assert (stranger.slot, stranger.position) == (1, 0)
    part = begin([*prompt_of(18), 1, 1])
    assert (part.slot, part.position) == (2, 18) and slots.take_changes() == SlotChanges(forks=((0, 2),))
    whole = begin([*prompt_of(20), 5])
    assert (whole.slot, whole.position, whole.timings.cached_tokens) == (0, 20, 20) and not slots.has_changes
    behind = begin([*prompt_of(20), 5, 6], whole)
    assert (behind.slot, behind.position) == (3, 20) and slots.take_changes() == SlotChanges(forks=((0, 3),))
    apart = begin([*prompt_of(20), 5, 6], whole, behind, salt="other")
    assert (apart.slot, apart.position) == (4, 0)
    for sequence in (stranger, part, whole, behind):
        slots.release(sequence)
    assert begin([9]).slot == 5, "nothing is free before the ranks have dropped it"
    drops = slots.take_changes().drops
    assert set(drops) < {0, 1, 2, 3} and begin([9]).slot in drops
    slots.forget_prefixes()
    assert set(slots.take_changes().drops) | set(drops) == {0, 1, 2, 3}
