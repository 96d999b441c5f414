"""Which outputs of a linear layer reach which inputs of the linear layers behind it, found by running the model's code.

Every linear layer returns noise of the right shape, whatever it is given, so that nothing is multiplied and a model of
any size takes moments. Where some outputs are NaN instead, NaN shows what they reach: it goes through every
operation of an attention or an activation, whatever the other operand is.

Legend: D width of an input.
"""

from __future__ import annotations

import copy
import zlib
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from hippo_mpi.sharding.linear_layers import Range, linear_layers, num_inputs, num_outputs
from hippo_mpi.tracing import nested_arrays
from hippo_mpi.tracing.nested_arrays import Opaque
from hippo_mpi.tracing.observer import all_caches, caches_among


@dataclass
class Call:
    """A call of a layer, as it was about to be made, to be made again.

    Args:
        layer: its number.
        inputs: positional arguments under "args", the others under "kwargs".
        caches: those among them.
        shares_cache: whether another layer is given one of them.
    """

    layer: int
    inputs: dict[str, Any]
    caches: list[Any]
    shares_cache: bool = False

    def again(self, caches: list[Any] | None = None) -> tuple[dict[str, Any], list[Any]]:
        """Return copies of inputs and caches; or the inputs with other caches, such as an earlier call has left."""
        memo = {id(own): other for own, other in zip(self.caches, caches or [], strict=False)}
        inputs = copy.deepcopy(self.inputs, memo)
        return inputs, [memo[id(cache)] for cache in self.caches]


@dataclass
class Reach:
    """What some outputs of a linear layer reach.

    Args:
        columns: by path of a linear layer of the same layer, whether each of its inputs (D,) is reached.
        called: the linear layers that were called; which these are may depend on values (experts).
        leaves: whether the outputs reach what the layer returns.
        is_kept: whether they reach a cache.
    """

    columns: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    called: frozenset[str] = frozenset()
    leaves: bool = False
    is_kept: bool = False


class ProbedModel:
    """A model whose linear layers return noise.

    Args:
        model: a twin that nobody else uses; its weights hold nothing. The small arrays in its layers (of norms, say)
            get random numbers.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.layers = model, list(model.layers)
        self._running: _Run | None = None
        for index, layer in enumerate(self.layers):
            _fill(layer, index)
            for path, linear in linear_layers(layer).items():
                linear.__class__ = self._noisy(type(linear), path)
        self._kinds = [type(layer) for layer in self.layers]

    def calls(
        self, cache: list[Any], num_rows: int, num_tokens: int, kept: Collection[int] | None = None
    ) -> list[Call]:
        """Run the model, and return its calls of layers, with noise for what one layer gives to the next.

        Args:
            cache: of the layers.
            num_rows: of the step.
            num_tokens: of each row.
            kept: numbers of the calls that are wanted, in which order they come, too; None: all. Only these take memory.
        """
        found: list[Call] = []
        readers: list[list[set[int]]] = []
        given_to: dict[int, set[int]] = defaultdict(set)
        opaque = Opaque(all_caches(cache))

        def spy(kind: type, index: int) -> type:
            def call(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
                given = {"args": args, "kwargs": kwargs}
                memo: dict[int, Any] = {}
                inputs = copy.deepcopy(given, memo)
                entries = [entry for _, entry in caches_among(given, opaque)]
                for entry in entries:
                    given_to[id(entry)].add(index)
                found.append(Call(index, inputs, [memo[id(entry)] for entry in entries]))
                readers.append([given_to[id(entry)] for entry in entries])
                return kind.__call__(layer, *args, **kwargs)

            return type(kind.__name__, (kind,), {"__call__": call})

        for index, (layer, kind) in enumerate(zip(self.layers, self._kinds, strict=True)):
            layer.__class__ = spy(kind, index)
        self._running = _Run()
        try:
            self.model(mx.ones((num_rows, num_tokens), mx.int32), cache=cache)
        finally:
            self._running = None
            for layer, kind in zip(self.layers, self._kinds, strict=True):
                layer.__class__ = kind
        numbers = range(len(found)) if kept is None else kept
        for number in numbers:
            found[number].shares_cache = any(len(layers) > 1 for layers in readers[number])
            _settle(found[number], number)
        return [found[number] for number in numbers]

    def reach(self, call: Call, path: str, rows: Range) -> Reach:
        """Return what the outputs `rows` of a linear layer reach in a call of the layer that holds it."""
        return self._run(call, path, rows)

    def taken(self, call: Call, linear: str, cuts: dict[str, Sequence[Range]]) -> list[mx.array]:
        """Return what a linear layer is given while others return only some of their outputs.

        Args:
            call: of the layer that holds it.
            linear: its path.
            cuts: the ranges of outputs that are returned, by path.

        Raises:
            Exception: the model's code can't work with fewer, whatever it raises then.
        """
        running, _, _ = self._once(call, _Run(cuts=cuts))
        found = [x for path, x in running.taken if path == linear]
        mx.eval(found)
        return found

    def baseline(self, call: Call) -> Reach:
        """Return what is NaN in a call in any case, so that nothing can be seen there."""
        return self._run(call, "", (0, 0))

    def _run(self, call: Call, path: str, rows: Range) -> Reach:
        running, result, caches = self._once(call, _Run(path, rows))
        left = [_is_nan(array).any() for _, array in nested_arrays.find(result, Opaque(caches))]
        taken = [(path, _is_nan(array).reshape(-1, array.shape[-1]).any(0)) for path, array in running.taken]
        kept = [
            _is_nan(array).any() for _, array in nested_arrays.find([vars(cache) for cache in caches], Opaque(caches))
        ]
        mx.eval(left, kept, [columns for _, columns in taken])
        found = Reach(leaves=any(flag.item() for flag in left), is_kept=any(flag.item() for flag in kept))
        found.called = frozenset(name for name, _ in taken)
        for name, linear in linear_layers(self.layers[call.layer]).items():
            found.columns[name] = np.zeros(num_inputs(linear), bool)
        for name, columns in taken:
            found.columns[name] |= np.array(columns)
        return found

    def _once(self, call: Call, running: _Run) -> tuple[_Run, Any, list[Any]]:
        """Make a call; return also what it returns and changes, and its caches."""
        inputs, caches = call.again()
        self._running = running
        try:
            layer, kind = self.layers[call.layer], self._kinds[call.layer]
            result = kind.__call__(layer, *inputs["args"], **inputs["kwargs"])
        finally:
            self._running = None
        return running, (result, inputs), caches

    def _noisy(self, kind: type, path: str) -> type:
        def call(linear: Any, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
            assert self._running is not None
            width = num_outputs(linear)
            if x.shape[-1] == num_inputs(linear):
                shape = kind.__call__(linear, x, *args, **kwargs).shape  # which is never computed
            else:
                shape = (*x.shape[:-1], width)
            return self._running.output(path, x, shape, width)

        return type(kind.__name__, (kind,), {"__call__": call})


class _Run:
    """One run of a layer: what its linear layers are given and return.

    Args:
        path: the linear layer some of whose outputs are NaN.
        rows: which.
        cuts: linear layers that return only some of their outputs.
    """

    def __init__(self, path: str = "", rows: Range = (0, 0), cuts: dict[str, Sequence[Range]] | None = None) -> None:
        self.path, self.rows, self.cuts = path, rows, cuts or {}
        self.taken: list[tuple[str, mx.array]] = []

    def output(self, path: str, x: mx.array, shape: tuple[int, ...], width: int) -> mx.array:
        """Return noise for a linear layer, and remember what it was given."""
        self.taken.append((path, x))
        made = mx.random.normal(shape, key=mx.random.key(zlib.crc32(f"{path} {len(self.taken)}".encode())))
        if path in self.cuts:
            return mx.concatenate([made[..., start:stop] for start, stop in self.cuts[path]], -1)
        if path != self.path:
            return made
        channel = mx.arange(width)
        return mx.where((channel >= self.rows[0]) & (channel < self.rows[1]), mx.array(float("nan")), made)


def _is_nan(array: mx.array) -> mx.array:
    floating = mx.issubdtype(array.dtype, mx.inexact)
    return mx.isnan(array) if floating else mx.zeros(array.shape, mx.bool_)


def _fill(layer: nn.Module, seed: int) -> None:
    """Give random numbers to a layer's arrays that belong to no linear layer."""
    linears = linear_layers(layer)
    filled = []
    for number, (name, array) in enumerate(tree_flatten(layer.parameters())):
        owner = name.rpartition(".")[0]
        if owner not in linears and mx.issubdtype(array.dtype, mx.floating):
            noise = mx.random.normal(array.shape, key=mx.random.key(1000 * seed + number))
            filled.append((name, (0.2 * noise + (1 if array.ndim == 1 else 0)).astype(mx.float32)))
    layer.update(tree_unflatten(filled))


def _settle(call: Call, seed: int) -> None:
    """Compute what a call is given; what comes from other layers becomes noise."""

    def settled(path: nested_arrays.Path, array: mx.array) -> mx.array:
        is_mask = array.ndim <= 2 or array.shape[-2] == array.shape[-1]
        if mx.issubdtype(array.dtype, mx.floating) and not is_mask:
            return mx.random.normal(array.shape, key=mx.random.key(seed))
        return array

    nested_arrays.replace(call.inputs, Opaque(call.caches), settled)
    mx.eval([vars(cache) for cache in call.caches])
    mx.eval([array for _, array in nested_arrays.find(call.inputs, Opaque(call.caches))])
