"""Whether a layer that is split over ranks returns what the whole layer does; tried at the model's own sizes.

Detection only proposes a split, this proves it: the layer's own code runs whole, and once more for each rank, with sums
between them. Every linear layer multiplies by a random matrix of low rank, so that no weights are needed and models of any
size take moments; what a rank doesn't hold is NaN.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from hippo_mpi.sharding.dependence import Call
from hippo_mpi.sharding.linear_layers import linear_layers, num_inputs, num_outputs, plain_kind
from hippo_mpi.sharding.sharded_layers import shard_layer
from hippo_mpi.sharding.width_split import LayerShards
from hippo_mpi.tracing import nested_arrays
from hippo_mpi.tracing.nested_arrays import Opaque
from hippo_mpi.transport.local_collective import LocalCollective, run_ranks

_RANK = 4
_TOLERANCE = 1e-4  # relative to the largest value; a wrong split is off by tenths


@dataclass(frozen=True)
class Trial:
    """A call of a layer to be compared.

    Args:
        call: the layer and what it is given.
        begins: whether its cache is empty; otherwise it is what the trial before has left.
    """

    call: Call
    begins: bool


def difference(layer: nn.Module, shards: LayerShards, num_ranks: int, trials: Sequence[Trial]) -> float:
    """Return by how much the ranks' layer differs from the whole one, relative to its largest value.

    NaN if there is NaN, infinity if the code doesn't run on a part.

    Args:
        layer: a twin with no weights, of which copies are made.
        shards: how it is split.
        num_ranks: over how many ranks.
        trials: calls of this layer, in their order.
    """
    whole = _low_rank(layer)
    collective = LocalCollective()
    parts = [_low_rank(layer) for _ in range(num_ranks)]
    for rank, part in enumerate(parts):
        shard_layer(part, shards, rank, collective, float("nan"))
    caches: list[list[Any] | None] = []
    worst = 0.0
    for trial in trials:
        if trial.begins:
            caches = [None] * (num_ranks + 1)
        wanted, caches[-1] = _outputs(whole, trial.call, caches[-1])

        def run(rank: int, trial: Trial = trial, caches: list[list[Any] | None] = caches) -> list[mx.array]:
            found, caches[rank] = _outputs(parts[rank], trial.call, caches[rank])
            return found

        try:
            found = run_ranks([partial(run, rank) for rank in range(num_ranks)])
        except Exception:  # whatever the model's code raises when shapes don't fit
            return float("inf")
        worst = max(worst, *(_difference(wanted, outputs) for outputs in found), key=_badness)
    return worst


def is_right(difference: float) -> bool:
    """Return whether a difference is one of rounding."""
    return difference <= _TOLERANCE


def _difference(wanted: Sequence[mx.array], found: Sequence[mx.array]) -> float:
    if [array.shape for array in wanted] != [array.shape for array in found]:
        return float("inf")
    off = [(mx.abs(a - b).max() / (mx.abs(a).max() + 1e-9)) for a, b in zip(wanted, found, strict=True) if a.size]
    return max((float(np.array(each)) for each in off), default=0.0, key=_badness)


def _badness(value: float) -> tuple[bool, float]:
    """Return what differences are ordered by: NaN is the worst."""
    return value != value, value


def _outputs(layer: nn.Module, call: Call, caches: list[Any] | None) -> tuple[list[mx.array], list[Any]]:
    """Return what a layer returns and changes, and its caches."""
    inputs, left = call.again(caches)
    result: Any = layer(*inputs["args"], **inputs["kwargs"])
    found = nested_arrays.find((result, inputs), Opaque(left))
    return [array.astype(mx.float32) for _, array in found if mx.issubdtype(array.dtype, mx.floating)], left


def _low_rank(layer: nn.Module) -> nn.Module:
    """Return a copy of a layer whose linear layers multiply by matrices of low rank."""
    twin = copy.deepcopy(layer, {id(array): array for _, array in tree_flatten(layer.parameters())})
    for path, linear in linear_layers(twin).items():
        own: Any = linear
        seed = zlib.crc32(path.encode())
        inner, outer = (mx.random.key(seed + number) for number in (0, 1))
        own.low_rank_in = mx.random.normal((num_inputs(own), _RANK), key=inner) * num_inputs(own) ** -0.5
        own.low_rank_out = mx.random.normal((_RANK, num_outputs(own)), key=outer)
        if "bias" in own:
            own.bias = mx.random.normal(own.bias.shape, key=outer)
        own.axes = {"low_rank_out": (1, None), "low_rank_in": (None, 0)}
        own.__class__ = _multiplying(plain_kind(own))
    return twin


def _multiplying(kind: type) -> type:
    takes_experts = issubclass(kind, SwitchLinear | QuantizedSwitchLinear)

    def call(linear: Any, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        made: mx.array = (x @ linear.low_rank_in) @ linear.low_rank_out
        if not takes_experts:
            return made + linear.bias if "bias" in linear else made
        indices = args[0] if args else kwargs["indices"]
        made = made * (1 + indices % 7).astype(made.dtype)[..., None, None]  # experts differ
        return made + mx.expand_dims(linear.bias[indices], -2) if "bias" in linear else made

    return type(kind.__name__, (kind,), {"__call__": call})
