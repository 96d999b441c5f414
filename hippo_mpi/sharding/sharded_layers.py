"""A layer of which this rank holds some rows and columns of the linear layers; the model's own code runs it unchanged.

A linear layer that holds some of its rows returns zeros for the others, so that the code around it sees the shapes that
it knows, or only its own ones, where the code works with them (`narrowing.py`). One that holds some of its columns
multiplies these, and adds up over the ranks. In the exact form it holds rows, too: what it takes is gathered from all
ranks, and so is what it makes. Nothing is added in another order then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from hippo_mpi.sharding.linear_layers import Range, linear_layers, num_outputs, plain_kind, take_columns, take_rows
from hippo_mpi.sharding.narrowing import narrow
from hippo_mpi.sharding.width_split import Bounds, LayerShards, widths
from hippo_mpi.transport.collective import Collective

_TAKE_CHOICES = (SwitchLinear, QuantizedSwitchLinear)


def shard_layer(layer: nn.Module, shards: LayerShards, rank: int, collective: Collective, absent: float = 0.0) -> None:
    """Reduce a layer to a rank's part of it.

    Args:
        layer: changed in place; weights are cut lazily.
        shards: from `split_layer`.
        rank: whose part.
        collective: adds up over the ranks.
        absent: what stands for outputs of other ranks; no rank's code may use them.
    """
    linears = linear_layers(layer)
    for path, bounds in shards.columns.items():
        linear: Any = linears[path]
        columns = (bounds[rank], bounds[rank + 1])
        own = None if path in shards.narrowings else columns
        if path in shards.outputs:
            outputs = shards.outputs[path]
            take_rows(linear, [(outputs[rank], outputs[rank + 1])])
            linear.__class__ = _gathering(type(linear), own, bounds, outputs, collective)
            continue
        take_columns(linear, columns)
        if rank > 0 and "bias" in linear:
            linear.bias = mx.zeros_like(linear.bias)  # it is added once
        linear.__class__ = _summed(type(linear), own, collective)
    for path, held in shards.rows.items():
        linear = linears[path]
        width = num_outputs(linear)
        take_rows(linear, held[rank])
        if path not in shards.narrow_rows:
            linear.__class__ = _padded(type(linear), held[rank], width, absent)
    for narrowing in shards.narrowings.values():
        narrow(layer, narrowing, rank)
    experts = {path.rpartition(".")[0]: one for path, one in linears.items() if plain_kind(one) in _TAKE_CHOICES}
    for linear in experts.values():  # one of each block: all of them are given the same choices
        linear.__class__ = _noting(type(linear), collective)


def _noting(kind: type, collective: Collective) -> type:
    def call(linear: Any, x: mx.array, indices: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        collective.note(indices)
        return kind.__call__(linear, x, indices, *args, **kwargs)  # type: ignore[no-any-return]

    return type(kind.__name__, (kind,), {"__call__": call})


def _summed(kind: type, columns: Range | None, collective: Collective) -> type:
    def call(linear: Any, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        part = x if columns is None else x[..., columns[0] : columns[1]]
        return collective.sum(kind.__call__(linear, part, *args, **kwargs))

    return type(kind.__name__, (kind,), {"__call__": call})


def _gathering(kind: type, columns: Range | None, inputs: Bounds, outputs: Bounds, collective: Collective) -> type:
    def call(linear: Any, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        part = x if columns is None else x[..., columns[0] : columns[1]]
        made = kind.__call__(linear, collective.gather(part, widths(inputs)), *args, **kwargs)
        return collective.gather(made, widths(outputs))

    return type(kind.__name__, (kind,), {"__call__": call})


def _padded(kind: type, held: Sequence[Range], width: int, absent: float) -> type:
    def call(linear: Any, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        made = kind.__call__(linear, x, *args, **kwargs)
        parts, end, used = [], 0, 0

        def gap(size: int) -> None:
            if size:
                parts.append(mx.full((*made.shape[:-1], size), absent, made.dtype))

        for start, stop in held:
            gap(start - end)
            parts.append(made[..., used : used + stop - start])
            end, used = stop, used + stop - start
        gap(width - end)
        return mx.concatenate(parts, -1) if len(parts) > 1 else made

    return type(kind.__name__, (kind,), {"__call__": call})
