"""Converts weights to another precision than the stored one: by casting, or by quantising as mlx_lm.convert does.

Everything is lazy: a rank reads and converts only its own weights, one after the other.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path
from mlx_lm.utils import quantize_model

from hippo_mpi.errors import ModelError


def stored_precision(config: dict[str, Any]) -> str:
    """Return the precision that a checkpoint's config names, such as 4bit or bfloat16; "unknown" if it names none."""
    quantization = config.get("quantization") or config.get("quantization_config")
    if isinstance(quantization, dict) and "bits" in quantization:
        return f"{quantization['bits']}bit"
    return stored_dtype(config)


def stored_dtype(config: dict[str, Any]) -> str:
    """Return the weights' type that a checkpoint's config names, such as bfloat16; "unknown" if it names none."""
    text = config.get("text_config", {})
    names = (config.get(key) or text.get(key) for key in ("torch_dtype", "dtype"))
    return str(next((name for name in names if name), "unknown"))


def convert(model: nn.Module, config: dict[str, Any], precision: str) -> tuple[nn.Module, dict[str, Any]]:
    """Return the model with its weights in `precision`, and its config.

    Args:
        model: with lazy weights; changed in place.
        config: its config.
        precision: one of config.PRECISIONS. A type is applied to all weights that aren't quantised, and so to the
            computation; bits to all weights that mlx_lm.convert quantises, in groups of its default size.

    Raises:
        ModelError: the checkpoint is quantised to other bits.
    """
    if not precision.endswith("bit"):
        cast(model, getattr(mx, precision))
        return model, config
    stored = stored_precision(config)
    if stored.endswith("bit"):
        if stored != precision:
            raise ModelError(f"--precision {precision}: the checkpoint is already quantised to {stored}")
        return model, config
    quantized: tuple[nn.Module, dict[str, Any]] = quantize_model(
        model, config, None, int(precision.removesuffix("bit"))
    )
    return quantized


def cast(model: nn.Module, dtype: mx.Dtype) -> None:
    """Cast all floating-point weights to `dtype`, except those that the model's `cast_predicate` excludes."""
    casts = getattr(model, "cast_predicate", lambda name: True)

    def cast_one(name: str, weight: mx.array) -> mx.array:
        is_real = mx.issubdtype(weight.dtype, mx.floating) and casts(name)
        return weight.astype(dtype) if is_real else weight

    model.update(tree_map_with_path(cast_one, model.parameters()))
