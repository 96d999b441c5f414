"""Splitting every layer of a model over ranks: which rank holds what of it, proved layer by layer.

`plan_shards` proposes a split of each layer (`width_split.py`) and tries it at the model's own sizes
(`shard_check.py`). A layer that doesn't pass stays whole on every rank, which is right in any case.
"""

from __future__ import annotations

import contextlib
import os
from collections import defaultdict
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.cache import make_prompt_cache

from hippo_mpi.errors import UserError
from hippo_mpi.sharding.dependence import Call, ProbedModel
from hippo_mpi.sharding.linear_layers import linear_layers, num_bytes, plain_kind
from hippo_mpi.sharding.shard_check import Trial, difference, is_right
from hippo_mpi.sharding.sharded_head import HeadShards, shard_head, split_head
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
        layer_bytes: of each layer's weights, by rank.
        head: how the matrix that makes logits is split, if it is.
    """

    num_ranks: int
    layers: tuple[LayerShards, ...]
    refused: dict[int, str]
    layer_bytes: tuple[tuple[int, ...], ...] = ()
    head: HeadShards | None = None

    @property
    def is_whole(self) -> bool:
        """True if no layer is split."""
        return not any(layer.columns for layer in self.layers)

    def held_bytes(self, rank: int, layers: tuple[int, int] | None = None) -> int:
        """Return the bytes of layers' weights that a rank holds: of all, or of some [start, stop)."""
        return sum(held[rank] for held in self.layer_bytes[slice(*(layers or (None,)))])

    def head_share(self, rank: int) -> float:
        """Return which part of the logits a rank makes."""
        return float(rank == 0) if self.head is None else self.head.share(rank)

    def moved_head_bytes(self, rank: int) -> int:
        """Return how many bytes more a rank holds than if the whole head lay on rank 0."""
        if self.head is None:
            return 0
        return round((self.head.held_share(rank) - float(rank == 0)) * self.head.num_bytes)


def plan_shards(
    model: nn.Module,
    shares: Sequence[float],
    on_progress: Callable[[], None] = lambda: None,
    is_exact: bool = False,
    has_whole_head: bool = False,
) -> ShardPlan:
    """Find how the layers of a model, and its head, are split over ranks.

    Args:
        model: a twin with no weights (`tracing.graph.leaf`), which can't be used afterwards; adapters are fused.
        shares: of the work, by rank; their sum is 1.
        on_progress: called after each layer.
        is_exact: whether nothing may be added up over the ranks, as that rounds otherwise than one rank does.
        has_whole_head: whether every rank makes all logits by itself.

    Raises:
        UserError: an adapter can't be fused.
    """
    fuse_adapters(model)
    with _uncompiled():
        head = None if has_whole_head else split_head(model, shares)
        return replace(_Planner(model, shares, on_progress, is_exact).plan(), head=head)


def restrict(
    model: nn.Module,
    plan: ShardPlan,
    blocks: Container[str],
    has_split_head: bool,
    on_progress: Callable[[], None] = lambda: None,
) -> ShardPlan:
    """Return a plan in which only some of what is split stays so; it is tried again.

    Args:
        model: a twin with no weights, which can't be used afterwards.
        plan: for the same model.
        blocks: paths of linear layers that stay split by their columns, and with them what feeds them.
        has_split_head: whether the head stays split.
        on_progress: called after each layer.
    """
    fuse_adapters(model)
    with _uncompiled():
        planner = _Planner(model, (1 / plan.num_ranks,) * plan.num_ranks, on_progress, False)
        kept = planner.plan([layer.only(blocks) for layer in plan.layers])
    return replace(kept, refused={**plan.refused, **kept.refused}, head=plan.head if has_split_head else None)


@contextlib.contextmanager
def _uncompiled() -> Iterator[None]:
    """Let compiled functions run as they are written inside: they would keep the graphs of noise."""
    mx.disable_compile()
    try:
        yield
    finally:
        if not os.environ.get("MLX_DISABLE_COMPILE"):
            mx.enable_compile()


class _Planner:
    def __init__(
        self, model: nn.Module, shares: Sequence[float], on_progress: Callable[[], None], is_exact: bool
    ) -> None:
        # Weights that belong to no linear layer; these become noise now.
        self._other_bytes = [_other_bytes(layer) for layer in model.layers]
        self._probe, self._shares, self._on_progress = ProbedModel(model), shares, on_progress
        self._is_exact = is_exact
        self._calls = self._probe.calls(make_prompt_cache(model), 1, _PROBED_TOKENS)
        cache: list[Any] = []
        self._passes = []
        for num_rows, num_tokens, begins in _TRIED_PASSES:
            cache = make_prompt_cache(model) if begins else cache
            self._passes.append((self._probe.calls(cache, num_rows, num_tokens), begins))
        self._found: dict[str, list[LayerShards]] = defaultdict(list)

    def plan(self, given: Sequence[LayerShards] | None = None) -> ShardPlan:
        """Find how each layer is split, or try what is given."""
        layers: dict[int, LayerShards] = {}
        refused = {}
        for number, call in enumerate(self._calls):
            if call.layer not in layers:  # a model may go through its layers several times
                shards, off = self._find(call, number) if given is None else self._try(call, number, given[call.layer])
                layers[call.layer] = shards if is_right(off) else LayerShards()
                if not is_right(off):
                    refused[call.layer] = f"its output would be off by {off:.1g} of its largest value"
                self._on_progress()
        found = tuple(layers.get(index, LayerShards()) for index in range(len(self._probe.layers)))
        return ShardPlan(len(self._shares), found, refused, self._layer_bytes(found))

    def _layer_bytes(self, layers: Sequence[LayerShards]) -> tuple[tuple[int, ...], ...]:
        found = []
        for layer, shards, other in zip(self._probe.layers, layers, self._other_bytes, strict=True):
            linear = sum(num_bytes(one) for one in linear_layers(layer).values())
            found.append(
                tuple(other + round(linear * shards.held_share(layer, rank)) for rank in range(len(self._shares)))
            )
        return tuple(found)

    def _find(self, call: Call, number: int) -> tuple[LayerShards, float]:
        """Return a layer's split, and by how much its outputs are off.

        What was found for a layer of the same structure is tried first.
        """
        kind = structure_of(self._probe.layers[call.layer], call)
        for shards in self._found[kind]:
            _, off = self._try(call, number, shards)
            if is_right(off):
                return shards, off
        shards = split_layer(self._probe, call, self._shares, self._is_exact)
        self._found[kind].append(shards)
        return self._try(call, number, shards)

    def _try(self, call: Call, number: int, shards: LayerShards) -> tuple[LayerShards, float]:
        trials = [Trial(calls[number], begins) for calls, begins in self._passes]
        return shards, difference(self._probe.layers[call.layer], shards, len(self._shares), trials)


def _other_bytes(layer: nn.Module) -> int:
    total: int = sum(array.nbytes for _, array in tree_flatten(layer.parameters()))
    return total - sum(num_bytes(linear) for linear in linear_layers(layer).values())


def shard_model(model: nn.Module, plan: ShardPlan, rank: int, collective: Collective, absent: float = 0.0) -> None:
    """Reduce a model to a rank's part of each layer and of the head, in place and lazily; embedding and norm stay whole.

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
    if plan.head is not None:
        shard_head(dict(model.named_modules())[plan.head.path], plan.head, rank, collective)


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


def structure_of(layer: nn.Module, call: Call) -> str:
    """Return what layers have in common that are likely to be split alike: classes and sizes."""
    parts: list[Any] = [call.shares_cache, [type(cache).__name__ for cache in call.caches]]
    parts += [(path, plain_kind(module).__qualname__) for path, module in layer.named_modules()]
    parts += [(name, array.shape) for name, array in tree_flatten(layer.parameters())]
    return repr(parts)
