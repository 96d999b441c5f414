"""Slow is not dead: steps that take several times --timeout, and a rank among them that really is stuck."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests import ranks
from tests.real_shapes import make_sparse_checkpoint
from tests.tiny_tokenizer import save_tokenizer

TIMEOUT_S = 1
# 540 million parameters in 4 bits, of which a core multiplies some billion a second: a token takes half a second, and
# the 16 of a first step six to eight, half of them on each of two ranks.
SLOW = {
    "model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 8, "intermediate_size": 8192,
    "num_attention_heads": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-5, "vocab_size": 128,
    "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder: Path = tmp_path_factory.mktemp("slow")
    make_sparse_checkpoint(SLOW, folder)
    save_tokenizer(folder)
    prompt = " ".join(f"w{i}" for i in range(24))
    options = ["--prompt", prompt, "--max-tokens", "2", "--timeout", str(TIMEOUT_S), "--json"]
    return [str(ranks.BIN / "hippo_mpi.generate"), "--model", str(folder), *options]


def test_steps_of_several_timeouts(command: list[str]) -> None:
    with ranks.ring([command] * 2) as running:
        assert running[0].wait() == 0, running[0].err
    stats = json.loads(running[0].out)["stats"]
    assert stats["generation_tokens"] == 2
    first_s = stats["time_to_first_token_s"]
    if first_s < 6 * TIMEOUT_S:  # both ranks' halves of 24 tokens, the first 16 of them in one step
        pytest.skip(f"this machine is too fast for the test: the prompt took {first_s:.1f} s")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_stuck_in_a_slow_step_is_found(command: list[str], victim: int) -> None:
    with ranks.ring([command] * 2) as running:
        assert not ranks.await_end([], 0)
        running[victim].process.send_signal(signal.SIGSTOP)
        assert running[1 - victim].wait(20) == 3
        assert f"rank {victim} (" in running[1 - victim].err
