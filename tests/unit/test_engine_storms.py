"""Random arrivals, aborts, failures and restarts over an engine without a model: each request ends once with its own
tokens, and nothing is left."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hippo_mpi.engine.engine import Engine
from hippo_mpi.engine.prefill import Limits
from hippo_mpi.engine.prefix_cache import PrefixBudget
from hippo_mpi.engine.request import Propose, Request, RequestOutput, Resume, SamplingParams, Sequence
from hippo_mpi.errors import ForeignError, UserError
from tests.unit.fake_runner import VOCAB, FakeRunner, fake_tokenizer

CONTEXT = 90
MAX_STEPS = 4000
FAMILIES = [[(7 * family + i * i + i) % (VOCAB - 2) + 2 for i in range(70)] for family in range(2)]
ROWS = [{"can_batch": False}, {"can_batch": True}, {"can_batch": True, "can_pad": True}, {"can_batch": None}]
SAMPLINGS = [
    {},
    {"temp": 1.0, "seed": 5},
    {"temp": 1.0, "seed": 6, "repetition_penalty": 1.2},
    {"stop_words": ("bc",)},
    {"min_tokens": 4},
    {"max_repeats": 2, "logit_bias": ((9, 9.0),)},
    {"forced": (3, 4, 5)},
]
_Ending = tuple[list[int], str, str]  # tokens, text, finish reason
_ALONE: dict[tuple[Any, ...], _Ending] = {}


def alone(request: Request) -> _Ending:
    """How a request ends that nobody disturbs."""
    key = (tuple(request.prompt), request.sampling)
    if key not in _ALONE:
        engine = Engine(FakeRunner(), fake_tokenizer(), Limits(), CONTEXT, VOCAB)
        engine.add(request)
        found = list(engine.run())
        tokens = [output.token for output in found if output.token is not None]
        _ALONE[key] = tokens, "".join(output.text for output in found), str(found[-1].finish_reason)
    return _ALONE[key]


def drafts(share_right: float, seed: int) -> Propose:
    """Of tokens that are right so often."""
    chance = random.Random(seed)

    def propose(sequence: Sequence, most: int) -> list[int]:
        made = len(sequence.tokens) - len(sequence.request.prompt)
        request = replace(sequence.request, resume=None)
        right = alone(request)[0][made : made + min(most, chance.randint(0, 4))]
        return [token if chance.random() < share_right else (token + 1) % VOCAB for token in right]

    return propose


class EngineStorm(RuleBasedStateMachine):
    """Clients that come and go, and ranks that fail under them."""

    @initialize(
        depth=st.integers(1, 4),
        can_trim=st.booleans(),
        looks_ahead=st.booleans(),
        most_rows=st.sampled_from([1, 2, 3, 8]),
        rows=st.sampled_from(ROWS),
        cache_tokens=st.sampled_from([None, 100, 250]),
        budget=st.sampled_from([None, 70, 400, 400]),
        share_right=st.sampled_from([None, None, 0.0, 0.7, 1.0]),
    )
    def begin(
        self,
        depth: int,
        can_trim: bool,
        looks_ahead: bool,
        most_rows: int,
        rows: dict[str, Any],
        cache_tokens: int | None,
        budget: int | None,
        share_right: float | None,
    ) -> None:
        self.runner_args = (depth, can_trim, looks_ahead)
        self.limits = Limits(max_batch_size=most_rows, max_batch_tokens=32, cache_tokens=cache_tokens, **rows)
        self.budget = None if budget is None else PrefixBudget(budget, lambda num_tokens: num_tokens)
        self.propose = None if share_right is None or not can_trim else drafts(share_right, depth)
        self.requests: list[Request] = []
        self.told: dict[int, list[RequestOutput]] = {}
        self.aborted: set[int] = set()
        self.begun: set[int] = set()
        self.start()

    def start(self) -> None:
        """Begin with new ranks, which go on with what isn't complete."""
        self.runner = FakeRunner(*self.runner_args)
        self.engine = Engine(self.runner, fake_tokenizer(), self.limits, CONTEXT, VOCAB, self.budget, self.propose)
        self.engine.on_begin = self.begun.update
        self.begun.clear()
        for request in self.open_requests():
            told = self.told[request.id]
            tokens = [output.token for output in told if output.token is not None]
            resume = Resume(tokens, sum(len(output.text) for output in told), told[-1].random_state if told else None)
            self.engine.add(replace(request, resume=resume) if tokens else request)

    def open_requests(self) -> Iterator[Request]:
        for request in self.requests:
            if not any(output.finish_reason for output in self.told[request.id]):
                yield request

    def step_once(self) -> None:
        for output in self.engine.step():
            told = self.told[output.request_id]
            assert not any(before.finish_reason for before in told), "an answer goes on behind its end"
            assert (output.finish_reason == "abort") == (output.request_id in self.aborted)
            if output.finish_reason not in ("abort", "error"):
                assert output.request_id in self.begun, "an output before its first step was told of"
            told.append(output)

    @rule(
        family=st.integers(0, 1),
        shared=st.sampled_from([0, 0, 15, 16, 17, 40, 40, 60]),
        rest=st.integers(1, 12),
        count=st.sampled_from([1, 2, 9, 20]),
        sampling=st.sampled_from(SAMPLINGS),
        salt=st.sampled_from(["", "", "", "salt"]),
        then=st.integers(0, 6),
    )
    def arrive(
        self, family: int, shared: int, rest: int, count: int, sampling: dict[str, Any], salt: str, then: int
    ) -> None:
        number = len(self.requests)
        prompt = FAMILIES[family][:shared] + [(number * 5 + i) % (VOCAB - 2) + 2 for i in range(rest)]
        request = Request(number, prompt, SamplingParams(max_tokens=count, **sampling), cache_salt=salt)
        self.engine.add(request)
        self.requests.append(request)
        self.told[number] = []
        self.step(then)

    @rule(count=st.sampled_from([1, 2, 4, 8, 16, 32]))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.step_once()

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), after=st.integers(0, 4))
    def abort(self, data: st.DataObject, after: int) -> None:
        self.step(after)
        self.abort_one(data.draw(st.sampled_from(self.numbers())))

    def numbers(self) -> list[int]:
        """Those of requests that haven't ended, of one that may have, and one that is unknown."""
        return [request.id for request in self.open_requests()] + [0, len(self.requests)]

    def abort_one(self, number: int) -> None:
        self.engine.abort(number)
        self.aborted |= {request.id for request in self.open_requests() if request.id == number}

    @rule(wrong=st.sampled_from([[], [VOCAB], [2, -1], [2] * CONTEXT]))
    def refuse(self, wrong: list[int]) -> None:
        with pytest.raises(UserError):
            self.engine.add(Request(len(self.requests), wrong, SamplingParams()))

    @rule(after=st.integers(0, 20))
    def ranks_fail(self, after: int) -> None:
        """In the midst of everything; aborts that weren't told are clients that are gone."""
        self.step(after)
        for request in list(self.open_requests()):
            if request.id in self.aborted:
                self.told[request.id].append(RequestOutput(request.id, "", None, None, finish_reason="abort"))  # type: ignore[arg-type]
        self.start()

    @precondition(lambda self: self.engine.is_idle)
    @rule()
    def forget_prefixes(self) -> None:
        self.engine.forget_prefixes()
        assert not self.runner.slots.tokens

    @invariant()
    def rows_and_caches_are_within_their_limits(self) -> None:
        scheduler = self.engine._scheduler
        under_way = [*scheduler._prefill.prompts, *scheduler.running]
        longest = max((row.max_total_tokens for row in under_way), default=0)
        assert len(under_way) <= self.limits.max_batch_size
        assert len(under_way) <= 1 or len(under_way) * longest <= (self.limits.cache_tokens or 1 << 30)
        if self.budget is not None:
            prefixes = scheduler._slots._prefixes
            assert sum(len(kept.tokens) for kept in prefixes._kept.values()) <= self.budget.num_bytes

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for _ in range(MAX_STEPS):
            if self.engine.is_idle:
                break
            self.step_once()
        assert self.engine.is_idle, "requests that never end"
        for request in self.requests:
            check_ending(request, self.told[request.id], request.id in self.aborted)
        check_nothing_left(self.engine, self.runner)


def check_ending(request: Request, told: list[RequestOutput], may_be_aborted: bool) -> None:
    tokens, text, reason = alone(request)
    made = [output.token for output in told if output.token is not None]
    shown = "".join(output.text for output in told)
    assert [output.finish_reason is not None for output in told] == [False] * (len(told) - 1) + [True]
    last = told[-1]
    if last.finish_reason == "abort":
        assert may_be_aborted
        assert made == tokens[: len(made)] and text.startswith(shown)
    else:
        assert (made, shown, last.finish_reason) == (tokens, text, reason)
        assert (last.error is not None) == (reason == "error")
        assert last.error is None or type(last.error) is ForeignError


def check_nothing_left(engine: Engine, runner: FakeRunner) -> None:
    """But for kept prefixes, alone in their caches, which go when they are to."""
    scheduler = engine._scheduler
    kept = scheduler._slots._prefixes._kept
    assert not engine._sequences and not engine._compiling and not engine._ended_early
    assert scheduler.is_empty and not scheduler._batch_of and not runner.num_in_flight
    dropped = set(scheduler._slots._drops)
    assert runner.slots.tokens.keys() - dropped == kept.keys()
    for slot, one in kept.items():
        held = runner.slots.tokens[slot]
        assert held[: len(one.tokens)] == one.tokens and runner.slots.company[slot] <= {slot, *dropped}
        assert engine._propose is not None or held == one.tokens  # behind them may be drafts that weren't right
    engine.forget_prefixes()
    slots = scheduler._slots
    assert not runner.slots.tokens and not kept and not slots._prefixes._num_bytes and not slots.has_changes
    assert sorted(slots._free) == list(range(slots._count))


TestEngineStorm = EngineStorm.TestCase
TestEngineStorm.settings = settings(
    max_examples=30, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)


@pytest.mark.parametrize("seed", range(30))
def test_seeded_storm(seed: int) -> None:
    """With everything as often as it takes, which hypothesis doesn't promise."""
    chance = random.Random(seed)
    storm = EngineStorm()
    storm.begin(
        depth=chance.randint(1, 4), can_trim=chance.random() < 0.7, looks_ahead=chance.random() < 0.7,
        most_rows=chance.choice([1, 3, 8]), rows=chance.choice(ROWS), cache_tokens=chance.choice([None, None, 250]),
        budget=chance.choice([None, 70, 400]), share_right=chance.choice([None, 0.0, 0.7]),
    )  # fmt: skip
    for _ in range(40):
        (what,) = chance.choices(["arrive", "step", "abort", "fail"], [6, 6, 3, 1])
        if what == "arrive":
            storm.arrive(
                chance.randint(0, 1), chance.choice([0, 16, 17, 40]), chance.randint(1, 6), chance.choice([2, 9, 20]),
                chance.choice(SAMPLINGS), chance.choice(["", "", "salt"]), chance.randint(0, 3),
            )  # fmt: skip
        elif what == "step":
            storm.step(chance.randint(1, 8))
        elif what == "abort":
            storm.abort_one(chance.choice(storm.numbers()))
        else:
            storm.ranks_fail(chance.randint(0, 5))
        storm.rows_and_caches_are_within_their_limits()
    storm.teardown()
