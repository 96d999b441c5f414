"""Splitting every layer of a model over ranks: which rank holds what of it, proved layer by layer.

`plan_shards` proposes a split of each layer (`width_split.py`) and tries it at the model's own sizes
(`shard_check.py`). A layer that doesn't pass stays whole on every rank, which is right in any case.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.cache import make_prompt_cache

from hippo_mpi.errors import UserError
from hippo_mpi.sharding.dependence import Call, ProbedModel
from hippo_mpi.sharding.linear_layers import linear_layers, num_bytes, plain_kind
from hippo_mpi.sharding.shard_check import Trial, difference, is_right
from hippo_mpi.sharding.sharded_layers import shard_layer
from hippo_mpi.sharding.width_split import LayerShards, split_layer
from hippo_mpi.transport.collective import Collective

_PROBED_TOKENS = 3
# A prompt, a token behind it, and several rows: the passes of `tracing.trace`.
_TRIED_PASSES = ((1, 5, True), (1, 1, False), (2, 3, True))


@dataclass(frozen=True)
class ShardPlan:
    """How a model is split over ranks by the width of its layers.

    Args:
        num_ranks: over how many ranks.
        layers: how each layer is split.
        refused: of layers that could have been split, why they stay whole, by number.
        held_bytes: of layers' weights, by rank.
    """

    num_ranks: int
    layers: tuple[LayerShards, ...]
    refused: dict[int, str]
    held_bytes: tuple[int, ...] = ()

    @property
    def is_whole(self) -> bool:
        """True if no layer is split."""
        return not any(layer.columns for layer in self.layers)


def plan_shards(model: nn.Module, shares: Sequence[float], on_progress: Callable[[], None] = lambda: None) -> ShardPlan:
    """Find how the layers of a model are split over ranks.

    Args:
        model: a twin with no weights (`tracing.graph.leaf`), which can't be used afterwards; adapters are fused.
        shares: of the work, by rank; their sum is 1.
        on_progress: called after each layer.

    Raises:
        UserError: an adapter can't be fused.
    """
    fuse_adapters(model)
    mx.disable_compile()  # compiled functions would keep the graphs of noise
    try:
        return _Planner(model, shares, on_progress).plan()
    finally:
        if not os.environ.get("MLX_DISABLE_COMPILE"):
            mx.enable_compile()


class _Planner:
    def __init__(self, model: nn.Module, shares: Sequence[float], on_progress: Callable[[], None]) -> None:
        # Weights that belong to no linear layer; these become noise now.
        self._other_bytes = sum(_other_bytes(layer) for layer in model.layers)
        self._probe, self._shares, self._on_progress = ProbedModel(model), shares, on_progress
        self._calls = self._probe.calls(make_prompt_cache(model), 1, _PROBED_TOKENS)
        cache: list[Any] = []
        self._passes = []
        for num_rows, num_tokens, begins in _TRIED_PASSES:
            cache = make_prompt_cache(model) if begins else cache
            self._passes.append((self._probe.calls(cache, num_rows, num_tokens), begins))
        self._found: dict[str, list[LayerShards]] = defaultdict(list)

    def plan(self) -> ShardPlan:
        layers: dict[int, LayerShards] = {}
        refused = {}
        for number, call in enumerate(self._calls):
            if call.layer not in layers:  # a model may go through its layers several times
                shards, off = self._try(call, number)
                layers[call.layer] = shards if is_right(off) else LayerShards()
                if not is_right(off):
                    refused[call.layer] = f"its output would be off by {off:.1g} of its largest value"
                self._on_progress()
        found = tuple(layers.get(index, LayerShards()) for index in range(len(self._probe.layers)))
        return ShardPlan(len(self._shares), found, refused, self._held_bytes(found))

    def _held_bytes(self, layers: Sequence[LayerShards]) -> tuple[int, ...]:
        held = [float(self._other_bytes)] * len(self._shares)
        for layer, shards in zip(self._probe.layers, layers, strict=True):
            linear = sum(num_bytes(one) for one in linear_layers(layer).values())
            for rank in range(len(self._shares)):
                held[rank] += linear * shards.held_share(layer, rank)
        return tuple(round(size) for size in held)

    def _try(self, call: Call, number: int) -> tuple[LayerShards, float]:
        """Return a layer's split, and by how much its outputs are off.

        What was found for a layer of the same structure is tried first.
        """
        layer = self._probe.layers[call.layer]
        trials = [Trial(calls[number], begins) for calls, begins in self._passes]
        kind = _structure(layer, call)
        for shards in self._found[kind]:
            off = difference(layer, shards, len(self._shares), trials)
            if is_right(off):
                return shards, off
        shards = split_layer(self._probe, call, self._shares)
        self._found[kind].append(shards)
        return shards, difference(layer, shards, len(self._shares), trials)


def _other_bytes(layer: nn.Module) -> int:
    total: int = sum(array.nbytes for _, array in tree_flatten(layer.parameters()))
    return total - sum(num_bytes(linear) for linear in linear_layers(layer).values())


def shard_model(model: nn.Module, plan: ShardPlan, rank: int, collective: Collective, absent: float = 0.0) -> None:
    """Reduce a model to a rank's part of each layer, in place and lazily; embedding, norm and head stay whole.

    Args:
        model: changed in place.
        plan: from `plan_shards`.
        rank: whose part.
        collective: adds up over the ranks.
        absent: what stands for outputs of other ranks; no rank's code may use them.
    """
    fuse_adapters(model)
    for layer, shards in zip(model.layers, plan.layers, strict=True):
        shard_layer(layer, shards, rank, collective, absent)


def fuse_adapters(model: nn.Module) -> None:
    """Add the weights of LoRA adapters to those of the linear layers that they change, lazily.

    Raises:
        UserError: these are quantised, and would have to be quantised anew.
    """
    for name, module in model.named_modules():
        if hasattr(module, "fuse") and "scales" in getattr(module, "linear", {}):
            raise UserError(
                f"an adapter changes {name}, which is quantised: it can't be added to its weights without loss, as parts of"
                " layers need it; use --parallel pipeline, or weights of 16 bits"
            )
    fused = [(name, module.fuse()) for name, module in model.named_modules() if hasattr(module, "fuse")]
    model.update_modules(tree_unflatten(fused))


def _structure(layer: nn.Module, call: Call) -> str:
    """Return what layers have in common that are likely to be split alike: classes and sizes."""
    parts: list[Any] = [call.shares_cache, [type(cache).__name__ for cache in call.caches]]
    parts += [(path, plain_kind(module).__qualname__) for path, module in layer.named_modules()]
    parts += [(name, array.shape) for name, array in tree_flatten(layer.parameters())]
    return repr(parts)
