"""One model family per mechanism, as real ranks on the ring and on MPI, token for token what mlx-lm generates; and deep ones."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model

from tests import ranks
from tests.parity import tiny_models
from tests.tiny_tokenizer import save_tokenizer

PROMPT = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38]
FAMILIES = [
    ("llama-full", 2, 4), ("rwkv7", 3, 2), ("talkie", 2, 3), ("gemma3n", 3, 2), ("nanbeige-loops", 2, 3),
    ("kimi_k3", 4, 2), ("mamba2", 2, 4), ("qwen3_moe", 4, 2), ("hunyuan", 2, 3), ("deepseek_v41", 2, 2),
]  # fmt: skip


def expected_tokens(folder: Path) -> list[int]:
    model, _ = load_model(folder)
    return [token for token, _ in generate_step(mx.array(PROMPT), model, max_tokens=12)]


@pytest.mark.parametrize("backend", ["ring", "mpi"])
@pytest.mark.parametrize(("name", "on_ring", "on_mpi"), FAMILIES)
def test_tokens_are_those_of_mlx_lm(name: str, on_ring: int, on_mpi: int, backend: str, tmp_path: Path) -> None:
    assert_tokens(tiny_models.make_checkpoint(name, tmp_path), on_ring if backend == "ring" else on_mpi, backend)


@pytest.mark.parametrize(("name", "num_layers", "num_ranks"), [("qwen3", 36, 2), ("llama", 80, 3), ("mamba", 48, 3)])
def test_deep_models_in_4_bits(name: str, num_layers: int, num_ranks: int, tmp_path: Path) -> None:
    folder = tiny_models.make_checkpoint(name, tmp_path, dtype=mx.bfloat16, quantize_bits=4, num_layers=num_layers)
    assert_tokens(folder, num_ranks, "ring")


def assert_tokens(folder: Path, num_ranks: int, backend: str) -> None:
    save_tokenizer(folder)
    command = [
        str(ranks.BIN / "hippo_mpi.generate"), "--model", str(folder), "--json", "--ignore-chat-template",
        "--prompt", " ".join(f"w{token}" for token in PROMPT), "--max-tokens", "12", "--prefill-step-size", "2048",
        "--max-context", "256",
    ]  # fmt: skip
    answer = answer_of(command, num_ranks, backend)
    assert answer["token_ids"] == expected_tokens(folder)
    assert answer["finish_reason"] == "length"
    layers = [rank["layers"] for rank in answer["stats"]["ranks"]]
    assert len(layers) == num_ranks
    assert all(a[1] == b[0] for a, b in itertools.pairwise(layers))


def answer_of(command: list[str], num_ranks: int, backend: str) -> dict[str, Any]:
    """The JSON that rank 0 prints, when all ranks have ended well."""
    if backend == "ring":
        with ranks.ring([command] * num_ranks) as running:
            codes = [rank.wait() for rank in running]
            first = running[0]
            assert not any(rank.out for rank in running[1:])
    else:
        with ranks.single(ranks.mpirun(num_ranks, command)) as first:
            codes = [first.wait()]
    assert not any(codes), first.err
    return dict(json.loads(first.out))
