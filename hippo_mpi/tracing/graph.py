"""Finds what lazy MLX arrays are computed from, by parsing the DOT drawing that MLX exports of its graph."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

_TARGETS_PER_DRAWING = 1000  # mx.export_to_dot takes at most 1,024 names


def ancestors(targets: Sequence[mx.array], sources: Sequence[mx.array]) -> tuple[list[set[int]], int]:
    """Find what unevaluated arrays are computed from.

    Args:
        targets: the arrays.
        sources: arrays that are computed from no others.

    Returns:
        For each target the indices of its sources; and how many arrays and operations there are in the graph, of which
        those that many targets share may be counted several times.
    """
    found: list[set[int]] = []
    num_nodes = 0
    for first in range(0, len(targets), _TARGETS_PER_DRAWING):
        drawn = {f"t{number}": target for number, target in enumerate(targets[first : first + _TARGETS_PER_DRAWING])}
        names, parents = _draw(drawn, sources)
        indices = {name: index for index, name in enumerate(names)}
        found += [{indices[above] for above in _above(f'"{node}"', parents) if above in indices} for node in drawn]
        num_nodes += len(parents)
    return found, num_nodes


def _draw(targets: dict[str, mx.array], sources: Sequence[mx.array]) -> tuple[list[str], dict[str, list[str]]]:
    """Return MLX's names of the sources, and for each node of the graph above the targets the nodes before it."""
    drawing = io.StringIO()
    mx.export_to_dot(drawing, list(sources), **targets)
    names: list[str] = []
    parents: dict[str, list[str]] = defaultdict(list)
    for line in drawing.getvalue().splitlines():
        start, arrow, stop = line.partition(" -> ")
        if arrow:
            parents[stop].append(start)
        elif len(names) < len(sources) and line.endswith('"; }'):  # the sources' arrays are drawn first
            names.append(line[line.index('"') : -3])
    return names, parents


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
    """Return an array of zeros that takes, once evaluated, the memory of a single number, whatever its shape."""
    return mx.broadcast_to(mx.zeros((), dtype), shape) if 0 not in shape else mx.zeros(shape, dtype)


def leaves_of(model: nn.Module) -> dict[str, mx.array]:
    """Return an evaluated array of zeros for each weight of a model, by name."""
    leaves = {name: leaf(weight.shape, weight.dtype) for name, weight in tree_flatten(model.parameters())}
    mx.eval(leaves)
    return leaves
