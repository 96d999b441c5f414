"""Runs a model's own code without computing anything, and notes what each layer call was given, made and changed.

The weights are replaced by arrays that hold one number (stride 0), and every layer's inputs, outputs and cache
arrays by named leaves. A forward pass then builds an MLX graph that is never evaluated; from it is read what each named
array is made from. `trace.py` draws the conclusions.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from hippo_mpi.errors import ModelError
from hippo_mpi.tracing import nested_arrays
from hippo_mpi.tracing.dataflow import ArgumentRef, Returned, ReturnedArray, ReturnedSequence, ReturnedValue
from hippo_mpi.tracing.graph import ancestors, leaf, leaves_of
from hippo_mpi.tracing.nested_arrays import Opaque, Path

_READS = {"make_mask", "size", "empty", "is_trimmable", "keys_and_values", "__getitem__", "__len__", "batch_size"}


@dataclass
class Seen:
    """Observations of one layer call in one pass."""

    layer: int
    inputs: dict[Path, tuple[int, ...]] = field(default_factory=dict)
    outputs: dict[Path, mx.array] = field(default_factory=dict)
    returns: Returned = field(default_factory=lambda: ReturnedValue(None))
    effects: list[tuple[Path, str, tuple[Any, ...]]] = field(default_factory=list)
    caches: set[int] = field(default_factory=set)


class Observer:
    """Runs passes over the model with named leaves, and keeps each pass's graph as sets of leaf names.

    Names: ("weight", name), ("token",), ("in", call, path), ("out", call, path), ("cache", call).

    Args:
        model: its weights are replaced.

    Attributes:
        passes: for each pass, the observations of its calls.
        needs: for each pass, the leaves that each noted array is made from.
        sizes: for each pass, the number of arrays in its graph.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.layers = list(model.layers)
        self.weights = leaves_of(model)
        model.update(tree_unflatten(list(self.weights.items())))
        self.layer_of_weight = _owning_layers(self.layers, self.weights)
        self.passes: list[list[Seen]] = []
        self.needs: list[dict[Any, set[Any]]] = []
        self.sizes: list[int] = []
        self.current: list[Seen] = []
        self.effect_log: list[tuple[Path, str, tuple[Any, ...]]] | None = None
        self.sources: list[tuple[Any, mx.array]] = []
        self.targets: list[tuple[Any, mx.array]] = []

    def run(self, cache: list[Any], num_rows: int, num_tokens: int, names_layers: bool = True) -> None:
        """Run a pass over `cache`.

        Args:
            cache: the model's prompt cache, fresh or from an earlier pass.
            num_rows: rows of the pass.
            num_tokens: tokens of each row.
            names_layers: whether weights of layers get names of their own; a large graph is read faster without.
        """
        tokens = leaf((num_rows, num_tokens), mx.int32)
        self.current, self.targets = [], []
        named = [name for name in self.weights if names_layers or name not in self.layer_of_weight]
        self.sources = [(("token",), tokens), *((("weight", name), self.weights[name]) for name in named)]
        self.opaque = Opaque(all_caches(cache))
        self.cache_index = {id(c): index for index, entry in enumerate(cache) for c in all_caches([entry])}
        plain = [type(layer) for layer in self.layers]
        plain_caches = [(c, type(c)) for c in all_caches(cache)]
        for index, layer in enumerate(self.layers):
            layer.__class__ = self._spy_layer(type(layer), index)
        for c, kind in plain_caches:
            c.__class__ = _spy_cache(kind, self)
        # A compiled function has one graph node for all of its calls, which would connect all layers.
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
        self._note(("logits",), logits)
        self.passes.append(self.current)
        self.needs.append(self._read_graph())

    def was_evaluated(self) -> bool:
        """Return whether a layer looked at values, which evaluates everything before it."""
        return any(
            not needs[("handle", number, path)]
            for run, needs in zip(self.passes, self.needs, strict=True)
            for number, seen in enumerate(run)
            for path in seen.inputs
        )

    def _note(self, name: Any, array: mx.array) -> None:
        """Remember an array, in its present state, whose ancestors are to be found."""
        self.targets.append((name, mx.stop_gradient(array)))

    def _fresh(self, name: Any, like: mx.array) -> mx.array:
        """Return a leaf called `name` in place of `like`, as a new handle: the model may change it in place.

        It is evaluated when the graph is read, with all the others.
        """
        fresh = leaf(like.shape, like.dtype)
        self.sources.append((name, fresh))
        return mx.stop_gradient(fresh)

    def _spy_layer(self, kind: type, index: int) -> type:
        observer = self

        def call(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return observer._on_call(kind, layer, index, args, kwargs)

        return type(kind.__name__, (kind,), {"__call__": call})

    def _on_call(self, kind: type, layer: Any, index: int, args: Any, kwargs: Any) -> Any:
        number = len(self.current)
        seen = Seen(index)
        self.current.append(seen)
        inputs = {"args": args, "kwargs": kwargs}

        def enter(path: Path, array: mx.array) -> mx.array:
            seen.inputs[path] = array.shape
            self._note(("made", number, path), array)
            handle = self._fresh(("in", number, path), array)
            self.targets.append((("handle", number, path), handle))
            return handle

        nested_arrays.replace(inputs, self.opaque, enter)
        args, kwargs = inputs["args"], inputs["kwargs"]
        caches = list(caches_among(inputs, self.opaque))
        self.cache_paths = {id(c): path for path, c in caches}
        seen.caches = {self.cache_index[id(c)] for _, c in caches}
        self.effect_log = seen.effects
        result = kind.__call__(layer, *args, **kwargs)
        self.effect_log = None

        mutable = list(_mutable_arguments(inputs, self.opaque))
        seen.returns = _returned(result, {id(c): path for path, c in mutable}, self.opaque)

        def leave(path: Path, array: mx.array) -> mx.array:
            seen.outputs[path] = array
            self._note(("made-out", number, path), array)
            return self._fresh(("out", number, path), array)

        for path, container in mutable:
            nested_arrays.replace(container, self.opaque, leave, path)
        result = _replace_unless(result, self.opaque, leave, {id(c) for _, c in mutable})
        for _, c in caches:
            self._detach_cache(number, c)
        return result

    def _detach_cache(self, number: int, cache: Any) -> None:
        def new(path: Path, array: mx.array) -> mx.array:
            self._note(("made-cache", number), array)
            return self._fresh(("cache", number), array)

        inside = {key: value for key, value in vars(cache).items() if key != "caches"}
        nested_arrays.replace(inside, self.opaque, new)
        vars(cache).update(inside)

    def _read_graph(self) -> dict[Any, set[Any]]:
        """Return, for every noted array, the names of the leaves that it is computed from."""
        needs: dict[Any, set[Any]] = defaultdict(set)
        sources = [array for _, array in self.sources]
        mx.eval(sources)
        ancestors_of, num_nodes = ancestors([array for _, array in self.targets], sources)
        self.sizes.append(num_nodes)
        for (name, _), indices in zip(self.targets, ancestors_of, strict=True):
            needs[name] |= {self.sources[index][0] for index in indices}
        self.targets, self.sources = [], []
        return needs


def _owning_layers(layers: list[Any], weights: dict[str, mx.array]) -> dict[str, int]:
    """Return the layer that holds each weight, by the weight's name, without weights outside the layers."""
    ids = {id(a): i for i, layer in enumerate(layers) for _, a in tree_flatten(layer.parameters())}
    return {name: ids[id(weight)] for name, weight in weights.items() if id(weight) in ids}


def caches_among(inputs: dict[str, Any], opaque: Opaque) -> Iterator[tuple[Path, Any]]:
    """Yield (path, cache) of every cache among a layer's arguments, including those inside lists of caches."""

    def inside(cache: Any, path: Path) -> Iterator[tuple[Path, Any]]:
        yield path, cache
        for i, child in enumerate(getattr(cache, "caches", [])):
            yield from inside(child, (*path, "caches", i))

    for kind, values in inputs.items():
        for key, value in nested_arrays.children(values):
            if value in opaque and not isinstance(value, nn.Module):
                yield from inside(value, (kind, key))


def _mutable_arguments(inputs: dict[str, Any], opaque: Opaque) -> Iterator[tuple[Path, Any]]:
    for kind, values in inputs.items():
        for key, value in nested_arrays.children(values):
            is_array = isinstance(value, mx.array)
            if value is not None and value not in opaque and not is_array and nested_arrays.is_mutable_container(value):
                yield (kind, key), value


def _returned(result: Any, arguments: dict[int, Path], opaque: Opaque, path: Path = ("return",)) -> Returned:
    """Return the structure of what a layer returned, with paths for its arrays."""
    if id(result) in arguments:
        return ArgumentRef(arguments[id(result)])
    if isinstance(result, mx.array):
        return ReturnedArray(path)
    if isinstance(result, list | tuple):
        items = (_returned(v, arguments, opaque, (*path, i)) for i, v in enumerate(result))
        return ReturnedSequence(type(result), tuple(items))
    if nested_arrays.is_container(result) and result not in opaque and any(nested_arrays.find(result, opaque)):
        raise ModelError(f"a layer returns a {type(result).__name__}, which the pipeline can't send")
    return ReturnedValue(result)


def _replace_unless(result: Any, opaque: Opaque, new: Any, done: set[int], path: Path = ("return",)) -> Any:
    if id(result) in done:
        return result
    if isinstance(result, tuple | list):
        values = [_replace_unless(v, opaque, new, done, (*path, i)) for i, v in enumerate(result)]
        return type(result)(*values) if hasattr(result, "_fields") else type(result)(values)
    return nested_arrays.replace(result, opaque, new, path)


def _spy_cache(kind: type, observer: Observer) -> type:
    """Return a subclass of a cache's class that logs a layer's outermost calls of methods that change the cache."""

    def spy(name: str) -> Any:
        method = getattr(kind, name)

        def call(cache: Any, *args: Any, **kwargs: Any) -> Any:
            log, observer.effect_log = observer.effect_log, None
            try:
                if log is not None:
                    if kwargs:
                        raise ModelError(f"a layer calls {kind.__name__}.{name} with keywords {sorted(kwargs)}")
                    log.append((observer.cache_paths[id(cache)], name, tuple(_described(a) for a in args)))
                return method(cache, *args, **kwargs)
            finally:
                observer.effect_log = log

        return call

    public = [n for n in dir(kind) if callable(getattr(kind, n)) and (not n.startswith("_") or n == "__setitem__")]
    methods = {n: spy(n) for n in public if n not in _READS and not isinstance(_static(kind, n), classmethod)}
    return type(kind.__name__, (kind,), methods)


def _static(kind: type, name: str) -> Any:
    return next(vars(k)[name] for k in kind.__mro__ if name in vars(k))


def _described(argument: Any) -> Any:
    return (argument.shape, argument.dtype) if isinstance(argument, mx.array) else argument


def all_caches(cache: list[Any]) -> list[Any]:
    """Return the cache objects of a prompt cache, including those inside lists of caches."""
    caches = []
    for entry in cache:
        if entry is not None:
            caches += [entry, *all_caches(list(getattr(entry, "caches", [])))]
    return caches
