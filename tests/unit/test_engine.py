"""Many requests at once through real stages: the tokens of each are those that it gets alone."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx_lm import stream_generate
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_model

from hippo_mpi.checkpoint.checkpoint import Checkpoint
from hippo_mpi.config.bundled import BUNDLED_MODEL
from hippo_mpi.engine.engine import Engine
from hippo_mpi.engine.grammar import json_grammar
from hippo_mpi.engine.prefill import Limits
from hippo_mpi.engine.prefix_cache import PrefixBudget, PrefixCache
from hippo_mpi.engine.request import Propose, Request, RequestOutput, Resume, SamplingParams, Sequence
from hippo_mpi.engine.text import open_tokenizer
from hippo_mpi.errors import DesyncError, UserError
from hippo_mpi.parallel.step import Step
from hippo_mpi.parallel.step_plan import Returns, StepPlan
from hippo_mpi.planning.machine import longest_chunk
from tests.local_ring import LocalRing, make_stages, open_folder
from tests.parity.tiny_models import make_checkpoint
from tests.tiny_tokenizer import save_tokenizer

SPLITS = [[6], [2, 4], [1, 2, 3], [1, 1, 2, 2]]
CONTEXT = 5000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_checkpoint("llama-full", tmp_path_factory.mktemp("llama"))
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Checkpoint:
    return open_folder(folder)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> TokenizerWrapper:
    return open_tokenizer(folder, None, (), False)


class Bench:
    """An engine over in-process stages, and what came out of it."""

    def __init__(self, checkpoint: Checkpoint, tokenizer: TokenizerWrapper, split: list[int], **limits: Any) -> None:
        self.ring = LocalRing(make_stages(checkpoint, split))
        prefix_tokens = limits.pop("prefix_tokens", 0)
        budget = PrefixBudget(prefix_tokens, lambda num_tokens: num_tokens) if prefix_tokens else None
        vocab_size, propose = checkpoint.config["vocab_size"], limits.pop("propose", None)
        self.engine = Engine(self.ring.leader, tokenizer, Limits(**limits), CONTEXT, vocab_size, budget, propose)
        self.tokens: dict[int, list[int]] = {}
        self.reasons: dict[int, str | None] = {}
        self.texts: dict[int, str] = {}

    def note(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            self.reasons[output.request_id] = output.finish_reason
            self.texts[output.request_id] = self.texts.get(output.request_id, "") + output.text
            if output.token is not None:
                self.tokens.setdefault(output.request_id, []).append(output.token)

    def run(self) -> None:
        self.note(list(self.engine.run()))


def prompt_of(seed: int, length: int) -> list[int]:
    return [(seed * 31 + i * i * 7 + i) % 97 + 1 for i in range(length)]


def alone(folder: Path, tokenizer: TokenizerWrapper, prompt: list[int], count: int) -> list[int]:
    """What mlx-lm itself answers."""
    model, _ = load_model(folder)
    return [piece.token for piece in stream_generate(model, tokenizer, prompt, max_tokens=count)]


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_answers_are_those_of_mlx_lm(
    folder: Path, checkpoint: Checkpoint, tokenizer: TokenizerWrapper, split: list[int]
) -> None:
    bench = Bench(checkpoint, tokenizer, split, max_batch_size=6, max_batch_tokens=16)
    wanted = {seed: (prompt_of(seed, 3 + 5 * seed), 4 + seed) for seed in range(9)}
    for seed, (prompt, count) in wanted.items():
        bench.engine.add(Request(seed, prompt, SamplingParams(max_tokens=count)))
    bench.run()
    assert bench.tokens == {seed: alone(folder, tokenizer, *asked) for seed, asked in wanted.items()}


# (steps to wait before it arrives, prompt seed, prompt length, tokens wanted, steps after which it is aborted)
ARRIVALS = st.lists(
    st.tuples(
        st.integers(0, 4), st.integers(0, 3), st.integers(1, 60), st.integers(1, 12), st.none() | st.integers(0, 9)
    ),
    min_size=1,
    max_size=16,
)
ROWS = st.sampled_from([{"can_batch": False}, {"can_batch": True}, {"can_batch": True, "can_pad": True}])
ANSWERS: dict[tuple[int, int, int], list[int]] = {}
FORESEEN: dict[tuple[int, ...], list[int]] = {}


def drafts(folder: Path, tokenizer: TokenizerWrapper, share_right: float) -> Propose:
    """Of tokens that are right so often."""
    chance = random.Random(0)

    def propose(sequence: Sequence, most: int) -> list[int]:
        prompt = sequence.request.prompt
        if tuple(prompt) not in FORESEEN:
            FORESEEN[tuple(prompt)] = alone(folder, tokenizer, prompt, 12)
        made = len(sequence.tokens) - len(prompt)
        right = FORESEEN[tuple(prompt)][made : made + min(most, chance.randint(0, 5))]
        return [token if chance.random() < share_right else (token + 1) % 97 for token in right]

    return propose


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ARRIVALS,
    st.sampled_from(SPLITS),
    st.sampled_from([0, 50, 400]),
    st.sampled_from([1, 3, 16]),
    ROWS,
    st.sampled_from([None, 0.0, 0.6, 1.0]),
)
@pytest.mark.slow
def test_company_changes_nothing(
    folder: Path,
    checkpoint: Checkpoint,
    tokenizer: TokenizerWrapper,
    arrivals: list[tuple[int, int, int, int, int | None]],
    split: list[int],
    prefix_tokens: int,
    max_batch_size: int,
    rows: dict[str, bool],
    share_right: float | None,
) -> None:
    """Whatever joins, leaves, is drafted or taken back meanwhile; and in the end no slot is left but kept prefixes."""
    bench = Bench(
        checkpoint, tokenizer, split,
        max_batch_size=max_batch_size, max_batch_tokens=24, prefix_tokens=prefix_tokens,
        propose=None if share_right is None else drafts(folder, tokenizer, share_right), **rows,
    )  # fmt: skip
    aborts: dict[int, int] = {}
    steps = 0

    def step() -> None:
        nonlocal steps
        for number in [n for n, at in aborts.items() if at <= steps]:
            bench.engine.abort(number)
            del aborts[number]
        bench.note(bench.engine.step())
        steps += 1

    for number, (delay, seed, length, count, abort) in enumerate(arrivals):
        for _ in range(delay):
            step()
        bench.engine.add(Request(number, prompt_of(seed, length), SamplingParams(max_tokens=count)))
        if abort is not None:
            aborts[number] = steps + abort
    while not bench.engine.is_idle:
        step()
    for number, (_, seed, length, count, _) in enumerate(arrivals):
        asked = (seed, length, count)
        if asked not in ANSWERS:
            ANSWERS[asked] = alone(folder, tokenizer, prompt_of(seed, length), count)
        made = bench.tokens.get(number, [])
        if bench.reasons[number] == "abort":
            assert made == ANSWERS[asked][: len(made)]
        else:
            assert made == ANSWERS[asked]
    bench.engine.forget_prefixes()
    assert not bench.ring.leader.caches._groups
    while bench.ring.queues[1 % len(split)] and len(split) > 1:
        for follower in bench.ring.followers:
            follower.follow()
    for follower in bench.ring.followers:
        assert not follower.caches._groups


def ask(bench: Bench, number: int, prompt: list[int], **sampling: Any) -> None:
    bench.engine.add(Request(number, prompt, SamplingParams(**sampling)))


def plans_of(bench: Bench) -> list[StepPlan]:
    """A list that every further plan is added to."""
    plans: list[StepPlan] = []
    build = bench.ring.leader._build

    def noting_build(step: Step, ids: mx.array) -> Any:
        plans.append(step.plan)
        return build(step, ids)

    bench.ring.leader._build = noting_build  # type: ignore[method-assign]
    return plans


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_steps_are_built_before_their_tokens_are_known(
    folder: Path, checkpoint: Checkpoint, tokenizer: TokenizerWrapper, split: list[int]
) -> None:
    """But for the first one, and none behind the last token; where an end comes unforeseen, the step is in vain."""
    bench, ahead = Bench(checkpoint, tokenizer, split), []
    advance = bench.ring.leader.advance

    def noting_advance(step: Step | None = None, ids: mx.array | None = None) -> None:
        ahead.extend([step] if step else [])
        advance(step, ids)

    bench.ring.leader.advance = noting_advance  # type: ignore[method-assign]
    for number, (length, count, ends) in enumerate(((20, 12, True), (41, 6, False))):
        ask(bench, number, prompt_of(0, length), max_tokens=count)
        ahead.clear()
        bench.run()
        assert bench.tokens[number] == alone(folder, tokenizer, prompt_of(0, length), count)
        assert (bench.tokens[number][-1] in tokenizer.eos_token_ids) == ends
        assert len(ahead) == len(bench.tokens[number]) - (0 if ends else 1)


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.slow
def test_short_prompts_are_read_together(
    folder: Path, checkpoint: Checkpoint, tokenizer: TokenizerWrapper, split: list[int]
) -> None:
    bench = Bench(checkpoint, tokenizer, split, max_batch_size=12, max_batch_tokens=512)
    plans = plans_of(bench)
    wanted = {number: (prompt_of(number, 9 + number), 6) for number in range(12)}
    for number, (prompt, count) in wanted.items():
        ask(bench, number, prompt, max_tokens=count)
    bench.run()
    reading = [plan for plan in plans if plan.has_rows and not plan.wants_logits]
    assert sum(sum(plan.counts) for plan in reading) == sum(8 + number for number in range(12))
    assert len(reading) <= 5
    assert all(plan.num_tokens <= 2 * min(plan.counts) for plan in reading)
    assert bench.tokens == {number: alone(folder, tokenizer, *asked) for number, asked in wanted.items()}


def test_kept_prefixes_hold_no_more_than_their_rows(checkpoint: Checkpoint, tokenizer: TokenizerWrapper) -> None:
    """A row that leaves a batch must not hold on to the memory of the whole batch."""
    bench = Bench(checkpoint, tokenizer, [6], max_batch_size=16, max_batch_tokens=400, prefix_tokens=1 << 20)
    for number in range(48):
        bench.engine.add(Request(number, prompt_of(number, 40), SamplingParams(max_tokens=8 + number % 5)))
    bench.run()
    kept, with_them = bench.ring.leader.caches.num_bytes, mx.get_active_memory()
    bench.engine.forget_prefixes()
    assert kept > 0
    assert with_them - mx.get_active_memory() < 3 * kept


def test_rows_that_end_together_keep_the_room_of_their_tokens(
    checkpoint: Checkpoint, tokenizer: TokenizerWrapper
) -> None:
    """They leave their batch, whose caches grow by 256 tokens at a time, at once."""
    bench = Bench(checkpoint, tokenizer, [6], max_batch_size=8, max_batch_tokens=400, prefix_tokens=1 << 20)
    for number in range(8):
        ask(bench, number, prompt_of(number, 40), max_tokens=9, ignore_eos=True)
    bench.run()
    config = checkpoint.config
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    token_bytes = 6 * 2 * config["num_key_value_heads"] * head_dim * 4
    assert bench.ring.leader.caches.num_bytes == 8 * (40 + 9 - 1) * token_bytes


def test_slots_that_go_together_move_their_company_once(checkpoint: Checkpoint, tokenizer: TokenizerWrapper) -> None:
    ring = LocalRing(make_stages(checkpoint, [6]))
    leader, slots = ring.leader, tuple(range(6))
    ring.step(StepPlan(0, slots, (0,) * 6, (8,) * 6), [prompt_of(slot, 8) for slot in slots])
    moves, keep_rows = [], leader.caches._keep_rows
    leader.caches._keep_rows = lambda block, rows: (moves.append(rows), keep_rows(block, rows))  # type: ignore[assignment,func-returns-value]
    ring.step(StepPlan(1, detached=(1, 2), drops=(0, 3)), [])
    assert len(moves) == 2  # one for those that part, one for those that are dropped
    together = ring.step(StepPlan(2, (4, 5), (8, 8), (1, 1), Returns.LOGITS), [[7], [7]])
    apart = ring.step(StepPlan(3, (1,), (8,), (1,), Returns.LOGITS), [[7]])
    again = LocalRing(make_stages(checkpoint, [6]))
    assert together and apart
    for slot, logits in ((4, together.logits[0, -1]), (5, together.logits[1, -1]), (1, apart.logits[0, -1])):
        wanted = again.logits([*prompt_of(slot, 8), 7], 0, slot)[0, -1]
        assert mx.allclose(logits, wanted, atol=1e-4).item()
    with pytest.raises(DesyncError, match="slot 3 holds nothing"):
        ring.step(StepPlan(4, detached=(3,)), [])


def test_a_long_prompt_is_read_in_steps_that_suit_the_machine(
    checkpoint: Checkpoint, tokenizer: TokenizerWrapper
) -> None:
    for split in [6], [2, 4]:
        bench, read = Bench(checkpoint, tokenizer, split), [0]
        bench.engine.on_prefill = lambda done, total, read=read: read.append(done)  # type: ignore[misc]
        bench.engine.add(Request(0, prompt_of(1, 2 * longest_chunk() + 88), SamplingParams(max_tokens=1)))
        bench.run()
        longest = max(after - before for before, after in pairwise(read))
        assert longest == longest_chunk() if len(split) == 1 else 64 <= longest <= min(512, longest_chunk())


@pytest.mark.slow
@pytest.mark.parametrize("split", SPLITS[::2], ids=str)
def test_a_long_prompt_stalls_nobody(checkpoint: Checkpoint, tokenizer: TokenizerWrapper, split: list[int]) -> None:
    """While 2,048 tokens are read, every running stream goes on, at most `max_batch_tokens` of them later."""
    bench = Bench(checkpoint, tokenizer, split, max_batch_size=8, max_batch_tokens=128)
    plans = plans_of(bench)
    goes_on = ((tokenizer.eos_token_id, -1000.0),)
    for number in range(4):
        ask(bench, number, prompt_of(number, 8), max_tokens=160, logit_bias=goes_on)
    while len(bench.tokens) < 4:
        bench.note(bench.engine.step())
    ask(bench, 4, prompt_of(4, 2048), max_tokens=2)
    while 4 not in bench.tokens:
        bench.note(bench.engine.step())
    reading = [index for index, plan in enumerate(plans) if plan.slots == (4,) and plan.num_tokens > 1]
    assert sum(plans[index].num_tokens for index in reading) == 2047
    for slot in range(4):
        between_tokens = between_steps = 0
        for plan in plans[reading[0] : reading[-1]]:
            between_tokens += plan.num_tokens if plan.slots == (4,) else 0
            between_steps += 1
            assert between_tokens <= 128
            assert between_steps <= 3 * len(split)
            if slot in plan.slots:
                between_tokens = between_steps = 0


@pytest.mark.slow
@pytest.mark.parametrize("split", SPLITS[::2], ids=str)
def test_a_huge_prompt_starves_no_other(checkpoint: Checkpoint, tokenizer: TokenizerWrapper, split: list[int]) -> None:
    """Short prompts that come while it is read are answered before it is read to its end, and it isn't starved either."""
    bench = Bench(checkpoint, tokenizer, split, max_batch_size=8, max_batch_tokens=128)
    plans = plans_of(bench)
    ask(bench, 0, prompt_of(0, 2048), max_tokens=1)
    bench.note(bench.engine.step())
    for number in range(1, 5):
        ask(bench, number, prompt_of(number, 8), max_tokens=2)
    while 0 not in bench.tokens:
        bench.note(bench.engine.step())
        if len(bench.tokens) == 4:
            read = sum(plan.num_tokens for plan in plans if plan.slots == (0,) and not plan.wants_logits)
            assert read <= 2048 // 2
            break
    number = 5
    while 0 not in bench.tokens:  # others keep coming
        ask(bench, number, prompt_of(number, 8), max_tokens=1)
        for _ in range(4):
            bench.note(bench.engine.step())
        number += 1
        assert number < 200


def test_seeded_requests_don_t_depend_on_company(
    folder: Path, checkpoint: Checkpoint, tokenizer: TokenizerWrapper
) -> None:
    sampling = {"max_tokens": 12, "temp": 1.0, "top_p": 0.9, "seed": 7}
    single = Bench(checkpoint, tokenizer, [6])
    ask(single, 0, prompt_of(0, 9), **sampling)
    single.run()
    crowd = Bench(checkpoint, tokenizer, [2, 4], max_batch_size=8)
    for number in range(6):
        seed = None if number == 5 else 7 + number
        ask(crowd, number, prompt_of(number, 9), **{**sampling, "seed": seed})
    crowd.run()
    model, _ = load_model(folder)
    mx.random.seed(7)
    pieces = stream_generate(model, tokenizer, prompt_of(0, 9), 12, sampler=make_sampler(temp=1.0, top_p=0.9))
    assert crowd.tokens[0] == single.tokens[0] == [piece.token for piece in pieces]
    assert len({tuple(tokens) for tokens in crowd.tokens.values()}) == 6


def test_logprobs_are_the_model_s(folder: Path, checkpoint: Checkpoint, tokenizer: TokenizerWrapper) -> None:
    bench = Bench(checkpoint, tokenizer, [2, 4], max_batch_size=4)
    for number in range(3):
        ask(bench, number, prompt_of(number, 7), max_tokens=1, logprobs=3)
    model, _ = load_model(folder)
    for output in bench.engine.run():
        logits = model(mx.array([prompt_of(output.request_id, 7)]))[0, -1]
        expected = logits - mx.logsumexp(logits)
        assert output.logprobs is not None
        assert output.logprobs.top[0][0] == output.token
        assert output.logprobs.chosen == pytest.approx(expected[output.token].item(), abs=1e-4)
        assert [token for token, _ in output.logprobs.top] == mx.argsort(-expected)[:3].tolist()


def test_stop_words_and_processors_work_per_row(checkpoint: Checkpoint, tokenizer: TokenizerWrapper) -> None:
    plain = Bench(checkpoint, tokenizer, [2, 4], max_batch_size=4)
    for number in range(3):
        ask(plain, number, prompt_of(number, 7), max_tokens=8)
    plain.run()
    word = tokenizer.decode([plain.tokens[1][3]])
    changed = Bench(checkpoint, tokenizer, [2, 4], max_batch_size=4)
    ask(changed, 0, prompt_of(0, 7), max_tokens=8)
    ask(changed, 1, prompt_of(1, 7), max_tokens=8, stop_words=(word,))
    ask(changed, 2, prompt_of(2, 7), max_tokens=8, logit_bias=((42, 1000.0),))
    changed.run()
    assert changed.tokens[0] == plain.tokens[0]
    assert changed.texts[1] == plain.texts[1][: plain.texts[1].index(word)]
    assert changed.reasons[1] == "stop"
    assert changed.tokens[2] == [42] * 8


def test_a_prompt_s_tokens_are_as_likely_as_the_model_says(
    folder: Path, checkpoint: Checkpoint, tokenizer: TokenizerWrapper
) -> None:
    """Forced tokens, end tokens among them, beside an answer that is sampled; also taken up elsewhere in their midst."""
    (end,) = tokenizer.eos_token_ids
    first, *others = tokens = [*prompt_of(3, 6), end, *prompt_of(4, 5)]
    model, _ = load_model(folder)
    logits = model(mx.array([tokens]))[0].astype(mx.float32)
    wanted = (logits - mx.logsumexp(logits, axis=-1, keepdims=True))[mx.arange(len(others)), mx.array(others)].tolist()
    params = SamplingParams(max_tokens=len(others) + 2, forced=tuple(others), logprobs=1)
    bench = Bench(checkpoint, tokenizer, [2, 4], max_batch_size=4)
    bench.engine.add(Request(0, [first], params))
    bench.engine.add(Request(1, prompt_of(1, 7), SamplingParams(max_tokens=9, temp=1.0, seed=3)))
    bench.engine.add(Request(2, [first], params, Resume(others[:4], 0)))
    told = list(bench.engine.run())
    bench.note(told)
    assert bench.tokens[0][: len(others)] == others and bench.tokens[2][: len(others) - 4] == others[4:]
    assert bench.tokens[0][len(others) :] == alone(folder, tokenizer, tokens, 2)
    found = [output.logprobs.chosen for output in told if output.request_id == 0 and output.logprobs]
    assert found[: len(others)] == pytest.approx(wanted, abs=1e-3)
    with pytest.raises(UserError, match="the prompt has 5001 tokens"):
        ask(bench, 3, [9], forced=(9,) * 5000)


def test_an_answer_does_not_end_too_soon(checkpoint: Checkpoint, tokenizer: TokenizerWrapper) -> None:
    """End tokens wait for `min_tokens`, also behind an answer that goes on elsewhere; a grammar's end doesn't."""
    bench = Bench(checkpoint, tokenizer, [2, 4], max_batch_size=4)
    (end,) = tokenizer.eos_token_ids
    ends = SamplingParams(max_tokens=20, logit_bias=((end, 100.0),))
    bench.engine.add(Request(0, prompt_of(1, 5), ends))
    bench.engine.add(Request(1, prompt_of(1, 5), replace(ends, min_tokens=5)))
    bench.engine.add(Request(2, prompt_of(1, 5), replace(ends, min_tokens=5), Resume([7, 8, 9], 0)))
    bench.engine.add(Request(3, prompt_of(1, 5), replace(ends, min_tokens=1 << 30)))
    bench.run()
    assert [len(bench.tokens[i]) for i in range(4)] == [1, 6, 3, 20]
    assert [bench.reasons[i] for i in range(4)] == ["stop", "stop", "stop", "length"]
    assert end not in bench.tokens[3]


def test_what_does_not_fit_waits_or_is_refused(checkpoint: Checkpoint, tokenizer: TokenizerWrapper) -> None:
    bench = Bench(checkpoint, tokenizer, [2, 4], max_batch_size=8, cache_tokens=60)
    vocab_size = checkpoint.config["vocab_size"]
    for wrong in (vocab_size, -1, 2**40):
        with pytest.raises(UserError, match=f"token {wrong} is not in the vocabulary of {vocab_size:,} tokens"):
            ask(bench, 0, [1, wrong, 2], max_tokens=20)
        with pytest.raises(UserError, match=f"token {wrong} is not in the vocabulary"):
            ask(bench, 0, [1, 2], max_tokens=20, logit_bias=((wrong, 1.0),))
    with pytest.raises(UserError, match="the prompt has 5000 tokens, but this model's maximum context length is 5000"):
        ask(bench, 0, prompt_of(0, 5000), max_tokens=20)
    for number in range(4):
        ask(bench, number, prompt_of(number, 20), max_tokens=10)
    bench.note(bench.engine.step())
    assert bench.engine.num_waiting == 2
    bench.run()
    assert sorted(bench.tokens) == [0, 1, 2, 3]


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_prefixes_are_prefilled_once(
    folder: Path, checkpoint: Checkpoint, tokenizer: TokenizerWrapper, split: list[int]
) -> None:
    """A shared header while its first user still runs; then a conversation's next turn."""
    bench = Bench(checkpoint, tokenizer, split, max_batch_size=4, prefix_tokens=120)
    header = prompt_of(0, 40)
    prompts = {number: [*header, 90 + number, 3] for number in range(4)}
    for number, prompt in prompts.items():
        ask(bench, number, prompt, max_tokens=5)
    cached: dict[int, int] = {}

    def run() -> None:
        for output in bench.engine.run():
            bench.note([output])
            cached[output.request_id] = output.timings.cached_tokens

    run()
    assert cached == {0: 0, 1: 40, 2: 40, 3: 40}
    prompts[4] = [*prompts[0], *bench.tokens[0], 7, 8]
    ask(bench, 4, prompts[4], max_tokens=5)
    run()
    assert cached[4] == 40 + 2 + 4 or cached[4] == 40  # kept to the last token, or cut by the budget to the header
    for number, prompt in prompts.items():
        assert bench.tokens[number] == alone(folder, tokenizer, prompt, 5)


def test_prefixes_of_others_are_of_no_use(checkpoint: Checkpoint, tokenizer: TokenizerWrapper) -> None:
    """Neither what is kept nor what is running, nor does a prompt wait for one that may not be shared."""
    bench = Bench(checkpoint, tokenizer, [2, 4], max_batch_size=4, prefix_tokens=500)
    header, cached = prompt_of(0, 40), {}
    for numbers in (range(4), range(4, 8)):
        for number in numbers:
            salt = "" if number % 2 else "salt"
            bench.engine.add(Request(number, [*header, 90 + number, 3], SamplingParams(max_tokens=5), cache_salt=salt))
        for output in bench.engine.run():
            cached[output.request_id] = output.timings.cached_tokens
    assert [cached[number] for number in (0, 1, 4, 5, 6, 7)] == [0, 0, 40, 40, 40, 40]
    prefixes = PrefixCache(PrefixBudget(200, lambda num_tokens: num_tokens), lambda slot: True)
    assert prefixes.keep(0, header, "a") == prefixes.keep(1, [*header, 5], "b") == []
    assert prefixes.match([*header, 5, 6], [], "a") == (0, 40) and prefixes.match([*header, 5, 6], []) is None
    assert prefixes.keep(2, header, "a") == [2] and prefixes.keep(3, [*header, 7], "b") == []


def test_least_recently_used_prefixes_go() -> None:
    prefixes = PrefixCache(PrefixBudget(60, lambda num_tokens: num_tokens), lambda slot: True)
    for slot in range(3):
        assert prefixes.keep(slot, list(range(100 * slot, 100 * slot + 20))) == []
    assert prefixes.match([*range(20), 7], []) == (0, 20)
    assert prefixes.keep(3, list(range(300, 320))) == [1]
    assert prefixes.match([*range(100, 120), 7], []) is None


def test_state_space_models_reuse_whole_prefixes_only(tmp_path: Path) -> None:
    folder = make_checkpoint("mamba2", tmp_path)
    save_tokenizer(folder)
    tokenizer, checkpoint = open_tokenizer(folder, None, (), False), open_folder(folder)
    bench = Bench(checkpoint, tokenizer, [1, checkpoint.flow.num_layers - 1], prefix_tokens=500)
    first = prompt_of(1, 30)
    prompts = {0: first, 1: [*first[:-3], 5, 6]}
    for number, prompt in prompts.items():
        ask(bench, number, prompt, max_tokens=4)
        bench.run()
    prompts[2] = [*first, *bench.tokens[0], 9]
    bench.engine.add(Request(2, prompts[2], SamplingParams(max_tokens=4)))
    outputs = list(bench.engine.run())
    bench.note(outputs)
    assert outputs[-1].timings.cached_tokens == 33
    for number, prompt in prompts.items():
        assert bench.tokens[number] == alone(folder, tokenizer, prompt, 4)


def test_rows_whose_first_step_is_a_shared_one(
    folder: Path, checkpoint: Checkpoint, tokenizer: TokenizerWrapper
) -> None:
    """A prompt of one token, and one that is cached but for its last token, beside a row that runs."""
    bench = Bench(checkpoint, tokenizer, [2, 4], max_batch_size=8, prefix_tokens=1000)
    prompts = {0: prompt_of(0, 40), 1: prompt_of(1, 30), 2: prompt_of(0, 40), 3: [7], 4: prompt_of(1, 30), 5: [9]}
    ask(bench, 0, prompts[0], max_tokens=6)
    bench.run()
    ask(bench, 1, prompts[1], max_tokens=30)
    while 1 not in bench.tokens:
        bench.note(bench.engine.step())
    for number in (2, 3, 4, 5):
        ask(bench, number, prompts[number], max_tokens=6)
    bench.run()
    for number, prompt in prompts.items():
        assert bench.tokens[number] == alone(folder, tokenizer, prompt, 30 if number == 1 else 6)


def test_top_k_above_the_vocabulary_is_all_of_it(checkpoint: Checkpoint, tokenizer: TokenizerWrapper) -> None:
    bench = Bench(checkpoint, tokenizer, [2, 4], max_batch_size=2)
    for number, top_k in enumerate((0, checkpoint.config["vocab_size"], 1 << 30)):
        ask(bench, number, prompt_of(0, 9), max_tokens=8, temp=1.0, seed=3, top_k=top_k)
    bench.run()
    assert bench.tokens[0] == bench.tokens[1] == bench.tokens[2]


def test_few_tokens_between_steps_still_let_prompts_in(checkpoint: Checkpoint, tokenizer: TokenizerWrapper) -> None:
    bench = Bench(checkpoint, tokenizer, [1, 1, 2, 2], max_batch_size=4, max_batch_tokens=3)
    for number in range(4):
        ask(bench, number, prompt_of(number, 12), max_tokens=200)
    for _ in range(120):
        bench.note(bench.engine.step())
    assert set(bench.tokens) == {0, 1, 2, 3}


def test_an_answer_follows_its_grammar(checkpoint: Checkpoint, tokenizer: TokenizerWrapper) -> None:
    """Beside others that have none, to its end; and taken up elsewhere in the middle of it."""
    story, words = open_folder(BUNDLED_MODEL), open_tokenizer(BUNDLED_MODEL, [4, 0], (), False)
    schema = {"type": "object", "properties": {"fox": {"type": "boolean"}}, "required": ["fox"]}
    params = SamplingParams(max_tokens=40, grammar=json_grammar({**schema, "additionalProperties": False}))
    bench = Bench(story, words, [4, 8], max_batch_size=4)
    bench.engine.add(Request(0, [9, 10, 11], params))
    ask(bench, 1, prompt_of(2, 9), max_tokens=9)
    outputs = list(bench.engine.run())
    bench.note(outputs)
    assert json.loads(bench.texts[0])["fox"] in (True, False)
    assert bench.reasons[0] == "stop"
    told = [output for output in outputs if output.request_id == 0][:3]
    resume = Resume(bench.tokens[0][:3], sum(len(output.text) for output in told))
    other = Bench(story, words, [12], max_batch_size=4)
    other.engine.add(Request(0, [9, 10, 11], params, resume))
    other.engine.add(Request(1, [9, 10, 11], replace(params, min_tokens=1 << 30)))
    other.run()
    assert bench.tokens[0][3:] == other.tokens[0]
    # At the grammar's end there is nothing else to say than one of the end tokens.
    assert bench.tokens[0][:-1] == other.tokens[1][:-1]
    assert {bench.tokens[0][-1], other.tokens[1][-1]} <= set(words.eos_token_ids)


def test_a_request_keeps_its_place_while_its_grammar_is_compiled(
    checkpoint: Checkpoint, tokenizer: TokenizerWrapper
) -> None:
    """Else, where more come than can be answered, those that wait would be passed by at each new start of the ranks."""
    story, words = open_folder(BUNDLED_MODEL), open_tokenizer(BUNDLED_MODEL, [4, 0], (), False)
    bench, told = Bench(story, words, [12], max_batch_size=1), list[str]()
    bench.engine.on_begin = lambda numbers: told.extend(f"begins {number}" for number in numbers)
    bench.engine.on_wait = lambda number: told.append(f"waits {number}")
    ask(bench, 0, prompt_of(1, 9), max_tokens=60)
    bench.engine.add(Request(1, [9, 10, 11], SamplingParams(max_tokens=3, grammar=json_grammar({"type": "boolean"}))))
    for number in range(2, 6):
        ask(bench, number, prompt_of(number, 9), max_tokens=3)
    while bench.engine._compiling:
        bench.note(bench.engine.step())
    assert not bench.reasons.get(0), "the first has ended before the grammar was compiled"
    begun = [output.request_id for output in bench.engine.run()]
    assert list(dict.fromkeys(begun)) == [0, 1, 2, 3, 4, 5]
    # While it waits, it isn't at work: no failure of the ranks is its own.
    assert [line for line in told if line.endswith("1")] == ["begins 1", "waits 1", "begins 1"]


@pytest.mark.parametrize("sampling", [{}, {"temp": 1.0, "seed": 5, "top_p": 0.9, "repetition_penalty": 1.2}], ids=str)
def test_an_answer_goes_on_where_it_was(
    checkpoint: Checkpoint, tokenizer: TokenizerWrapper, sampling: dict[str, Any]
) -> None:
    """On other ranks, from what was told of it: the same tokens, random numbers and text, cut anywhere."""
    params = SamplingParams(max_tokens=12, stop_words=("\0never",), **sampling)
    whole = Bench(checkpoint, tokenizer, [2, 4], max_batch_size=4)
    whole.engine.add(Request(0, prompt_of(3, 20), params))
    outputs = list(whole.engine.run())
    for cut in (1, 5, 11):
        told = outputs[:cut]
        text = "".join(output.text for output in told)
        tokens = [output.token for output in told if output.token is not None]
        resume = Resume(tokens, len(text), told[-1].random_state)
        other = Bench(checkpoint, tokenizer, [1, 2, 3], max_batch_size=4)
        other.engine.add(Request(7, prompt_of(3, 20), params, resume))
        rest = list(other.engine.run())
        assert [output.token for output in told + rest] == [output.token for output in outputs]
        assert text + "".join(output.text for output in rest) == "".join(output.text for output in outputs)
        assert rest[-1].finish_reason == outputs[-1].finish_reason


def test_an_empty_prompt_is_refused(checkpoint: Checkpoint, tokenizer: TokenizerWrapper) -> None:
    bench = Bench(checkpoint, tokenizer, [6])
    with pytest.raises(UserError, match="no tokens"):
        bench.engine.add(Request(0, [], SamplingParams()))
    assert bench.engine.is_idle
