"""Finds what lazy MLX arrays are computed from, by parsing the DOT drawing that MLX exports of its graph."""

from __future__ import annotations

import io
import re
from collections import defaultdict
from collections.abc import Sequence
from itertools import product

import mlx.core as mx

# mx.export_to_dot takes at most 1,024 named arrays. Each drawing names the sources again, so several targets share one.
_TARGETS_PER_DRAWING, _SOURCES_PER_DRAWING = 200, 800


def ancestors(targets: Sequence[mx.array], sources: Sequence[mx.array]) -> list[set[int]]:
    """Return, for each of the unevaluated `targets`, the indices of the `sources` that it is computed from."""
    indices: list[set[int]] = [set() for _ in targets]
    for target, source in product(
        range(0, len(targets), _TARGETS_PER_DRAWING), range(0, len(sources), _SOURCES_PER_DRAWING)
    ):
        drawn = {f"t{i}": i for i in range(target, min(target + _TARGETS_PER_DRAWING, len(targets)))}
        leaves = {f"s{i}": i for i in range(source, min(source + _SOURCES_PER_DRAWING, len(sources)))}
        parents = _parents({n: targets[i] for n, i in drawn.items()} | {n: sources[i] for n, i in leaves.items()})
        for node, index in drawn.items():
            indices[index].update(leaves[above] for above in _above(node, parents) if above in leaves)
    return indices


def num_nodes(targets: Sequence[mx.array]) -> int:
    """Return the number of arrays in the graph that the first thousand `targets` are computed from."""
    return len(_parents({f"t{i}": target for i, target in enumerate(targets[:1000])}))


def _parents(named: dict[str, mx.array]) -> dict[str, list[str]]:
    """Return the edges of MLX's graph above the named arrays: for each node the nodes that it is computed from."""
    drawing = io.StringIO()
    mx.export_to_dot(drawing, **named)
    parents: dict[str, list[str]] = defaultdict(list)
    for start, stop in re.findall(r'^"?(\w+)"? -> "?(\w+)"?$', drawing.getvalue(), re.MULTILINE):
        parents[stop].append(start)
    return parents


def _above(start: str, parents: dict[str, list[str]]) -> set[str]:
    """Return every node that `start` is computed from, directly or not."""
    seen, todo = {start}, [start]
    while todo:
        for parent in parents.get(todo.pop(), ()):
            if parent not in seen:
                seen.add(parent)
                todo.append(parent)
    return seen - {start}


def leaf(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """Return an evaluated array of zeros that takes the memory of a single number, whatever its shape."""
    array = mx.broadcast_to(mx.zeros((), dtype), shape) if 0 not in shape else mx.zeros(shape, dtype)
    mx.eval(array)
    return array
