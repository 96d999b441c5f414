"""The numbers with which a module's own code works on a rank's part of its width: fewer heads, say, and a smaller cache.

A linear layer that holds some of its rows can return just these, if the code behind it takes them. What has to be
smaller for that (numbers of heads, an array with a value for each head) is found by trying: of the module's numbers
and arrays the smallest set with which its code makes exactly the part of the whole that the rank needs. Where there is
none, outputs of other ranks are zeros, and caches have their full size.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from hippo_mpi.sharding.dependence import Call, ProbedModel
from hippo_mpi.sharding.linear_layers import Range, linear_layers, num_outputs

_MAX_TRIES = 200
_MAX_CHANGES = 5

_Change = tuple[str, "tuple[int | Range, ...]"]

Rows = tuple[tuple[Range, ...], ...]
"""By rank, ranges of rows."""


@dataclass(frozen=True)
class Narrowing:
    """How a module's code is made to work on a part of its width.

    Args:
        module: its path in the layer.
        linears: the linear layers in front that return nothing but their own rows.
        changes: names of attributes with their value on each rank, and paths of arrays below the module with each
            rank's part of their first axis.
    """

    module: str
    linears: tuple[str, ...]
    changes: tuple[_Change, ...] = ()


def find_narrowing(
    probe: ProbedModel, call: Call, linear: str, bounds: Sequence[int], rows: dict[str, Rows]
) -> Narrowing | None:
    """Find how the code in front of a linear layer works on a rank's part; None if it doesn't.

    Args:
        probe: the model.
        call: of the layer that holds it.
        linear: path of the linear layer that is split by columns.
        bounds: of the ranks' columns.
        rows: by path of the linear layers that feed it, the rows that each rank holds.
    """
    layer = probe.layers[call.layer]
    path = innermost([linear, *rows])
    module: Any = dict(layer.named_modules())[path]
    whole = probe.taken(call, linear, {})
    linears = linear_layers(layer)
    shares = _shares(bounds, {source: num_outputs(linears[source]) for source in rows}, rows)
    changes: list[_Change] = [*_numbers(module, shares), *_arrays(module, bounds)]
    tries = 0
    for count in range(_MAX_CHANGES + 1):
        for chosen in itertools.combinations(changes, count):
            if len({name for name, _ in chosen}) < count:
                continue
            tries += 1
            if tries > _MAX_TRIES:
                return None
            if all(
                _makes_part(probe, call, linear, (a, b), {s: held[rank] for s, held in rows.items()}, module, chosen, rank, whole)
                for rank, (a, b) in enumerate(pairwise(bounds))
            ):  # fmt: skip
                return Narrowing(path, tuple(rows), chosen)
    return None


def narrow(layer: nn.Module, narrowing: Narrowing, rank: int) -> None:
    """Make a module of a layer work on a rank's part, in place and lazily."""
    module: Any = dict(layer.named_modules())[narrowing.module]
    _change(module, narrowing.changes, rank)


def _change(module: Any, changes: Sequence[_Change], rank: int) -> list[tuple[Any, str, Any]]:
    """Make numbers and arrays of a module smaller; return what was before: owner, name and value."""
    before = []
    for path, parts in changes:
        owner, name = _owner(module, path)
        value, part = getattr(owner, name), parts[rank]
        before.append((owner, name, value))
        setattr(owner, name, part if isinstance(part, int) else mx.contiguous(value[part[0] : part[1]]))
    return before


def _makes_part(
    probe: ProbedModel, call: Call, linear: str, columns: Range, cuts: dict[str, Sequence[Range]],
    module: Any, chosen: Sequence[_Change], rank: int, whole: list[mx.array],
) -> bool:  # fmt: skip
    """Return whether a module, with some of its numbers and arrays smaller, makes a rank's part of what it makes whole."""
    before = _change(module, chosen, rank)
    try:
        found = probe.taken(call, linear, cuts)
    except Exception:  # whatever the model's code raises when shapes don't fit
        return False
    finally:
        for owner, name, value in reversed(before):
            setattr(owner, name, value)
    wanted = [x[..., columns[0] : columns[1]] for x in whole]
    if [x.shape for x in found] != [x.shape for x in wanted]:
        return False
    return all(bool(mx.allclose(a, b, rtol=1e-5, atol=1e-5).item()) for a, b in zip(found, wanted, strict=True))


def innermost(paths: Sequence[str]) -> str:
    """Return the path of the innermost module that holds all linear layers."""
    common = []
    for names in zip(*(path.split(".")[:-1] for path in paths), strict=False):
        if len(set(names)) > 1:
            break
        common.append(names[0])
    return ".".join(common)


def _shares(bounds: Sequence[int], widths: dict[str, int], rows: dict[str, Rows]) -> list[tuple[Fraction, ...]]:
    """Return the different shares, by rank, of columns and rows that a rank holds."""
    shares = [tuple(Fraction(b - a, bounds[-1]) for a, b in pairwise(bounds))]
    for source, held in rows.items():
        shares.append(tuple(Fraction(sum(b - a for a, b in ranges), widths[source]) for ranges in held))
    return list(dict.fromkeys(shares))


def _numbers(module: Any, shares: Sequence[tuple[Fraction, ...]]) -> Iterator[_Change]:
    """Yield the numbers of a module with the value that each rank would have by one of the shares."""
    for name, value in vars(module).items():
        if type(value) is int and value > 0:
            for parts in shares:
                values = [value * share for share in parts]
                if all(part.denominator == 1 and part > 0 for part in values):
                    yield name, tuple(int(part) for part in values)


def _arrays(module: nn.Module, bounds: Sequence[int]) -> Iterator[_Change]:
    """Yield the arrays below a module, but for those of linear layers, with each rank's part of their first axis."""
    linears = linear_layers(module)
    for path, inner in module.named_modules():
        for name, array in inner.items() if path not in linears else ():
            if isinstance(array, mx.array) and array.ndim and not name.startswith("_"):
                ends = [Fraction(bound, bounds[-1]) * array.shape[0] for bound in bounds]
                if all(end.denominator == 1 for end in ends):
                    yield f"{path}.{name}" if path else name, tuple(pairwise(int(end) for end in ends))


def _owner(module: Any, path: str) -> tuple[Any, str]:
    owner, _, name = path.rpartition(".")
    return dict(module.named_modules())[owner], name
