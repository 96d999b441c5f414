"""Weights in another precision than they are stored in: cast, or quantised as mlx_lm.convert does.

All of it is lazy: a rank reads and converts its own weights only, one after the other.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path
from mlx_lm.utils import quantize_model

from hippo_mpi.errors import ModelError


def stored_precision(config: dict[str, Any]) -> str:
    """Such as 4bit or bfloat16, from a checkpoint's config."""
    quantization = config.get("quantization") or config.get("quantization_config")
    if isinstance(quantization, dict) and "bits" in quantization:
        return f"{quantization['bits']}bit"
    return stored_dtype(config)


def stored_dtype(config: dict[str, Any]) -> str:
    """Return the type of weights that a checkpoint's config names, such as bfloat16; "unknown" if it names none."""
    text = config.get("text_config", {})
    names = (config.get(key) or text.get(key) for key in ("torch_dtype", "dtype"))
    return str(next((name for name in names if name), "unknown"))


def convert(model: nn.Module, config: dict[str, Any], precision: str) -> tuple[nn.Module, dict[str, Any]]:
    """The model with its weights in `precision` (one of config.PRECISIONS), and its config.

    A type is that of all weights that aren't quantised, and so of what is computed; bits are those of all that
    mlx_lm.convert quantises, in groups of its default size.

    Raises:
        ModelError: the checkpoint is quantised to other bits.
    """
    if not precision.endswith("bit"):
        cast(model, getattr(mx, precision))
        return model, config
    stored = stored_precision(config)
    if stored.endswith("bit"):
        if stored != precision:
            raise ModelError(f"--precision {precision}: the checkpoint is quantised to {stored} already")
        return model, config
    quantized: tuple[nn.Module, dict[str, Any]] = quantize_model(
        model, config, None, int(precision.removesuffix("bit"))
    )
    return quantized


def cast(model: nn.Module, dtype: mx.Dtype) -> None:
    """Give all real weights the type `dtype`, but for those that the model wants left as they are."""
    casts = getattr(model, "cast_predicate", lambda name: True)

    def cast_one(name: str, weight: mx.array) -> mx.array:
        is_real = mx.issubdtype(weight.dtype, mx.floating) and casts(name)
        return weight.astype(dtype) if is_real else weight

    model.update(tree_map_with_path(cast_one, model.parameters()))
