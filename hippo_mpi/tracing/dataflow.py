"""What was found out about a model: which layer call reads what, makes what, and does what to its cache.

Plain data, made by `tracing.trace` and used by the planner (where may the model be cut, which weights go where)
and by `stage.Stage` (what crosses a cut, what a phantom returns).

Legend: B rows, L tokens per row. A *call* is one call of one layer in a forward pass, counted from 0.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from hippo_mpi.tracing.nested_arrays import Path


@dataclass(frozen=True)
class Dim:
    """A dimension of an array: `constant`, or a multiple of the rows and tokens of a step."""

    constant: int = 1
    rows: bool = False
    tokens: bool = False

    def __call__(self, num_rows: int, num_tokens: int) -> int:
        return self.constant * (num_rows if self.rows else 1) * (num_tokens if self.tokens else 1)


@dataclass(frozen=True)
class Shape:
    """An array's shape as a function of a step's rows and tokens, and its dtype."""

    dims: tuple[Dim, ...]
    dtype: mx.Dtype

    def __call__(self, num_rows: int, num_tokens: int) -> tuple[int, ...]:
        return tuple(dim(num_rows, num_tokens) for dim in self.dims)


@dataclass(frozen=True)
class CacheEffect:
    """A method that a layer calls on its cache. `cache` is the cache's path among the layer's arguments.

    Arguments are Shapes (arrays), Dims (token counts) or plain values.
    """

    cache: Path
    method: str
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class ReturnedArray:
    """A layer returned the array that `outputs` has under this path."""

    path: Path


@dataclass(frozen=True)
class ArgumentRef:
    """A layer returned one of its own mutable arguments."""

    path: Path


@dataclass(frozen=True)
class ReturnedSequence:
    """A layer returned a tuple (also a named one) or a list."""

    kind: type
    items: tuple[Returned, ...]


@dataclass(frozen=True)
class ReturnedValue:
    """A layer returned something without arrays, such as None or a position."""

    value: Any


Returned = ReturnedArray | ArgumentRef | ReturnedSequence | ReturnedValue


@dataclass
class LayerCall:
    """One call of one layer: what it reads, makes and changes."""

    layer: int
    returns: Returned = ReturnedValue(None)
    outputs: dict[Path, Shape] = field(default_factory=dict)  # arrays that it made, by path
    reads: set[Path] = field(default_factory=set)  # outputs of the call before, that this one needs
    prepared: set[Path] = field(default_factory=set)  # inputs made from the embedding
    caches: set[int] = field(default_factory=set)  # entries of the prompt cache that it is given
    effects: list[CacheEffect] = field(default_factory=list)
    weights: set[str] = field(default_factory=set)


@dataclass
class Dataflow:
    """What `trace` found; the same on every rank for the same model (compare `digest()`)."""

    num_layers: int
    calls: list[LayerCall]
    head_reads: set[Path]  # outputs of the last call that the head needs
    head_weights: set[str]  # weights of embedding, norm and head: everything that no layer call reads
    output_weights: set[str]  # those of them that logits are made with, once the last layer has been called
    joined: set[tuple[int, int]]  # (a, b): all layers of [a, b] must be on one rank; b = num_layers is the head
    reason: dict[tuple[int, int], str]
    looks_at_values: bool  # a layer's code evaluates what it is given, and so everything that this is made from

    @property
    def num_rounds(self) -> int:
        """How often a forward pass goes through the layers."""
        return len(self.calls) // self.num_layers

    def stage_weights(self, start: int, stop: int, shares_head: bool = False) -> set[str]:
        """Return names of the weights that layers [start, stop) need; with start 0, those of embedding and head too.

        With `shares_head`, every stage needs those of norm and head.
        """
        names = set(self.head_weights) if start == 0 else set(self.output_weights) if shares_head else set()
        for call in self.calls:
            if start <= call.layer < stop:
                names |= call.weights
        return names

    def forbidden_cuts(self) -> dict[int, str]:
        """Cuts (before layer c, 0 < c < num_layers) that can't be made, with the reason."""
        return {
            cut: self.reason[a, b]
            for a, b in sorted(self.joined)
            for cut in range(a + 1, min(b, self.num_layers - 1) + 1)
        }

    def digest(self) -> str:
        """A short hash of everything found, for ranks to compare."""
        text = repr([(c.layer, sorted(map(repr, c.outputs.items())), sorted(map(repr, c.reads))) for c in self.calls])
        text += repr([(sorted(map(repr, c.prepared)), c.effects, sorted(c.weights)) for c in self.calls])
        text += repr([sorted(map(repr, self.head_reads)), sorted(self.head_weights), sorted(self.joined)])
        return hashlib.sha256(text.encode()).hexdigest()[:16]
