"""hippo_mpi.generate as people start it: every launcher, the same text; and its options."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm import load, stream_generate
from mlx_lm.sample_utils import make_sampler

from hippo_mpi.config.bundled import BUNDLED_MODEL, DEFAULT_PROMPT
from tests import ranks

ROOT = Path(__file__).parents[2]
GENERATE = str(ranks.BIN / "hippo_mpi.generate")
LAUNCH = str(ranks.BIN / "mlx.launch")


def port() -> list[str]:
    return ["--starting-port", str(ranks.consecutive_ports(3))]


def reference(prompt: str = DEFAULT_PROMPT, seed: int = 0, **options: object) -> str:
    model, tokenizer = load(str(BUNDLED_MODEL))
    mx.random.seed(seed)  # after loading, which draws the weights that it then replaces
    tokens = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
    return "".join(piece.text for piece in stream_generate(model, tokenizer, tokens, max_tokens=256, **options))


LAUNCHERS = {
    "alone": lambda: [GENERATE],
    "module": lambda: [str(ranks.BIN / "python"), "-m", "hippo_mpi.generate"],
    "mlx.launch with a hostfile": lambda: [LAUNCH, *port(), "--hostfile", str(ROOT / "hostfile"), "-n", "2", GENERATE],
    "mlx.launch -n 3": lambda: [LAUNCH, *port(), "-n", "3", GENERATE],
    "mlx.launch with MPI": lambda: [LAUNCH, "--backend", "mpi", "-n", "2", GENERATE],
    "mpirun": lambda: ranks.mpirun(2, [GENERATE]),
    "launch/run": lambda: [str(ranks.BIN / "python"), "-m", "hippo_mpi.run"],
}


QUICK_LAUNCHERS = ("launch/run",)


@pytest.mark.parametrize(
    "launcher", [pytest.param(name, marks=() if name in QUICK_LAUNCHERS else pytest.mark.slow) for name in LAUNCHERS]
)
def test_the_same_text_under_every_launcher(launcher: str) -> None:
    with ranks.single(LAUNCHERS[launcher](), stdin=subprocess.PIPE) as running:
        assert running.wait() == 0, running.err
        assert running.out == reference() + "\n"
        assert "tok/s" in running.err
        assert "peak memory" in running.err


def answer(*options: str, num_ranks: int = 2) -> dict[str, object]:
    with ranks.ring([[GENERATE, "--json", *options]] * num_ranks) as running:
        assert [rank.wait() for rank in running] == [0] * num_ranks, running[0].err
        return dict(json.loads(running[0].out))


@pytest.mark.slow
def test_json_has_a_part_per_rank() -> None:
    found = answer()
    assert found["text"] == reference()
    assert found["finish_reason"] == "stop"
    stats = found["stats"]
    assert isinstance(stats, dict)
    assert stats["ranks"][0]["layers"][0] == 0
    assert len(stats["ranks"]) == 2


@pytest.mark.slow
def test_sampling_with_a_seed_is_that_of_mlx_lm() -> None:
    expected = reference(seed=7, sampler=make_sampler(1.0, 0.9, 0.0, 1, 20))
    assert answer("--seed", "7", "--temp", "1.0", "--top-p", "0.9", "--top-k", "20")["text"] == expected


@pytest.mark.slow
def test_stop_words_end_an_answer_and_are_not_shown() -> None:
    whole = reference()
    word = whole.split()[6]
    found = answer("--stop-words", word)
    assert found["text"] == whole[: whole.index(word)]
    assert found["finish_reason"] == "stop"


@pytest.mark.slow
def test_max_tokens_end_an_answer() -> None:
    found = answer("--max-tokens", "5")
    assert found["finish_reason"] == "length"
    assert len(found["token_ids"]) == 5  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("split", ["1,11", "11,1", "6,6"])
def test_any_split_gives_the_same_text(split: str) -> None:
    assert answer("--layer-split", split)["text"] == reference()


DRAFT = BUNDLED_MODEL.parent / "story-draft"


@pytest.mark.slow
def test_a_draft_model_changes_no_text() -> None:
    plain = answer("--precision", "float32")
    drafted = answer("--precision", "float32", "--draft-model", str(DRAFT))
    assert drafted["token_ids"] == plain["token_ids"]
    stats = drafted["stats"]
    assert isinstance(stats, dict)
    assert 40 < stats["accepted_draft_tokens"] < stats["draft_tokens"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("draft", "line"),
    [
        (BUNDLED_MODEL.parent / "nowhere", f"no such model folder: {BUNDLED_MODEL.parent / 'nowhere'}"),
        (BUNDLED_MODEL.parent / "story-other-tokenizer", "--draft-model {} has 1,024 tokens and the model 1,429"),
    ],
    ids=["missing", "other tokenizer"],
)
def test_a_draft_model_that_cannot_be(draft: Path, line: str) -> None:
    with ranks.ring([[GENERATE, "--draft-model", str(draft)]] * 2) as running:
        assert [rank.wait() for rank in running] == [2, 2]
        assert running[0].err.startswith(f"error: {line.format(draft)}") and running[0].err.count("\n") == 1


@pytest.mark.slow
def test_a_long_prompt_goes_through_in_chunks() -> None:
    prompt = "Tell me a story about a fox. " * 40
    alone = answer("--prompt", prompt, "--max-tokens", "20", num_ranks=1)
    assert answer("--prompt", prompt, "--max-tokens", "20", num_ranks=3)["text"] == alone["text"]
