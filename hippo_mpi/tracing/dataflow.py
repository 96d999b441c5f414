"""The dataflow of a model as plain data: what each layer call reads, makes, and does to its cache.

Made by `tracing.trace` and used by the planner (where the model may be cut, which weights go where) and by
`stage.Stage` (what crosses a cut, what a phantom returns).

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
        """Return the dimension's size for a step."""
        return self.constant * (num_rows if self.rows else 1) * (num_tokens if self.tokens else 1)


@dataclass(frozen=True)
class Shape:
    """An array's shape as a function of a step's rows and tokens, and its dtype."""

    dims: tuple[Dim, ...]
    dtype: mx.Dtype

    def __call__(self, num_rows: int, num_tokens: int) -> tuple[int, ...]:
        """Return the array's shape for a step."""
        return tuple(dim(num_rows, num_tokens) for dim in self.dims)


@dataclass(frozen=True)
class CacheEffect:
    """A method that a layer calls on its cache, found at path `cache` among the layer's arguments.

    Its own arguments are Shapes (arrays), Dims (token counts) or plain values.
    """

    cache: Path
    method: str
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class ReturnedArray:
    """A returned array, described in the call's `outputs` under this path."""

    path: Path


@dataclass(frozen=True)
class ArgumentRef:
    """A returned object that is one of the layer's own mutable arguments."""

    path: Path


@dataclass(frozen=True)
class ReturnedSequence:
    """A returned tuple (also a named one) or list."""

    kind: type
    items: tuple[Returned, ...]


@dataclass(frozen=True)
class ReturnedValue:
    """A returned object without arrays, such as None or a position."""

    value: Any


Returned = ReturnedArray | ArgumentRef | ReturnedSequence | ReturnedValue


@dataclass
class LayerCall:
    """One call of one layer: what it reads, makes and changes."""

    layer: int
    returns: Returned = ReturnedValue(None)
    outputs: dict[Path, Shape] = field(default_factory=dict)  # arrays that it made, by path
    reads: set[Path] = field(default_factory=set)  # outputs of the previous call that this one needs
    prepared: set[Path] = field(default_factory=set)  # inputs made from the embedding, before the first layer
    caches: set[int] = field(default_factory=set)  # entries of the prompt cache that it is given
    effects: list[CacheEffect] = field(default_factory=list)
    weights: set[str] = field(default_factory=set)


@dataclass
class Dataflow:
    """A model's dataflow, from `trace`; equal on all ranks that hold the same model (compare `digest()`)."""

    num_layers: int
    calls: list[LayerCall]
    head_reads: set[Path]  # outputs of the last call that the head needs
    head_weights: set[str]  # weights of embedding, norm and head: everything that no layer call reads
    output_weights: set[str]  # those of `head_weights` that are used after the last layer call: norm and head
    joined: set[tuple[int, int]]  # (a, b): all layers of [a, b] must be on one rank; b = num_layers is the head
    reason: dict[tuple[int, int], str]  # why, for each pair in `joined`
    looks_at_values: bool  # a layer's code evaluates its inputs, and with them everything that they are made from

    @property
    def num_rounds(self) -> int:
        """Times that a forward pass goes through the layers."""
        return len(self.calls) // self.num_layers

    @property
    def hidden_dtype(self) -> mx.Dtype:
        """Return the type of what one layer gives to the next."""
        return next((shape.dtype for call in self.calls for shape in call.outputs.values()), mx.float32)

    def stage_weights(self, start: int, stop: int, shares_head: bool = False) -> set[str]:
        """Return the names of the weights that layers [start, stop) need.

        With start 0, those of embedding, norm and head too; with `shares_head`, those of norm and head on every stage.
        """
        names = set(self.head_weights) if start == 0 else set(self.output_weights) if shares_head else set()
        for call in self.calls:
            if start <= call.layer < stop:
                names |= call.weights
        return names

    def forbidden_cuts(self) -> dict[int, str]:
        """Return the cuts (before layer c, 0 < c < num_layers) that can't be made, each with the reason."""
        return {
            cut: self.reason[a, b]
            for a, b in sorted(self.joined)
            for cut in range(a + 1, min(b, self.num_layers - 1) + 1)
        }

    def digest(self) -> str:
        """Return a short hash of the dataflow, for ranks to compare."""
        text = repr([(c.layer, sorted(map(repr, c.outputs.items())), sorted(map(repr, c.reads))) for c in self.calls])
        text += repr([(sorted(map(repr, c.prepared)), c.effects, sorted(c.weights)) for c in self.calls])
        text += repr([sorted(map(repr, self.head_reads)), sorted(self.head_weights), sorted(self.joined)])
        return hashlib.sha256(text.encode()).hexdigest()[:16]
