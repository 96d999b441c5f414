"""Models as deep as those that people run, and quantised: the mechanism must not depend on how many layers there are.

Every model type once at three times its own tiny depth, one of every mechanism at 36 layers, a few as deep as the deepest
published ones, with adapters and with experts by the hundred. The widths stay tiny, so that a checkpoint is made in a
second.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model

from hippo_mpi.checkpoint.checkpoint import Checkpoint, ModelSource, open_checkpoint
from tests.local_ring import LocalRing, make_stages, open_folder
from tests.parity import tiny_models
from tests.parity.test_every_model import (
    NAMES,
    SAMPLE,
    UNCUT,
    assert_same,
    every,
    fails_upstream,
    reference,
    steps,
    tokens_for,
)

DEEP, DEPTH = 18, 36
# mlx-lm takes layer 61 of a deepseek_v3 for the one that predicts further tokens, and drops it.
DEEPER = {"llama": 80, "qwen3": 64, "qwen3_moe": 94, "gemma3": 62, "gpt_oss": 80, "deepseek_v3": 60, "qwen3_next": 48}
# For --quick: one that holds more arrays than MLX takes by name.
QUICK = {"qwen3"}


def uneven_split(checkpoint: Checkpoint) -> list[int]:
    """Into 3 stages, or 2 if the model allows no more; test_every_model.py has the others, of fewer layers."""
    num = checkpoint.flow.num_layers
    cuts = [c for c in range(1, num) if c not in checkpoint.flow.forbidden_cuts()]
    third, last = cuts[len(cuts) // 3], cuts[-len(cuts) // 4]
    return [third, last - third, num - last] if third < last else [third, num - third]


def assert_deep_parity(folder: Path, name: str, expected: list[mx.array], checkpoint: Checkpoint) -> None:
    tokens, split = tokens_for(name), uneven_split(checkpoint)
    ring = LocalRing(make_stages(checkpoint, split))
    for (position, count), theirs in zip(steps(name), expected, strict=True):
        ours = ring.logits(tokens[position : position + count], position)
        assert_same(ours, theirs, f"split {split}, {count} tokens at {position}")


def make_deep(name: str, folder: Path, num_layers: int, **config: Any) -> Path:
    """A 4-bit checkpoint, where mlx-lm can quantise the type."""
    bits = None if fails_upstream(name, "quantized") else 4
    whole = fails_upstream(name, "bfloat16") or fails_upstream(name, "quantized-bfloat16")
    dtype = mx.float32 if whole else mx.bfloat16
    return tiny_models.make_checkpoint(
        name, folder, dtype=dtype, quantize_bits=bits, num_layers=num_layers, overrides=config
    )


@every([name for name in NAMES if name not in UNCUT], QUICK)
def test_every_type_is_deep(name: str, tmp_path: Path) -> None:
    """All kinds of layers three times; at DEPTH the arrays are more than MLX takes by name, whatever the type."""
    num_layers = DEPTH if name in SAMPLE | QUICK else DEEP
    folder = make_deep(name, tmp_path, num_layers)
    model, _, expected = reference(folder, name, tokens_for(name))
    assert len(model.layers) >= num_layers
    assert_deep_parity(folder, name, expected, open_folder(folder))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "num_layers"), list(DEEPER.items()))
def test_as_deep_as_they_get(name: str, num_layers: int, tmp_path: Path) -> None:
    folder = make_deep(name, tmp_path, num_layers)
    model, _, expected = reference(folder, name, tokens_for(name))
    assert len(model.layers) >= num_layers
    assert_deep_parity(folder, name, expected, open_folder(folder))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "experts"), [("qwen3_moe", 256), ("deepseek_v3", 384), ("gpt_oss", 128)])
def test_experts_by_the_hundred(name: str, experts: int, tmp_path: Path) -> None:
    keys = ("num_experts", "num_local_experts", "n_routed_experts")
    folder = make_deep(name, tmp_path, DEPTH, **dict.fromkeys(keys, experts))
    _, _, expected = reference(folder, name, tokens_for(name))
    assert_deep_parity(folder, name, expected, open_folder(folder))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "num_layers"), [("qwen3", 64), ("llama", 126), ("qwen3_moe", 48)])
def test_4_bit_with_lora_on_every_layer(name: str, num_layers: int, tmp_path: Path) -> None:
    folder, adapter = make_deep(name, tmp_path / "model", num_layers), tmp_path / "adapter"
    make_adapter(folder, adapter, num_layers)
    _, _, expected = reference(folder, name, tokens_for(name), adapter)
    checkpoint = open_checkpoint(ModelSource(folder, adapter_path=str(adapter)))
    assert any("lora" in weight for weight in checkpoint.weight_bytes)
    assert_deep_parity(folder, name, expected, checkpoint)


def make_adapter(folder: Path, adapter: Path, num_layers: int) -> None:
    """Random LoRA weights for every layer, as mlx_lm.lora writes them."""
    parameters = {"rank": 4, "scale": 10.0, "dropout": 0.0}
    model, _ = load_model(folder)
    model.freeze()
    linear_to_lora_layers(model, num_layers, parameters)
    weights = {name: 0.1 * mx.random.normal(array.shape) for name, array in tree_flatten(model.trainable_parameters())}
    adapter.mkdir()
    mx.save_safetensors(str(adapter / "adapters.safetensors"), weights)
    config = {"fine_tune_type": "lora", "num_layers": num_layers, "lora_parameters": parameters}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
