"""The matrix that makes logits, of which each rank multiplies some rows; rank 0 puts the logits together.

It is the head, or the embedding of a model that uses it as its head. What its own call returns is whole again, so
that the model's code around it isn't concerned.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from hippo_mpi.sharding.linear_layers import num_bytes, num_outputs, plain_kind, take_rows
from hippo_mpi.sharding.width_split import Bounds, cut, widths
from hippo_mpi.transport.collective import Collective

_KINDS = {
    nn.Linear: "__call__",
    nn.QuantizedLinear: "__call__",
    nn.Embedding: "as_linear",
    nn.QuantizedEmbedding: "as_linear",
}


@dataclass(frozen=True)
class HeadShards:
    """How the matrix that makes logits is split.

    Args:
        path: of its module in the model.
        bounds: rows [bounds[r], bounds[r + 1]) belong to rank r.
        num_bytes: of the whole.
        is_embedding: whether rank 0 looks up tokens in it, too, and holds all of it.
    """

    path: str
    bounds: Bounds
    num_bytes: int
    is_embedding: bool

    @property
    def method(self) -> str:
        """Name of the method of its module that multiplies."""
        return "as_linear" if self.is_embedding else "__call__"

    def share(self, rank: int) -> float:
        """Return which part of the matrix a rank multiplies."""
        return widths(self.bounds)[rank] / self.bounds[-1]

    def held_share(self, rank: int) -> float:
        """Return which part of the matrix a rank holds."""
        return 1.0 if self.is_embedding and rank == 0 else self.share(rank)


def split_head(model: nn.Module, shares: Sequence[float]) -> HeadShards | None:
    """Split the matrix that makes logits; None if the model's code makes them otherwise, or there are too few.

    Args:
        model: a twin with no weights; its code is run, and nothing is computed.
        shares: of the work, by rank; their sum is 1.
    """
    inside = {id(module) for layer in model.layers for module in layer.modules()}
    calls: list[tuple[str, int]] = []
    kinds = {}
    for path, module in model.named_modules():
        if id(module) not in inside and plain_kind(module) in _KINDS:
            kinds[path] = module, type(module)
            module.__class__ = _noting(type(module), _KINDS[plain_kind(module)], path, calls)
    try:
        width = model(mx.zeros((1, 1), mx.int32)).shape[-1]
    finally:
        for module, kind in kinds.values():
            module.__class__ = kind
    if not calls or calls[-1][1] != width or [path for path, _ in calls].count(calls[-1][0]) > 1:
        return None
    path = calls[-1][0]
    head = kinds[path][0]
    bounds = cut(width, shares)
    if bounds is None or width != num_outputs(head):
        return None
    is_embedding = _KINDS[plain_kind(head)] == "as_linear"
    return HeadShards(path, bounds, num_bytes(head), is_embedding)


def shard_head(head: Any, shards: HeadShards, rank: int, collective: Collective) -> None:
    """Reduce the matrix that makes logits to a rank's rows, in place and lazily; its own call gathers from all ranks."""
    rows = (shards.bounds[rank], shards.bounds[rank + 1])
    part = _as_it_is
    if shards.held_share(rank) == shards.share(rank):
        take_rows(head, [rows])
    else:
        part = partial(_first_rows, count=rows[1])
    head.__class__ = _gathering(type(head), shards.method, part, widths(shards.bounds), collective)


def _gathering(
    kind: type, method: str, part: Callable[[Any], Any], rows: Sequence[int], collective: Collective
) -> type:
    def call(head: Any, x: mx.array) -> mx.array:
        return collective.gather(getattr(kind, method)(part(head), x), rows)

    return type(kind.__name__, (kind,), {method: call})


def _as_it_is(head: Any) -> Any:
    return head


def _first_rows(head: Any, count: int) -> Any:
    """Return a copy of a module with its first rows: of the same memory."""
    part = copy.copy(head)
    for name in ("weight", "scales", "biases"):
        if name in head:
            part[name] = head[name][:count]
    return part


def _noting(kind: type, method: str, path: str, calls: list[tuple[str, int]]) -> type:
    """Return a subclass that notes where a product was made, and its width."""

    def call(module: Any, x: mx.array) -> mx.array:
        made: mx.array = getattr(kind, method)(module, x)
        calls.append((path, made.shape[-1]))
        return made

    return type(kind.__name__, (kind,), {method: call})
