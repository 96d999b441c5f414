"""Weights that are cast or quantised while loading: bit for bit what mlx-lm makes of the whole model."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model, quantize_model

from hippo_mpi.checkpoint.checkpoint import ModelSource, open_checkpoint
from hippo_mpi.checkpoint.precision import stored_precision
from hippo_mpi.config.options import PRECISIONS
from hippo_mpi.errors import ModelError
from tests.local_ring import LocalRing, make_stages
from tests.parity.tiny_models import make_checkpoint

TOKENS = [3, 1, 4, 1, 5]


def logits_of_whole(folder: Path, precision: str) -> mx.array:
    model, config = load_model(folder)
    if precision.endswith("bit"):
        model, _ = quantize_model(model, config, None, int(precision[0]))
    else:
        model.set_dtype(getattr(mx, precision))
    return model(mx.array([TOKENS]), cache=make_prompt_cache(model))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["qwen3", pytest.param("qwen3_moe", marks=pytest.mark.slow)])
def test_stages_compute_what_the_whole_converted_model_does(name: str, precision: str, tmp_path: Path) -> None:
    folder = make_checkpoint(name, tmp_path)  # in float32
    if precision in ("float16", "bfloat16") and name == "qwen3_moe":
        pytest.skip("MLX's gather_mm is float32 only on a CPU")
    checkpoint = open_checkpoint(ModelSource(folder, precision=precision))
    stages = make_stages(checkpoint, [2, 4])
    ours, theirs = LocalRing(stages).logits(TOKENS, 0), logits_of_whole(folder, precision)
    assert ours.dtype == theirs.dtype
    assert mx.array_equal(ours, theirs).item()
    held = sum(checkpoint.weight_bytes[name] for name in checkpoint.stage_weights(0, 2))
    here = dict(tree_flatten(stages[0].model.parameters()))
    assert held == sum(here[name].nbytes for name in checkpoint.stage_weights(0, 2))


def test_fewer_bits_are_fewer_bytes(tmp_path: Path) -> None:
    folder = make_checkpoint("qwen3", tmp_path)
    sizes = [sum(open_checkpoint(ModelSource(folder, precision=one)).weight_bytes.values()) for one in (None, "float16", "8bit", "4bit")]  # fmt: skip
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4


def test_what_is_quantised_stays_so(tmp_path: Path) -> None:
    folder = make_checkpoint("qwen3", tmp_path, quantize_bits=4)
    stored = open_checkpoint(ModelSource(folder))
    assert stored_precision(stored.config) == "4bit"
    assert open_checkpoint(ModelSource(folder, precision="4bit")).weight_bytes == stored.weight_bytes
    with pytest.raises(ModelError, match="--precision 8bit: the checkpoint is already quantised to 4bit"):
        open_checkpoint(ModelSource(folder, precision="8bit"))
    half = open_checkpoint(ModelSource(folder, precision="bfloat16"))
    assert sum(half.weight_bytes.values()) < sum(stored.weight_bytes.values())
    assert LocalRing(make_stages(half, [2, 4])).logits(TOKENS, 0).dtype == mx.bfloat16
