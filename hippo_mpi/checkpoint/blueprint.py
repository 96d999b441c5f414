"""Builds a model from its config alone: the name, shape and type of every weight, for a plan before the download.

mlx-lm's own code builds the model. Its weights are random and lazy: as only their shapes are used, none is ever
computed, and a model of a terabyte takes seconds and some megabytes.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import _get_classes, load_config, load_model

from hippo_mpi.checkpoint.precision import cast, stored_dtype
from hippo_mpi.tracing.graph import leaves_of

_ASSUMED_DTYPE = "bfloat16"

Predicate = Callable[[str, nn.Module], "bool | dict[str, Any]"]
"""`class_predicate` of nn.quantize: whether to quantise a module, or how, if not like the rest."""


def has_weights(folder: Path) -> bool:
    """Return whether the folder has a weight file that mlx-lm would read."""
    return any(folder.glob("model*.safetensors"))


def build_from_config(folder: Path, trust_remote_code: bool = False) -> tuple[nn.Module, dict[str, Any]]:
    """Build the model that a folder's config.json describes, as load_model does if there are weights.

    Weights have the type that the config names (bfloat16 if it names none). A weight is quantised if it would be in a
    checkpoint of this config: those that model.safetensors.index.json lists with scales, if it is there; otherwise
    those that mlx_lm.convert quantises, or the library that wrote a Hugging Face `quantization_config`.

    Args:
        folder: has a config.json.
        trust_remote_code: whether the checkpoint's own Python code may run.

    Returns:
        The model, no weight of which should be evaluated, and its config.

    Raises:
        Exception: whatever mlx-lm raises for a config that it can't use.
    """
    stored = load_config(folder)  # as it is in the file: load_model replaces another library's quantisation by its own
    names = _index_names(folder)

    def classes(config: dict[str, Any]) -> tuple[type[nn.Module], type]:
        model_class, args_class = _get_classes(config)
        is_tied = not _has_head(config, names)
        return _without_weights(model_class, is_tied), args_class

    model, config = load_model(
        folder, lazy=True, strict=False, get_model_classes=classes, trust_remote_code=trust_remote_code
    )
    cast(model, getattr(mx, _known_dtype(config) or _ASSUMED_DTYPE))
    if isinstance(quantization := config.get("quantization"), dict):
        nn.quantize(
            model,
            quantization["group_size"],
            quantization["bits"],
            mode=quantization.get("mode", "affine"),
            class_predicate=_predicate(model, quantization, names, _foreign_quantization(stored)),
        )
    return model, config


def assumptions(folder: Path, config: dict[str, Any], precision: str | None) -> tuple[str, ...]:
    """Return sentences that say what was assumed about a model of which only the config is there."""
    sentences = [f"{folder} has no weights: sizes are taken from config.json"]
    if _known_dtype(config) is None and precision in (None, *(f"{bits}bit" for bits in range(2, 9))):
        sentences.append(f"config.json has no dtype that MLX supports: {_ASSUMED_DTYPE}")
    if isinstance(config.get("quantization"), dict) and not _index_names(folder):
        sentences.append("no index lists the quantised weights: those that are usual for such models")
    return tuple(sentences)


def _index_names(folder: Path) -> set[str]:
    """Return the names of the weights that the folder's index lists; none without one."""
    index = folder / "model.safetensors.index.json"
    return set(json.loads(index.read_text())["weight_map"]) if index.is_file() else set()


def _has_head(config: dict[str, Any], names: set[str]) -> bool:
    """Return whether a checkpoint has an output matrix of its own (untied embeddings)."""
    if names:
        return any("lm_head" in name for name in names)
    return config.get("tie_word_embeddings", config.get("text_config", {}).get("tie_word_embeddings")) is False


def _without_weights(model_class: type[nn.Module], is_tied: bool) -> type[nn.Module]:
    """Derive a class whose sanitize() gets the weights that a checkpoint would have, as some models adapt to them."""

    def sanitize(model: nn.Module, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        own = leaves_of(model)
        with contextlib.suppress(Exception):  # one model looks at values, and fails with zeros
            model_class.sanitize(model, {name: w for name, w in own.items() if not (is_tied and "lm_head" in name)})
        return weights

    methods = {"sanitize": sanitize} if hasattr(model_class, "sanitize") else {}
    return type(model_class.__name__, (model_class,), methods)


def _known_dtype(config: dict[str, Any]) -> str | None:
    """Return the weights' type that the config names, such as bfloat16; None if MLX doesn't have it."""
    name = stored_dtype(config)
    dtype = getattr(mx, name, None)
    return name if isinstance(dtype, mx.Dtype) and mx.issubdtype(dtype, mx.floating) else None


def _foreign_quantization(config: dict[str, Any]) -> dict[str, Any] | None:
    """Return the quantisation settings of a library other than MLX; None if none has quantised the checkpoint."""
    settings = config.get("quantization_config") or config.get("text_config", {}).get("quantization_config")
    return settings if "quantization" not in config and isinstance(settings, dict) else None


def _predicate(
    model: nn.Module, quantization: dict[str, Any], names: set[str], foreign: dict[str, Any] | None
) -> Predicate:
    """Return the `class_predicate` for nn.quantize that matches a checkpoint of this config."""
    converts: Predicate = getattr(model, "quant_predicate", None) or (lambda path, module: True)
    listed = {name.removesuffix(".scales") for name in names} & {path for path, _ in model.named_modules()}
    kept = [*(foreign or {}).get("ignore", ()), *((foreign or {}).get("modules_to_not_convert") or ())]

    def is_quantized(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if not hasattr(module, "to_quantized"):  # no such layer, or one that load_model has quantised by the config
            return False
        if path in quantization or module.weight.shape[-1] % quantization["group_size"]:
            return False
        if listed:  # otherwise there is no index, or its names differ from those of the loaded model
            return path in listed
        if foreign is not None:  # these libraries leave embeddings as they are
            return not isinstance(module, nn.Embedding) and not any(_names(pattern, path) for pattern in kept)
        return converts(path, module)

    return is_quantized


def _names(pattern: str, path: str) -> bool:
    """Return whether a pattern of another library matches a module or one that contains it.

    A pattern is a regular expression after `re:`, or a path, perhaps with `*`. Such paths may begin deeper than MLX's,
    and name experts one by one that mlx-lm stacks.
    """
    path = path.replace(".switch_mlp.", ".experts.0.")
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), path) is not None
    return any(fnmatch.fnmatch(f".{path}.", f"*.{pattern}.{rest}") for rest in ("", "*"))
