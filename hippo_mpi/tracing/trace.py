"""Finds a model's dataflow by observing the model's own code.

A pipeline can cut a model between two layers only if it knows what crosses the cut. Instead of keeping a list of model
families, this runs the model's own code a few times over arrays without data (`observer.py`). The observations show,
for any mlx-lm model:
  - the order in which layers are called (some models go through their layers several times);
  - which outputs of a layer the next one reads, and which inputs are made before the first layer (these two
    are what crosses a cut), and with what shapes;
  - which layers can't be separated (they share a cache, or pass on something that grows with the context);
  - what each layer does to its cache, so that its phantom on another rank can do the same with rows of width 0;
  - which weights each layer reads, and which rank 0 needs for the embedding and the head.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from hippo_mpi.errors import ModelError
from hippo_mpi.tracing.dataflow import CacheEffect, Dataflow, Dim, LayerCall, Shape
from hippo_mpi.tracing.nested_arrays import Path
from hippo_mpi.tracing.observer import Observer

Pass = tuple[int, int, bool]
"""(rows, tokens, whether the pass begins on a fresh cache)."""

# The second pass repeats the first on a longer context, so an array whose shape differs grows with the context; 1 token
# takes the decoding branch; 2 rows distinguish rows from constants.
_SHORT_PASSES: list[Pass] = [(1, 5, True), (1, 5, False), (1, 1, False), (2, 3, True)]
# Some layers begin to pass something on only after many tokens (deepseek_v41 compresses up to that many into one), so
# there are two long passes. Where a layer loops over tokens (recurrent ones, on a CPU), they have fewer tokens, so that
# the loops don't make more arrays than _MAX_LOOP_ARRAYS. All are primes, so that a size shows what it is a multiple of.
_LONG_PASS_TOKENS = (1031, 257, 61, 17)
_MAX_LOOP_ARRAYS = 100_000


def trace(model: nn.Module) -> Dataflow:
    """Find the dataflow of `model`, whose weights are replaced, so that it can't be used afterwards.

    Raises:
        ModelError: the model doesn't call its layers as layers, so that it can't be cut anywhere.
    """
    observer = Observer(model)
    _run(observer, _SHORT_PASSES)
    passes = list(_SHORT_PASSES)
    if not observer.was_evaluated():  # a model that looks at values really computes: long passes would take too long
        long_passes = _long_passes(observer.sizes)
        _run(observer, long_passes, names_layers=False)
        passes += long_passes
    return _Conclusion(observer, passes).dataflow()


def _long_passes(sizes: list[int]) -> list[Pass]:
    """Return two passes over as many tokens as loops over tokens allow, judging by the sizes of the short passes."""
    per_token = (sizes[0] - sizes[-1]) / (_SHORT_PASSES[0][1] - _SHORT_PASSES[-1][1])
    num_tokens = next(
        (tokens for tokens in _LONG_PASS_TOKENS if per_token * tokens <= _MAX_LOOP_ARRAYS), _LONG_PASS_TOKENS[-1]
    )
    return [(1, num_tokens, True), (1, num_tokens, False)]


def _run(observer: Observer, passes: list[Pass], names_layers: bool = True) -> None:
    cache: list[Any] = []
    for num_rows, num_tokens, fresh in passes:
        if fresh:
            cache = make_prompt_cache(observer.model)
        observer.run(cache, num_rows, num_tokens, names_layers)


class _Conclusion:
    """Turns the observations of all passes into a Dataflow."""

    def __init__(self, observer: Observer, passes: list[Pass]) -> None:
        self.observer, self.passes = observer, passes
        self.num_layers = len(observer.layers)
        self.first = observer.passes[0]
        self.joined: set[tuple[int, int]] = set()
        self.reason: dict[tuple[int, int], str] = {}
        orders = {tuple(seen.layer for seen in run) for run in observer.passes}
        order = list(orders.pop())
        if orders or not order or order != list(range(self.num_layers)) * (len(order) // self.num_layers):
            raise ModelError("the model doesn't call its layers one after another, so it can't be cut into stages")

    def dataflow(self) -> Dataflow:
        calls = [self._call(number) for number in range(len(self.first))]
        head_reads: set[Path] = set()
        head_weights: set[str] = set()
        for needs in self.observer.needs:
            self._follow(len(calls), needs[("logits",)], head_reads, head_weights)
        output_weights = set(head_weights)
        for number, call in enumerate(calls):
            for path in call.prepared:
                for needs in self.observer.needs:
                    head_weights |= {n[1] for n in needs[("made", number, path)] if n[0] == "weight"}
            # A layer's weight belongs to the layer's rank even if no pass has read it.
            call.weights |= {n for n, layer in self.observer.layer_of_weight.items() if layer == call.layer}
        self._join_growing(calls, head_reads)
        looks = self.observer.was_evaluated()
        return Dataflow(
            self.num_layers, calls, head_reads, head_weights, output_weights, self.joined, self.reason, looks
        )

    def _join(self, a: int, b: int, why: str) -> None:
        """Note that the layers of calls a < b (b may be the head) can't be separated."""
        last = self.first[b].layer if b < len(self.first) else self.num_layers
        first, second = sorted((self.first[a].layer, last))  # in a later round, b's layer may come first
        if first != second:
            self.joined.add((first, second))
            self.reason.setdefault((first, second), why)

    def _call(self, number: int) -> LayerCall:
        seen = self.first[number]
        call = LayerCall(seen.layer)
        call.outputs = {path: self._shape(number, path) for path in seen.outputs}
        call.returns = seen.returns
        call.effects = self._effects(number)
        call.caches = seen.caches
        for run, needs in zip(self.observer.passes, self.observer.needs, strict=True):
            used: set[Any] = set()
            for path in run[number].outputs:
                used |= needs[("made-out", number, path)]
            used |= needs[("made-cache", number)]
            # A layer that looks at values (dbrx picks its experts in Python) evaluates its inputs, where the
            # graph ends: the handle given to it no longer leads to its leaf.
            used |= {("in", number, path) for path in run[number].inputs if not needs[("handle", number, path)]}
            self._follow_call(number, used, needs, call)
        return call

    def _follow_call(self, number: int, used: set[Any], needs: dict[Any, set[Any]], call: LayerCall) -> None:
        for name in used:
            if name[0] == "in" and name[1] == number:
                self._input(number, name[2], needs[("made", number, name[2])], call)
            elif name[0] == "weight":
                call.weights.add(name[1])
            elif name[0] in ("cache", "out", "in") and name[1] < number:
                self._join(name[1], number, f"layer {self.first[number].layer} reads the cache of another layer")
        for path in {path for run in self.observer.passes for path in run[number].inputs}:
            for name in needs[("made", number, path)]:
                if name[0] == "cache" and name[1] < number:
                    self._join(name[1], number, f"layer {self.first[number].layer} reads the cache of another layer")

    def _input(self, number: int, path: Path, made_from: set[Any], call: LayerCall) -> None:
        from_calls = {n for n in made_from if n[0] == "out"}
        from_weights = {n[1] for n in made_from if n[0] == "weight"}
        if not from_calls and (from_weights or ("token",) in made_from):
            call.prepared.add(path)
            if any(path not in run[number].inputs for run in self.observer.passes):
                self._join(0, number, f"layer {call.layer} is sometimes given something made from the embedding")
            return
        self._follow(number, made_from, call.reads, call.weights)

    def _follow(self, number: int, made_from: set[Any], reads: set[Path], weights: set[str]) -> None:
        """Sort what call `number` (or the head) is made from into reads of the previous call, and weights."""
        for name in made_from:
            if name[0] == "weight":
                weights.add(name[1])
            elif name[0] == "out" and name[1] == number - 1:
                reads.add(name[2])
            elif name[0] == "out":
                reader = f"layer {self.first[number].layer}" if number < len(self.first) else "the head"
                self._join(name[1], number, f"{reader} reads an output of layer {self.first[name[1]].layer}")
            elif name[0] == "cache" and number == len(self.first):
                self._join(name[1], number, f"the head reads the cache of layer {self.first[name[1]].layer}")

    def _join_growing(self, calls: list[LayerCall], head_reads: set[Path]) -> None:
        for number, reads in enumerate([*(c.reads for c in calls), head_reads]):
            for path in reads:
                if self._grows(number - 1, path):
                    self._join(
                        number - 1, number, f"the output of layer {calls[number - 1].layer} grows with the context"
                    )

    def _grows(self, number: int, path: Path) -> bool:
        """True if an output is longer, or exists only, when the same tokens follow others."""
        outputs = [run[number].outputs.get(path) for run in self.observer.passes]
        shapes: dict[tuple[int, int], set[tuple[int, ...]]] = {}
        for (num_rows, num_tokens, _), array in zip(self.passes, outputs, strict=True):
            if array is None:
                return True
            shapes.setdefault((num_rows, num_tokens), set()).add(array.shape)
        return any(len(of_one_size) > 1 for of_one_size in shapes.values())

    def _shape(self, number: int, path: Path) -> Shape:
        arrays = [run[number].outputs.get(path) for run in self.observer.passes]
        if any(a is None for a in arrays):
            return Shape((Dim(),), self.first[number].outputs[path].dtype)
        return Shape(
            _dims([a.shape for a in arrays if a is not None], self.passes), self.first[number].outputs[path].dtype
        )

    def _effects(self, number: int) -> list[CacheEffect]:
        runs = [run[number].effects for run in self.observer.passes]
        if len({tuple((path, method) for path, method, _ in effects) for effects in runs}) != 1:
            raise ModelError(f"layer {self.first[number].layer} uses its cache differently from step to step")
        effects = []
        for position, (path, method, arguments) in enumerate(runs[0]):
            seen = [effects[position][2] for effects in runs]
            fitted = tuple(_fit_argument([s[i] for s in seen], self.passes) for i in range(len(arguments)))
            effects.append(CacheEffect(path, method, fitted))
        return effects


def _dims(shapes: list[tuple[int, ...]], passes: list[Pass]) -> tuple[Dim, ...]:
    if len({len(shape) for shape in shapes}) != 1:
        return (Dim(),)
    return tuple(_fit_dim([shape[axis] for shape in shapes], passes) for axis in range(len(shapes[0])))


def _fit_dim(sizes: list[int], passes: list[Pass]) -> Dim:
    """Return the Dim that gives `sizes` for the passes' rows and tokens; for one that grows otherwise, the tokens."""
    for rows, tokens in ((False, False), (False, True), (True, False), (True, True)):
        scales = [(b if rows else 1) * (t if tokens else 1) for b, t, _ in passes]
        if sizes[0] % scales[0] == 0:
            dim = Dim(sizes[0] // scales[0], rows, tokens)
            if all(dim(b, t) == size for size, (b, t, _) in zip(sizes, passes, strict=True)):
                return dim
    return Dim(tokens=True)


def _fit_argument(values: list[Any], passes: list[Pass]) -> Any:
    """Return the Shape, with width 0, of an array argument; the Dim of a token count; any other argument as it is."""
    first = values[0]
    if isinstance(first, tuple) and len(first) == 2 and isinstance(first[1], mx.Dtype):
        dims = _dims([value[0] for value in values], passes)
        if len(dims) == 4:  # keys or values (B, heads, L, head size): one head is enough
            dims = (dims[0], Dim(), dims[2], Dim(0))
        elif len(dims) == 3 and dims[1].tokens:  # rows of a window (B, L, width)
            dims = (dims[0], dims[1], Dim(0))
        else:  # a state of fixed size
            dims = (dims[0], Dim(0))
        return Shape(dims, first[1])
    if isinstance(first, int) and not isinstance(first, bool) and any(v != first for v in values):
        return _fit_dim(values, passes)
    return first
