"""A draft model changes how many steps an answer takes, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm import stream_generate
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_model

from hippo_mpi.checkpoint.checkpoint import Checkpoint, ModelSource, open_checkpoint
from hippo_mpi.checkpoint.precision import convert
from hippo_mpi.config.bundled import BUNDLED_MODEL
from hippo_mpi.engine import drafting
from hippo_mpi.engine.drafting import Drafter
from hippo_mpi.engine.engine import Engine
from hippo_mpi.engine.grammar import json_grammar
from hippo_mpi.engine.prefill import Limits
from hippo_mpi.engine.request import Propose, Request, RequestOutput, SamplingParams, Sequence
from hippo_mpi.engine.text import encode, open_tokenizer
from hippo_mpi.errors import UserError
from hippo_mpi.sharding.stage import load_stage
from tests.local_ring import LocalRing, make_stages, open_folder
from tests.parity.tiny_models import make_checkpoint
from tests.tiny_tokenizer import save_tokenizer

DRAFT_MODEL = BUNDLED_MODEL.parent / "story-draft"
CONTEXT = 2048


@pytest.fixture(scope="module")
def story() -> Checkpoint:
    """In float32: in bfloat16, rounding decides between tokens that are nearly as likely."""
    return open_checkpoint(ModelSource(BUNDLED_MODEL, precision="float32"))


@pytest.fixture(scope="module")
def tokenizer() -> TokenizerWrapper:
    return open_tokenizer(BUNDLED_MODEL, [4, 0], (), False)


def make_drafter(num_draft_tokens: int = 4, max_tokens: int | None = None) -> Drafter:
    checkpoint = open_folder(DRAFT_MODEL)
    model = load_stage(checkpoint, 0, checkpoint.flow.num_layers).model
    return Drafter(model, checkpoint.config["vocab_size"], max_tokens, num_draft_tokens)


def answer(
    checkpoint: Checkpoint,
    tokenizer: TokenizerWrapper,
    split: list[int],
    propose: Propose | None,
    prompt: list[int],
    **sampling: Any,
) -> list[RequestOutput]:
    ring = LocalRing(make_stages(checkpoint, split))
    engine = Engine(ring.leader, tokenizer, Limits(), CONTEXT, checkpoint.config["vocab_size"], None, propose)
    engine.add(Request(0, prompt, SamplingParams(**sampling)))
    return list(engine.run())


def tokens_of(outputs: list[RequestOutput]) -> list[int | None]:
    return [output.token for output in outputs]


SPLITS = [pytest.param([12], marks=pytest.mark.slow), [4, 8], pytest.param([2, 3, 3, 4], marks=pytest.mark.slow)]


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temp": 1.0, "top_p": 0.9, "seed": 3},
        pytest.param({"repetition_penalty": 1.3, "logprobs": 2}, marks=pytest.mark.slow),
        pytest.param(
            {"grammar": json_grammar({"type": "object", "properties": {"name": {"type": "string"}}})},
            marks=pytest.mark.slow,
        ),
        pytest.param({"stop_words": ("river",)}, marks=pytest.mark.slow),
        pytest.param({"max_tokens": 7}, marks=pytest.mark.slow),
    ],
    ids=lambda sampling: "-".join(sampling) or "greedy",
)
def test_tokens_are_those_without_a_draft(
    story: Checkpoint, tokenizer: TokenizerWrapper, split: list[int], sampling: dict[str, Any]
) -> None:
    prompt = encode(tokenizer, "Once upon a time a fox")
    asked = {"max_tokens": 60, **sampling}
    plain = answer(story, tokenizer, split, None, prompt, **asked)
    drafted = answer(story, tokenizer, split, make_drafter().propose, prompt, **asked)
    assert [(one.token, one.text, one.finish_reason, one.random_state) for one in drafted] == [
        (one.token, one.text, one.finish_reason, one.random_state) for one in plain
    ]
    if "logprobs" in sampling:
        for one, other in zip(drafted, plain, strict=True):
            assert one.logprobs is not None and other.logprobs is not None
            assert one.logprobs.chosen == pytest.approx(other.logprobs.chosen, abs=1e-4)
    timings = drafted[-1].timings
    assert timings.num_draft_tokens > 0
    assert timings.num_accepted > 0 or len(plain) < 10


@pytest.mark.slow
def test_tokens_are_those_of_mlx_lm(story: Checkpoint, tokenizer: TokenizerWrapper) -> None:
    prompt = encode(tokenizer, "A bear and a lantern")
    model, config = load_model(BUNDLED_MODEL)
    model, _ = convert(model, config, "float32")
    wanted = [piece.token for piece in stream_generate(model, tokenizer, prompt, max_tokens=80)]
    drafted = answer(story, tokenizer, [6, 6], make_drafter().propose, prompt, max_tokens=80)
    assert tokens_of(drafted) == wanted
    assert drafted[-1].timings.num_accepted > len(wanted) / 3


def test_a_long_prompt_is_read_in_chunks(
    story: Checkpoint, tokenizer: TokenizerWrapper, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drafting, "_CHUNK_TOKENS", 40)
    prompt = encode(tokenizer, "Once upon a time a fox met a hen by the river. " * 10)
    assert 3 * 40 < len(prompt) < 4 * 40 - 10
    proposed: list[list[int]] = []
    drafter = make_drafter()

    def propose(sequence: Sequence, most: int) -> list[int]:
        proposed.append(drafter.propose(sequence, most))
        return proposed[-1]

    plain = answer(story, tokenizer, [12], None, prompt, max_tokens=20)
    assert tokens_of(answer(story, tokenizer, [12], propose, prompt, max_tokens=20)) == tokens_of(plain)
    assert [bool(draft) for draft in proposed[:4]] == [False, False, False, True]


def test_what_has_been_read_of_a_conversation_is_not_read_again(
    story: Checkpoint, tokenizer: TokenizerWrapper, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafter = make_drafter()
    ring = LocalRing(make_stages(story, [12]))
    engine = Engine(ring.leader, tokenizer, Limits(), CONTEXT, story.config["vocab_size"], None, drafter.propose)
    read: list[int] = []
    model_reads = drafter._read

    def noting_read(reading: Any, tokens: mx.array) -> mx.array:
        read.append(tokens.shape[1])
        return model_reads(reading, tokens)

    monkeypatch.setattr(drafter, "_read", noting_read)
    prompt = encode(tokenizer, "Once upon a time a fox met a hen by the river. " * 5)
    for turn in range(3):
        begun = len(read)
        engine.add(Request(turn, prompt, SamplingParams(max_tokens=12)))
        made = [output.token or 0 for output in engine.run()]
        assert max(read[begun:]) == len(prompt) if turn == 0 else max(read[begun:]) < 12
        prompt = [*prompt, *made, *encode(tokenizer, " And then?")[:5]]


def test_a_draft_model_with_a_short_context_falls_silent(story: Checkpoint, tokenizer: TokenizerWrapper) -> None:
    prompt = encode(tokenizer, "Once upon a time a fox")
    long = answer(story, tokenizer, [12], make_drafter().propose, prompt, max_tokens=40)
    short = answer(story, tokenizer, [12], make_drafter(max_tokens=20).propose, prompt, max_tokens=40)
    assert tokens_of(short) == tokens_of(long)
    assert 0 < short[-1].timings.num_draft_tokens < long[-1].timings.num_draft_tokens / 2


def tiny(name: str, folder: Path, **config: Any) -> tuple[Checkpoint, TokenizerWrapper]:
    make_checkpoint(name, folder)
    save_tokenizer(folder)
    if config:
        found = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**found, **config}))
    return open_folder(folder), open_tokenizer(folder, None, (), False)


@pytest.mark.parametrize("name", ["gemma3_text", pytest.param("llama", marks=pytest.mark.slow)])
def test_a_window_that_is_full_takes_no_drafts(name: str, tmp_path: Path) -> None:
    """Its caches have forgotten what they would have to go back to."""
    checkpoint, tokenizer = tiny(name, tmp_path, sliding_window=24)
    prompt, ends = list(range(1, 6)), []
    plain = tokens_of(answer(checkpoint, tokenizer, [2, 4], None, prompt, max_tokens=50, ignore_eos=True))

    def propose(sequence: Sequence, most: int) -> list[int]:
        made = len(sequence.tokens) - len(prompt)
        draft = [token or 0 for token in plain[made : made + min(most, 3)]]
        ends.append(len(sequence.tokens) + len(draft))
        return [*draft[:-1], draft[-1] + 1]  # the last one is wrong

    assert tokens_of(answer(checkpoint, tokenizer, [2, 4], propose, prompt, max_tokens=50, ignore_eos=True)) == plain
    assert 18 < max(ends) < 24


@pytest.mark.parametrize("name", ["lfm2", pytest.param("mamba2", marks=pytest.mark.slow)])
def test_models_whose_state_cannot_go_back_are_refused(name: str, tmp_path: Path) -> None:
    checkpoint, tokenizer = tiny(name, tmp_path)
    with pytest.raises(UserError, match="--draft-model doesn't work with this model: its caches can't be trimmed"):
        answer(checkpoint, tokenizer, [2, 4], lambda sequence, most: [], [1, 2])


def test_models_that_read_several_tokens_otherwise_are_refused(tmp_path: Path) -> None:
    checkpoint, tokenizer = tiny("phi3small", tmp_path)
    with pytest.raises(UserError, match="its logits change when a step has several tokens"):
        answer(checkpoint, tokenizer, [2, 4], lambda sequence, most: [], [1, 2])
