"""Every model type of the installed mlx-lm, built from its config alone: the weights are those of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

from hippo_mpi.checkpoint.blueprint import build_from_config
from tests.parity import tiny_models

UNQUANTIZABLE = {"afm7"}  # mlx-lm itself can't
QUANTIZED_ONLY = {"prism_hadamard_qwen35"}  # whatever the tiny checkpoint says
NAMES = [name for name in (*tiny_models.CONFIGS, *tiny_models.VARIANTS) if name not in QUANTIZED_ONLY]
SAMPLE = {"llama", "gemma3", "deepseek_v3", "gpt_oss", "mamba2", "kimi_k25"}


def weights_of(model: nn.Module) -> dict[str, tuple[tuple[int, ...], mx.Dtype]]:
    return {name: (weight.shape, weight.dtype) for name, weight in tree_flatten(model.parameters())}


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in SAMPLE else pytest.mark.slow, id=n) for n in NAMES])
def test_weights_are_those_of_a_checkpoint(name: str, bits: int | None, tmp_path: Path) -> None:
    """Names, shapes and types, with the layers that a model type keeps from being quantised or cast."""
    if bits and name in UNQUANTIZABLE:
        pytest.skip("mlx-lm can't quantise it")
    tiny_models.allow_olmo()
    folder = tiny_models.make_checkpoint(name, tmp_path, dtype=mx.float16, quantize_bits=bits)
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "float16"}))
    expected = weights_of(load_model(folder, lazy=True)[0])
    (folder / "model.safetensors").unlink()
    assert weights_of(build_from_config(folder)[0]) == expected
