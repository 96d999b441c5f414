"""Which layer of a model needs what: found by running the model's own code once, without computing anything.

A pipeline may cut a model between any two layers only if it knows what crosses the cut. Instead of a list of
model families, the model itself is asked. Its weights are replaced by arrays that hold one number (stride 0),
and every layer's inputs, outputs and cache arrays by named leaves. The forward pass then builds an MLX graph
that is never evaluated, and what each layer, each cache and the logits are made from is read out of it.

`trace` answers, for any mlx-lm model:
  - the order in which layers are called (some models go through their layers several times);
  - which outputs of a layer the next one reads, and which inputs are made before the first layer (these two
    are what crosses a cut), and with what shapes;
  - which layers can't be parted (they share a cache, or hand on something that grows with the context);
  - what each layer does to its cache, so that a layer that lives elsewhere can do the same with rows of width 0;
  - which weights each layer reads, and which rank 0 needs for the embedding and the head.

Legend: B rows, L tokens per row. A *call* is one call of one layer in a forward pass, counted from 0.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.cache import make_prompt_cache

from hippo_mpi.errors import ModelError
from hippo_mpi.shard import arrays_in
from hippo_mpi.shard.arrays_in import Opaque, Path

# (rows, tokens, on a fresh cache?) of the passes. The second repeats the shape of the first, so that a shape
# that differs grows with the context; 1 token takes the decoding branch; 2 rows tell rows from constants.
_PASSES = [(1, 5, True), (1, 5, False), (1, 1, False), (2, 3, True)]
_READS = {"make_mask", "size", "empty", "is_trimmable", "keys_and_values", "__getitem__", "__len__", "batch_size"}


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
    prepared: dict[Path, Shape] = field(default_factory=dict)  # inputs made from the embedding, by path
    effects: list[CacheEffect] = field(default_factory=list)
    weights: set[str] = field(default_factory=set)


@dataclass
class Dataflow:
    """What `trace` found; the same on every rank for the same model (compare `digest()`)."""

    num_layers: int
    calls: list[LayerCall]
    head_reads: set[Path]  # outputs of the last call that the head needs
    head_weights: set[str]  # weights of embedding, norm and head: everything that no layer call reads
    joined: set[tuple[int, int]]  # (a, b): all layers of [a, b] must be on one rank; b = num_layers is the head
    reason: dict[tuple[int, int], str]

    @property
    def num_rounds(self) -> int:
        """How often a forward pass goes through the layers."""
        return len(self.calls) // self.num_layers

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
        text += repr([(sorted(map(repr, c.prepared.items())), c.effects, sorted(c.weights)) for c in self.calls])
        text += repr([sorted(map(repr, self.head_reads)), sorted(self.head_weights), sorted(self.joined)])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def trace(model: nn.Module) -> Dataflow:
    """Find the dataflow of `model`. The model is used up: its weights are replaced.

    Raises:
        ModelError: the model doesn't call its layers as layers, so that it can't be cut anywhere.
    """
    tracer = _Tracer(model)
    cache: list[Any] = []
    for num_rows, num_tokens, fresh in _PASSES:
        if fresh:
            cache = make_prompt_cache(model)
        tracer.run(cache, num_rows, num_tokens)
    return tracer.conclude()


def all_caches(cache: list[Any]) -> list[Any]:
    """The cache objects of a prompt cache, those inside lists of caches too."""
    found = []
    for entry in cache:
        if entry is not None:
            found += [entry, *all_caches(list(getattr(entry, "caches", [])))]
    return found


@dataclass
class _Seen:
    """What one pass saw of one call."""

    layer: int
    inputs: dict[Path, tuple[int, ...]] = field(default_factory=dict)
    outputs: dict[Path, mx.array] = field(default_factory=dict)
    returns: Returned = ReturnedValue(None)
    effects: list[tuple[Path, str, tuple[Any, ...]]] = field(default_factory=list)


class _Tracer:
    """Runs passes over the model with named leaves, and keeps each pass's graph as sets of leaf names.

    Names: ("weight", name), ("token",), ("in", call, path), ("out", call, path), ("cache", call).
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.layers = list(model.layers)
        self.weights: dict[str, mx.array] = {}
        weights = tree_flatten(model.parameters())
        for name, weight in weights:
            self.weights[name] = _leaf(weight.shape, weight.dtype)
        model.update(tree_unflatten(list(self.weights.items())))
        self.layer_of_weight = _owning_layers(self.layers, self.weights)
        self.passes: list[list[_Seen]] = []
        self.needs: list[dict[Any, set[Any]]] = []
        self.current: list[_Seen] = []
        self.effect_log: list[tuple[Path, str, tuple[Any, ...]]] | None = None
        self.roots: dict[str, mx.array] = {}
        self.names: dict[str, Any] = {}

    def run(self, cache: list[Any], num_rows: int, num_tokens: int) -> None:
        self.current, self.roots, self.names = [], {}, {}
        for name, weight in self.weights.items():
            self._name(("weight", name), weight)
        tokens = _leaf((num_rows, num_tokens), mx.int32)
        self._name(("token",), tokens)
        self.opaque = Opaque(all_caches(cache))
        plain = [type(layer) for layer in self.layers]
        plain_caches = [(c, type(c)) for c in all_caches(cache)]
        for index, layer in enumerate(self.layers):
            layer.__class__ = self._spy_layer(type(layer), index)
        for c, kind in plain_caches:
            c.__class__ = _spy_cache(kind, self)
        # Compiled functions share one graph node among all their calls, which would tie all layers together.
        mx.disable_compile()
        try:
            logits = self.model(mx.stop_gradient(tokens), cache=cache)
        finally:
            if not os.environ.get("MLX_DISABLE_COMPILE"):
                mx.enable_compile()
            for layer, kind in zip(self.layers, plain, strict=True):
                layer.__class__ = kind
            for c, kind in plain_caches:
                c.__class__ = kind
        self._name(("logits",), mx.stop_gradient(logits))
        self.passes.append(self.current)
        self.needs.append(self._read_graph())

    def _name(self, name: Any, array: mx.array) -> None:
        key = f"n_{len(self.roots)}"
        self.roots[key] = array
        self.names[key] = name

    def _fresh(self, name: Any, like: mx.array) -> mx.array:
        """A leaf called `name` in place of `like`. In-place changes by the model must not rename it."""
        leaf = _leaf(like.shape, like.dtype)
        self._name(name, leaf)
        return mx.stop_gradient(leaf)

    def _spy_layer(self, kind: type, index: int) -> type:
        tracer = self

        def call(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return tracer._on_call(kind, layer, index, args, kwargs)

        return type(kind.__name__, (kind,), {"__call__": call})

    def _on_call(self, kind: type, layer: Any, index: int, args: Any, kwargs: Any) -> Any:
        number = len(self.current)
        seen = _Seen(index)
        self.current.append(seen)
        inputs = {"args": args, "kwargs": kwargs}

        def enter(path: Path, array: mx.array) -> mx.array:
            seen.inputs[path] = array.shape
            self._name(("made", number, path), mx.stop_gradient(array))
            handle = self._fresh(("in", number, path), array)
            self._name(("handle", number, path), handle)
            return handle

        arrays_in.replace(inputs, self.opaque, enter)
        args, kwargs = inputs["args"], inputs["kwargs"]
        caches = list(caches_among(inputs, self.opaque))
        self.cache_paths = {id(c): path for path, c in caches}
        self.effect_log = seen.effects
        result = kind.__call__(layer, *args, **kwargs)
        self.effect_log = None

        mutable = list(_mutable_arguments(inputs, self.opaque))
        seen.returns = _returned(result, {id(c): path for path, c in mutable}, self.opaque)

        def leave(path: Path, array: mx.array) -> mx.array:
            seen.outputs[path] = array
            self._name(("made-out", number, path), mx.stop_gradient(array))
            return self._fresh(("out", number, path), array)

        for path, container in mutable:
            arrays_in.replace(container, self.opaque, leave, path)
        result = _replace_unless(result, self.opaque, leave, {id(c) for _, c in mutable})
        for _, c in caches:
            self._detach_cache(number, c)
        return result

    def _detach_cache(self, number: int, cache: Any) -> None:
        def new(path: Path, array: mx.array) -> mx.array:
            self._name(("made-cache", number), mx.stop_gradient(array))
            return self._fresh(("cache", number), array)

        inside = {key: value for key, value in vars(cache).items() if key != "caches"}
        arrays_in.replace(inside, self.opaque, new)
        vars(cache).update(inside)

    def _read_graph(self) -> dict[Any, set[Any]]:
        """For every named array: the leaves that it is made from."""
        parents = _parents(self.roots)
        needs: dict[Any, set[Any]] = defaultdict(set)
        for key, name in self.names.items():
            if parents.get(key):
                needs[name] |= {self.names[node] for node in _above(key, parents) if node in self.names}
        return needs

    def conclude(self) -> Dataflow:
        return _Conclusion(self).dataflow()


def ancestors(targets: dict[str, mx.array], sources: dict[str, mx.array]) -> set[str]:
    """Names of those `sources` that any of the (unevaluated) `targets` is made from."""
    parents = _parents({**sources, **targets})
    return {node for target in targets for node in _above(target, parents)} & set(sources)


def _parents(named: dict[str, mx.array]) -> dict[str, list[str]]:
    """The edges of MLX's graph above the named arrays, read off its drawing of it."""
    drawing = io.StringIO()
    mx.export_to_dot(drawing, **named)
    parents: dict[str, list[str]] = defaultdict(list)
    for line in drawing.getvalue().splitlines():
        edge = re.match(r'"?(\w+)"? -> "?(\w+)"?$', line)
        if edge:
            parents[edge[2]].append(edge[1])
    return parents


def _above(start: str, parents: dict[str, list[str]]) -> set[str]:
    """Every node that `start` is made from."""
    seen, todo = {start}, [start]
    while todo:
        for parent in parents.get(todo.pop(), ()):
            if parent not in seen:
                seen.add(parent)
                todo.append(parent)
    return seen - {start}


def _leaf(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """An evaluated array of zeros that holds one number, whatever its shape."""
    leaf = mx.broadcast_to(mx.zeros((), dtype), shape) if 0 not in shape else mx.zeros(shape, dtype)
    mx.eval(leaf)
    return leaf


def _owning_layers(layers: list[Any], weights: dict[str, mx.array]) -> dict[str, int]:
    """Which layer holds a weight, by name; weights outside the layers aren't in it."""
    ids = {id(a): i for i, layer in enumerate(layers) for _, a in tree_flatten(layer.parameters())}
    return {name: ids[id(weight)] for name, weight in weights.items() if id(weight) in ids}


def caches_among(inputs: dict[str, Any], opaque: Opaque) -> Iterator[tuple[Path, Any]]:
    """(path, cache) of every cache among a layer's arguments, those inside lists of caches too."""

    def inside(cache: Any, path: Path) -> Iterator[tuple[Path, Any]]:
        yield path, cache
        for i, child in enumerate(getattr(cache, "caches", [])):
            yield from inside(child, (*path, "caches", i))

    for kind, values in inputs.items():
        for key, value in arrays_in.children(values):
            if value in opaque and not isinstance(value, nn.Module):
                yield from inside(value, (kind, key))


def _mutable_arguments(inputs: dict[str, Any], opaque: Opaque) -> Iterator[tuple[Path, Any]]:
    for kind, values in inputs.items():
        for key, value in arrays_in.children(values):
            is_array = isinstance(value, mx.array)
            if value is not None and value not in opaque and not is_array and arrays_in.is_mutable_container(value):
                yield (kind, key), value


def _returned(result: Any, arguments: dict[int, Path], opaque: Opaque, path: Path = ("return",)) -> Returned:
    """The nest that a layer returned, with paths for its arrays."""
    if id(result) in arguments:
        return ArgumentRef(arguments[id(result)])
    if isinstance(result, mx.array):
        return ReturnedArray(path)
    if isinstance(result, list | tuple):
        items = (_returned(v, arguments, opaque, (*path, i)) for i, v in enumerate(result))
        return ReturnedSequence(type(result), tuple(items))
    if arrays_in.is_container(result) and result not in opaque and any(arrays_in.find(result, opaque)):
        raise ModelError(f"a layer returns a {type(result).__name__}, which the pipeline can't send")
    return ReturnedValue(result)


def _replace_unless(result: Any, opaque: Opaque, new: Any, done: set[int], path: Path = ("return",)) -> Any:
    if id(result) in done:
        return result
    if isinstance(result, tuple | list):
        values = [_replace_unless(v, opaque, new, done, (*path, i)) for i, v in enumerate(result)]
        return type(result)(*values) if hasattr(result, "_fields") else type(result)(values)
    return arrays_in.replace(result, opaque, new, path)


def _spy_cache(kind: type, tracer: _Tracer) -> type:
    """A subclass of a cache's class that notes the outermost changing method calls of a layer."""

    def spy(name: str) -> Any:
        method = getattr(kind, name)

        def call(cache: Any, *args: Any, **kwargs: Any) -> Any:
            log, tracer.effect_log = tracer.effect_log, None
            try:
                if log is not None:
                    if kwargs:
                        raise ModelError(f"a layer calls {kind.__name__}.{name} with keywords {sorted(kwargs)}")
                    log.append((tracer.cache_paths[id(cache)], name, tuple(_described(a) for a in args)))
                return method(cache, *args, **kwargs)
            finally:
                tracer.effect_log = log

        return call

    public = [n for n in dir(kind) if callable(getattr(kind, n)) and (not n.startswith("_") or n == "__setitem__")]
    methods = {n: spy(n) for n in public if n not in _READS and not isinstance(_static(kind, n), classmethod)}
    return type(kind.__name__, (kind,), methods)


def _static(kind: type, name: str) -> Any:
    return next(vars(k)[name] for k in kind.__mro__ if name in vars(k))


def _described(argument: Any) -> Any:
    return (argument.shape, argument.dtype) if isinstance(argument, mx.array) else argument


class _Conclusion:
    """Turns what the passes saw into a Dataflow."""

    def __init__(self, tracer: _Tracer) -> None:
        self.tracer = tracer
        self.num_layers = len(tracer.layers)
        self.first = tracer.passes[0]
        self.joined: set[tuple[int, int]] = set()
        self.reason: dict[tuple[int, int], str] = {}
        orders = {tuple(seen.layer for seen in run) for run in tracer.passes}
        order = list(orders.pop())
        if orders or not order or order != list(range(self.num_layers)) * (len(order) // self.num_layers):
            raise ModelError("the model doesn't call its layers one after another, so it can't be cut into stages")

    def dataflow(self) -> Dataflow:
        calls = [self._call(number) for number in range(len(self.first))]
        last = len(calls) - 1
        head_reads: set[Path] = set()
        head_weights: set[str] = set()
        for needs in self.tracer.needs:
            self._follow(len(calls), needs[("logits",)], head_reads, head_weights, needs)
        for number, call in enumerate(calls):
            for path in call.prepared:
                for needs in self.tracer.needs:
                    head_weights |= {n[1] for n in needs[("made", number, path)] if n[0] == "weight"}
            # A weight of a layer belongs to its rank even if no pass read it.
            call.weights |= {n for n, layer in self.tracer.layer_of_weight.items() if layer == call.layer}
        self._join_growing(calls, head_reads)
        assert last >= 0
        return Dataflow(self.num_layers, calls, head_reads, head_weights, self.joined, self.reason)

    def _join(self, a: int, b: int, why: str) -> None:
        """Layers of calls a < b (b may be the head) can't be parted."""
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
        for needs in self.tracer.needs:
            used: set[Any] = set()
            for path in seen.outputs:
                used |= needs[("made-out", number, path)]
            used |= needs[("made-cache", number)]
            # A layer that looks at values (dbrx picks its experts in Python) evaluates its inputs, and the
            # graph ends there: then the handle given to it has lost its leaf.
            used |= {("in", number, path) for path in seen.inputs if not needs[("handle", number, path)]}
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
        for path in self.first[number].inputs:
            for name in needs[("made", number, path)]:
                if name[0] == "cache" and name[1] < number:
                    self._join(name[1], number, f"layer {self.first[number].layer} reads the cache of another layer")

    def _input(self, number: int, path: Path, made_from: set[Any], call: LayerCall) -> None:
        from_calls = {n for n in made_from if n[0] == "out"}
        from_weights = {n[1] for n in made_from if n[0] == "weight"}
        if not from_calls and (from_weights or ("token",) in made_from):
            call.prepared[path] = self._input_shape(number, path)
            return
        self._follow(number, made_from, call.reads, call.weights, {})

    def _follow(
        self, number: int, made_from: set[Any], reads: set[Path], weights: set[str], needs: dict[Any, set[Any]]
    ) -> None:
        """Sort what call `number` (or the head) is made from into reads of the call before, and weights."""
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
                again = self.tracer.passes[1][number - 1].outputs[path].shape
                if again != self.first[number - 1].outputs[path].shape:
                    self._join(
                        number - 1, number, f"what layer {calls[number - 1].layer} hands on grows with the context"
                    )

    def _shape(self, number: int, path: Path) -> Shape:
        arrays = [run[number].outputs.get(path) for run in self.tracer.passes]
        if any(a is None for a in arrays):
            return Shape((Dim(),), self.first[number].outputs[path].dtype)
        return Shape(_dims([a.shape for a in arrays if a is not None]), self.first[number].outputs[path].dtype)

    def _input_shape(self, number: int, path: Path) -> Shape:
        return Shape(_dims([run[number].inputs[path] for run in self.tracer.passes]), mx.float32)

    def _effects(self, number: int) -> list[CacheEffect]:
        runs = [run[number].effects for run in self.tracer.passes]
        if len({tuple((path, method) for path, method, _ in effects) for effects in runs}) != 1:
            raise ModelError(f"layer {self.first[number].layer} treats its cache differently from step to step")
        effects = []
        for position, (path, method, arguments) in enumerate(runs[0]):
            seen = [effects[position][2] for effects in runs]
            fitted = tuple(_fit_argument([s[i] for s in seen]) for i in range(len(arguments)))
            effects.append(CacheEffect(path, method, fitted))
        return effects


def _dims(shapes: list[tuple[int, ...]]) -> tuple[Dim, ...]:
    if len({len(shape) for shape in shapes}) != 1:
        return (Dim(),)
    return tuple(_fit_dim([shape[axis] for shape in shapes]) for axis in range(len(shapes[0])))


def _fit_dim(sizes: list[int]) -> Dim:
    """The Dim that gives `sizes` for the passes' rows and tokens (a dimension that grows: its tokens)."""
    for rows, tokens in ((False, False), (False, True), (True, False), (True, True)):
        scales = [(b if rows else 1) * (t if tokens else 1) for b, t, _ in _PASSES]
        if sizes[0] % scales[0] == 0:
            dim = Dim(sizes[0] // scales[0], rows, tokens)
            if all(dim(b, t) == size for size, (b, t, _) in zip(sizes, _PASSES, strict=True)):
                return dim
    return Dim(tokens=True)


def _fit_argument(values: list[Any]) -> Any:
    """An array argument becomes the Shape of rows of width 0; a count of tokens a Dim; else it stays."""
    first = values[0]
    if isinstance(first, tuple) and len(first) == 2 and isinstance(first[1], mx.Dtype):
        dims = _dims([value[0] for value in values])
        if len(dims) == 4:  # keys or values (B, heads, L, head size): one head is enough
            dims = (dims[0], Dim(), dims[2], Dim(0))
        elif len(dims) == 3 and dims[1].tokens:  # rows of a window (B, L, width)
            dims = (dims[0], dims[1], Dim(0))
        else:  # a state of fixed size
            dims = (dims[0], Dim(0))
        return Shape(dims, first[1])
    if isinstance(first, int) and not isinstance(first, bool) and any(v != first for v in values):
        return _fit_dim(values)
    return first
