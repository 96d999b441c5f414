"""Many requests at once through real stages: the tokens of each are those that it gets alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx_lm import stream_generate
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_model

from hippo_mpi.engine.engine import Engine
from hippo_mpi.engine.request import Request, RequestOutput, SamplingParams
from hippo_mpi.engine.scheduler import Limits
from hippo_mpi.engine.text import open_tokenizer
from hippo_mpi.shard import Checkpoint
from tests.local_ring import LocalRing, make_stages, open_folder
from tests.parity.tiny_models import make_checkpoint
from tests.tiny_tokenizer import save_tokenizer

SPLITS = [[6], [2, 4], [1, 2, 3], [1, 1, 2, 2]]
CONTEXT = 400


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
        self.engine = Engine(self.ring.leader, tokenizer, Limits(**limits), CONTEXT, prefix_tokens)
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
ANSWERS: dict[tuple[int, int, int], list[int]] = {}


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ARRIVALS, st.sampled_from(SPLITS), st.sampled_from([0, 50, 400]), st.sampled_from([1, 3, 16]), st.booleans())
def test_company_changes_nothing(
    folder: Path,
    checkpoint: Checkpoint,
    tokenizer: TokenizerWrapper,
    arrivals: list[tuple[int, int, int, int, int | None]],
    split: list[int],
    prefix_tokens: int,
    max_batch_size: int,
    can_batch: bool,
) -> None:
    """Whatever joins, leaves or is taken back meanwhile; and in the end no slot is left but kept prefixes."""
    bench = Bench(
        checkpoint, tokenizer, split,
        max_batch_size=max_batch_size, max_batch_tokens=24, can_batch=can_batch, prefix_tokens=prefix_tokens,
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
    assert not bench.ring.leader.caches._blocks
    while bench.ring.queues[1 % len(split)] and len(split) > 1:
        for follower in bench.ring.followers:
            follower.follow()
    for follower in bench.ring.followers:
        assert not follower._caches._blocks
