"""Which rank holds which rows and columns of a layer's linear layers, so that each does its share of the layer's work.

A linear layer whose outputs leave the layer is split by its columns: each rank multiplies its own part of the inputs,
and the results are added up over the ranks. What feeds only such linear layers is split by its rows: each rank computes
the outputs that its own columns need. All others stay whole. What needs what comes from `dependence.py`; nothing
here knows a model's names, heads or groups.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import Any

import mlx.nn as nn
import numpy as np

from hippo_mpi.sharding.dependence import Call, ProbedModel, Reach
from hippo_mpi.sharding.linear_layers import (
    Range,
    column_unit,
    linear_layers,
    num_bytes,
    num_inputs,
    num_outputs,
    plain_kind,
)
from hippo_mpi.sharding.narrowing import Narrowing, Rows, find_narrowing, innermost

_MIN_SHARE = 0.02  # of a layer's weights: splitting a smaller one would cost more than it saves
_LEAST = 1e-9  # a share that rounds to nothing counts as that much
_MAX_RUNS = 96  # of a layer, to find the rows of one linear layer; beyond, some are held twice
_ACTIVE_EXPERTS = 8  # about as many of a mixture work on a token
_SELECTING = re.compile(r"\b(?:argpartition|argsort|topk)\(")
_EXPERTS = "mlx_lm.models.switch_layers"  # sorts tokens by expert and back, and picks none

Bounds = tuple[int, ...]
"""Rows or columns [bounds[r], bounds[r + 1]) belong to rank r."""


def widths(bounds: Bounds) -> list[int]:
    """Return how many belong to each rank."""
    return [stop - start for start, stop in pairwise(bounds)]


def cut(width: int, shares: Sequence[float]) -> Bounds | None:
    """Return bounds near those that the shares ask for, at multiples of what kernels work on at once.

    None if there is too little for so many ranks.
    """
    unit = 64 if width >= 4096 else 8
    bounds, wanted = [0], 0.0
    for share in shares[:-1]:
        wanted += share
        bounds.append(max(bounds[-1] + unit, round(wanted * width / unit) * unit))
    return (*bounds, width) if bounds[-1] < width else None


@dataclass(frozen=True)
class LayerShards:
    """How the linear layers of one layer are split; those that aren't named stay whole.

    Args:
        columns: by path, the bounds between ranks.
        rows: by path and rank, the ranges of rows that a rank holds; ranges of several ranks may overlap.
        narrowings: by path of one that is split by columns, how the code in front of it works on a rank's part only.
        outputs: in the exact form, by path of what `columns` has: each rank holds these rows and all columns; `columns`
            are then the parts of its inputs that each rank makes.
        feeds: by path of what `rows` has, which of `columns` its outputs go to.
        kept: those of `rows` whose outputs stay in a cache.
    """

    columns: dict[str, Bounds] = field(default_factory=dict)
    rows: dict[str, Rows] = field(default_factory=dict)
    narrowings: dict[str, Narrowing] = field(default_factory=dict)
    outputs: dict[str, Bounds] = field(default_factory=dict)
    feeds: dict[str, tuple[str, ...]] = field(default_factory=dict)
    kept: tuple[str, ...] = ()

    @property
    def narrow_rows(self) -> set[str]:
        """Linear layers that return nothing but their own rows."""
        return {path for narrowing in self.narrowings.values() for path in narrowing.linears}

    def only(self, chosen: Container[str]) -> LayerShards:
        """Return a split of nothing but some of `columns`, and of what feeds only these."""
        rows = {path: held for path, held in self.rows.items() if all(to in chosen for to in self.feeds[path])}
        return LayerShards(
            {path: bounds for path, bounds in self.columns.items() if path in chosen},
            rows,
            {path: narrowing for path, narrowing in self.narrowings.items() if path in chosen},
            {path: bounds for path, bounds in self.outputs.items() if path in chosen},
            {path: self.feeds[path] for path in rows},
            tuple(path for path in self.kept if path in rows),
        )

    def cache_share(self, rank: int) -> float:
        """Return which part of the layer's cache a rank holds: all of it where zeros stand for others' outputs."""
        narrow = self.narrow_rows
        if not self.kept or not all(path in narrow for path in self.kept):
            return 1.0
        return max(
            sum(stop - start for start, stop in self.rows[path][rank])
            / (max(stop for held in self.rows[path] for _, stop in held))
            for path in self.kept
        )

    def held_share(self, layer: nn.Module, rank: int) -> float:
        """Return the share of the bytes of all linear layers that a rank holds."""
        held = total = 0.0
        for path, linear in linear_layers(layer).items():
            size, part = num_bytes(linear), 1.0
            if path in self.columns:
                bounds = self.columns[path]
                part = (bounds[rank + 1] - bounds[rank]) / bounds[-1]
            elif path in self.rows:
                part = sum(stop - start for start, stop in self.rows[path][rank]) / num_outputs(linear)
            held, total = held + part * size, total + size
        return held / total if total else 1.0


def split_layer(probe: ProbedModel, call: Call, shares: Sequence[float], is_exact: bool = False) -> LayerShards:
    """Split the linear layers of a layer.

    Args:
        probe: the model.
        call: of the layer, from `ProbedModel.calls`.
        shares: of the work, by rank; their sum is 1.
        is_exact: whether nothing may be added up over the ranks.
    """
    return _LayerSplitter(probe, call, shares, is_exact).split()


class _LayerSplitter:
    def __init__(self, probe: ProbedModel, call: Call, shares: Sequence[float], is_exact: bool) -> None:
        self._probe, self._call, self._shares, self._is_exact = probe, call, shares, is_exact
        self._linears = linear_layers(probe.layers[call.layer])
        self._widths = {path: num_outputs(linear) for path, linear in self._linears.items()}
        blind = probe.baseline(call)
        self._blind = {path for path, columns in blind.columns.items() if columns.any()}
        self._called = blind.called
        self._seen: dict[tuple[str, Range], Reach] = {}

    def split(self) -> LayerShards:
        whole = {path: self._whole(path) for path in sorted(self._called)}
        total = sum(_work(self._linears[path]) for path in whole) or 1
        summed = {
            path for path, reach in whole.items()
            if reach.leaves and path not in self._blind and _work(self._linears[path]) >= _MIN_SHARE * total
        }  # fmt: skip
        summed = {path for path in summed if not self._selects(path, whole)}
        columns: dict[str, Bounds] = {}
        while True:  # what a linear layer feeds may turn out to be whole
            feeds = {path: self._only_feeds(path, reach, summed) for path, reach in whole.items() if path not in summed}
            for path in sorted(summed):
                bounds = self._bounds(path, [source for source, targets in feeds.items() if path in targets])
                if bounds is not None:
                    columns[path] = bounds
            if summed == set(columns):
                break
            summed, columns = set(columns), {}
        rows = {}
        for source, targets in feeds.items():
            if targets:
                held = self._rows(source, {path: columns[path] for path in targets})
                if any(ranges != ((0, self._widths[source]),) for ranges in held):
                    rows[source] = held
        outputs = {path: cut(self._widths[path], self._shares) for path in columns if self._is_exact}
        exact = {path: bounds for path, bounds in outputs.items() if bounds is not None}
        fed = {path: tuple(sorted(feeds[path])) for path in rows}
        kept = tuple(path for path, reach in whole.items() if reach.is_kept)
        # A cache of which a part comes from elsewhere is held by each rank.
        kept = kept if all(path in rows for path in kept) else ()
        return LayerShards(columns, rows, self._narrowings(columns, rows, feeds), exact, fed, kept)

    def _selects(self, path: str, whole: dict[str, Reach]) -> bool:
        """Return whether code in front of a linear layer picks some positions or experts out of many.

        Which ones it picks among a few doesn't show on what it does among thousands.
        """
        sources = [source for source, reach in whole.items() if reach.columns[path].any()]
        inner = dict(self._probe.layers[self._call.layer].named_modules())[innermost([path, *sources])]
        return bool(sources) and any(_selecting(plain_kind(module)) for _, module in inner.named_modules())

    def _narrowings(
        self, columns: dict[str, Bounds], rows: dict[str, Rows], feeds: dict[str, set[str]]
    ) -> dict[str, Narrowing]:
        found = {}
        for path, bounds in columns.items():
            own = {source: rows[source] for source in rows if path in feeds[source]}
            is_read_elsewhere = self._call.shares_cache and any(self._whole(source).is_kept for source in own)
            if own and not is_read_elsewhere and all(feeds[source] == {path} for source in own):
                narrowing = find_narrowing(self._probe, self._call, path, bounds, own)
                if narrowing is not None:
                    found[path] = narrowing
        return found

    def _only_feeds(self, path: str, reach: Reach, summed: set[str]) -> set[str]:
        """Return the linear layers that one feeds, if all of them are summed over the ranks, and nothing else is fed."""
        targets = {name for name, columns in reach.columns.items() if columns.any() and name != path}
        return targets if not reach.leaves and targets <= summed and path not in self._blind else set()

    def _whole(self, path: str) -> Reach:
        return self._reach(path, (0, self._widths[path]))

    def _reach(self, path: str, rows: Range) -> Reach:
        if (path, rows) not in self._seen:
            self._seen[path, rows] = self._probe.reach(self._call, path, rows)
        return self._seen[path, rows]

    def _bounds(self, path: str, sources: Sequence[str]) -> Bounds | None:
        """Return the bounds near those that the shares ask for at which the fewest rows would be held twice.

        None if there are fewer groups of columns than ranks.
        """
        linear = self._linears[path]
        width, unit = num_inputs(linear), column_unit(linear)
        step = max(unit, 8 if width >= 64 else 1)  # kernels work on that many at once
        if self._is_exact and cut(self._widths[path], self._shares) is None:
            return None
        bounds, wanted = [0], 0.0
        for share in self._shares[:-1]:
            wanted += share
            ideal = min(width - 1, max(1, round(wanted * width)))
            candidates = {ideal // step * step, -(-ideal // step) * step}
            for source in sources:
                candidates |= {end for end in self._part_around(source, path, ideal) if end % unit == 0}
            usable = sorted(end for end in candidates if bounds[-1] < end < width)
            if not usable:
                return None
            bounds.append(min(usable, key=lambda end: (self._cost(path, sources, end, wanted), abs(end - ideal))))
        return (*bounds, width)

    def _part_around(self, source: str, path: str, column: int) -> Range:
        """Return the hull of the columns that are reached together with `column`, by a single row of `source`.

        Nothing if it is reached alone.
        """
        start, stop = 0, self._widths[source]
        while stop - start > 1:
            middle = (start + stop) // 2
            if self._reach(source, (start, middle)).columns[path][column]:
                stop = middle
            else:
                start = middle
        together = np.flatnonzero(self._reach(source, (start, stop)).columns[path])
        return (int(together[0]), int(together[-1]) + 1) if len(together) > 1 else (0, 0)

    def _cost(self, path: str, sources: Sequence[str], cut: int, wanted: float) -> float:
        """Return the work of the busier side of a cut in units of a fair share, counting what both sides need twice."""
        linear = self._linears[path]
        width = num_inputs(linear)
        sides = [num_bytes(linear) * cut / width, num_bytes(linear) * (1 - cut / width)]
        for source in sources:
            held = self._rows(source, {path: (0, cut, width)})
            size = num_bytes(self._linears[source]) / self._widths[source]
            sides = [side + size * sum(b - a for a, b in ranges) for side, ranges in zip(sides, held, strict=True)]
        return max(sides[0] / max(wanted, _LEAST), sides[1] / max(1 - wanted, _LEAST))

    def _rows(self, source: str, bounds: dict[str, Bounds]) -> Rows:
        """Return the rows of a linear layer that each rank needs for its columns."""
        num_ranks = len(next(iter(bounds.values()))) - 1
        held: list[list[Range]] = [[] for _ in range(num_ranks)]
        runs = 0

        def ranks_of(rows: Range) -> set[int]:
            columns = self._reach(source, rows).columns
            return {
                rank for path, ends in bounds.items() for rank, (a, b) in enumerate(pairwise(ends))
                if columns[path][a:b].any()
            }  # fmt: skip

        def assign(rows: Range) -> None:
            nonlocal runs
            runs += 1
            start, stop = rows
            ranks, middle = ranks_of(rows), (start + stop) // 2
            halves = ((start, middle), (middle, stop))
            is_even = stop - start == 1 or runs > _MAX_RUNS or all(self._same(source, half, rows) for half in halves)
            if len(ranks) <= 1 or is_even:
                for rank in ranks:
                    held[rank].append(rows)
            else:
                for half in halves:
                    assign(half)

        assign((0, self._widths[source]))
        if not all(held):  # an empty matrix would be a case of its own for every kernel
            return (((0, self._widths[source]),),) * num_ranks
        return tuple(_merged(ranges) for ranges in held)

    def _same(self, source: str, part: Range, rows: Range) -> bool:
        some, every = self._reach(source, part).columns, self._reach(source, rows).columns
        return all(np.array_equal(some[path], every[path]) for path in every)


def _work(linear: Any) -> float:
    """Return about how many bytes of a linear layer's weights are read for a token."""
    num_experts = linear.weight.shape[0] if linear.weight.ndim == 3 else 1
    return num_bytes(linear) * min(1.0, _ACTIVE_EXPERTS / num_experts)


@cache
def _selecting(kind: type) -> bool:
    """Return whether a class picks some of many, in its own code or in functions of its module that it calls."""
    bases = [one for one in kind.__mro__ if one.__module__.startswith("mlx_lm.") and one.__module__ != _EXPERTS]
    sources = [inspect.getsource(one) for one in bases]
    for method in (value for one in bases for value in vars(one).values() if inspect.isfunction(value)):
        called = (method.__globals__.get(name) for name in method.__code__.co_names)
        sources += [inspect.getsource(one) for one in called if inspect.isfunction(one)]
    return any(_SELECTING.search(source) for source in sources)


def _merged(ranges: list[Range]) -> tuple[Range, ...]:
    merged: list[Range] = []
    for start, stop in ranges:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return tuple(merged)
