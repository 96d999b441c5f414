"""The linear layers inside a model's layers, and parts of them: some rows (outputs), or some columns (inputs)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

KINDS = (nn.Linear, nn.QuantizedLinear, SwitchLinear, QuantizedSwitchLinear)
# The axis of rows and that of columns, by array; scales and biases have a column for each group of quantised weights.
_AXES = {"weight": (-2, -1), "scales": (-2, -1), "biases": (-2, -1), "bias": (-1, None)}

Range = tuple[int, int]
"""Rows or columns [start, stop)."""


def linear_layers(layer: nn.Module) -> dict[str, nn.Module]:
    """Return the linear layers inside a layer, by path; not those whose class changes what a linear layer returns."""
    return {path: module for path, module in layer.named_modules() if plain_kind(module) in KINDS}


def plain_kind(module: nn.Module) -> type:
    """Return a module's class without those that this package derives from it."""
    return next(kind for kind in type(module).__mro__ if not kind.__module__.startswith("hippo_mpi."))


def num_outputs(linear: Any) -> int:
    """Return the width of what a linear layer makes."""
    return int(linear.weight.shape[-2])


def num_inputs(linear: Any) -> int:
    """Return the width of what a linear layer takes."""
    if "scales" in linear:
        return int(linear.scales.shape[-1]) * int(linear.group_size)
    return int(linear.weight.shape[-1])


def column_unit(linear: Any) -> int:
    """Return how many columns can't be separated: those of a group of quantised weights."""
    return int(linear.group_size) if "scales" in linear else 1


def num_bytes(linear: nn.Module) -> int:
    """Return the bytes of a linear layer's weights."""
    return sum(array.nbytes for array in linear.values() if isinstance(array, mx.array))


def take_rows(linear: Any, ranges: Sequence[Range]) -> None:
    """Reduce a linear layer to some of its rows, in place and lazily."""
    width = num_outputs(linear)
    for name, axis in _axes(linear, 0):
        held = mx.concatenate([_part(linear[name], axis, rows, width) for rows in ranges], axis)
        linear[name] = mx.contiguous(held)  # a single part would keep the whole array alive


def take_columns(linear: Any, columns: Range) -> None:
    """Reduce a linear layer to the columns of a range, in place and lazily; its bias stays whole."""
    width = num_inputs(linear)
    for name, axis in _axes(linear, 1):
        linear[name] = mx.contiguous(_part(linear[name], axis, columns, width))


def _axes(linear: nn.Module, which: int) -> list[tuple[str, int]]:
    """Return the arrays that rows (0) or columns (1) are taken from, each with the axis."""
    axes = {name: pair[which] for name, pair in {**_AXES, **getattr(linear, "axes", {})}.items()}
    found = {name: axis for name, axis in axes.items() if isinstance(linear.get(name), mx.array)}
    return [(name, axis) for name, axis in found.items() if axis is not None]


def _part(array: mx.array, axis: int, part: Range, width: int) -> mx.array:
    """Return a part of an axis that stands for `width` rows or columns, perhaps packed."""
    start, stop = (end * array.shape[axis] // width for end in part)
    index = [slice(None)] * array.ndim
    index[axis] = slice(start, stop)
    return array[tuple(index)]
