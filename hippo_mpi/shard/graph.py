"""What lazy MLX arrays are made from, read off the drawing that MLX makes of its own graph."""

from __future__ import annotations

import io
import re
from collections import defaultdict

import mlx.core as mx


def ancestors(targets: dict[str, mx.array], sources: dict[str, mx.array]) -> set[str]:
    """Names of those `sources` that any of the (unevaluated) `targets` is made from."""
    parents = parents_of({**sources, **targets})
    return {node for target in targets for node in above(target, parents)} & set(sources)


def parents_of(named: dict[str, mx.array]) -> dict[str, list[str]]:
    """The edges of MLX's graph above the named arrays, read off its drawing of it."""
    drawing = io.StringIO()
    mx.export_to_dot(drawing, **named)
    parents: dict[str, list[str]] = defaultdict(list)
    for line in drawing.getvalue().splitlines():
        edge = re.match(r'"?(\w+)"? -> "?(\w+)"?$', line)
        if edge:
            parents[edge[2]].append(edge[1])
    return parents


def above(start: str, parents: dict[str, list[str]]) -> set[str]:
    """Every node that `start` is made from."""
    seen, todo = {start}, [start]
    while todo:
        for parent in parents.get(todo.pop(), ()):
            if parent not in seen:
                seen.add(parent)
                todo.append(parent)
    return seen - {start}


def leaf(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """An evaluated array of zeros that holds one number, whatever its shape."""
    array = mx.broadcast_to(mx.zeros((), dtype), shape) if 0 not in shape else mx.zeros(shape, dtype)
    mx.eval(array)
    return array
