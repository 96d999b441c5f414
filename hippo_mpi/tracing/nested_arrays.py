"""Finds and replaces the arrays inside what a layer takes and returns.

Most layers take and return one array. Some return tuples, fill a shared dict, or pass an object of their own from layer
to layer (`ResidualBlocks` of kimi_k3). This module knows such nested objects, but not what they mean. A path says where
an array is: ("return", 0), ("kwargs", "shared", "topk_idx"), ("args", 3, "raw").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn

Path = tuple[str | int, ...]


class Opaque:
    """Objects that are never searched for arrays: a model's caches, by identity, and all modules."""

    def __init__(self, caches: list[Any]) -> None:
        self._ids = {id(c) for c in caches}

    def __contains__(self, thing: Any) -> bool:
        return isinstance(thing, nn.Module) or id(thing) in self._ids


def is_container(thing: Any) -> bool:
    """Return whether an object may contain arrays: a list, tuple, dict, or an object with attributes of its own."""
    return isinstance(thing, list | tuple | dict) or (
        hasattr(thing, "__dict__") and not isinstance(thing, type) and not callable(thing)
    )


def is_mutable_container(thing: Any) -> bool:
    """Return whether a container's arrays can be replaced in place."""
    return is_container(thing) and not isinstance(thing, tuple)


def children(thing: Any) -> Iterator[tuple[str | int, Any]]:
    """Yield (key, value) of everything directly inside a container."""
    if isinstance(thing, dict):
        yield from thing.items()
    elif isinstance(thing, list | tuple):
        yield from enumerate(thing)
    else:
        yield from vars(thing).items()


def find(thing: Any, opaque: Opaque, path: Path = ()) -> Iterator[tuple[Path, mx.array]]:
    """Yield (path, array) of every array inside `thing`, in a fixed order."""
    if isinstance(thing, mx.array):
        yield path, thing
    elif thing not in opaque and is_container(thing):
        for key, value in children(thing):
            yield from find(value, opaque, (*path, key))


def assign(container: Any, key: str | int, value: Any) -> None:
    """Set `container[key]`, or the attribute of an object; lists grow as needed."""
    if isinstance(container, dict):
        container[key] = value
    elif isinstance(container, list):
        assert isinstance(key, int)
        container.extend([None] * (key + 1 - len(container)))
        container[key] = value
    else:
        setattr(container, str(key), value)


def replace(thing: Any, opaque: Opaque, new: Callable[[Path, mx.array], Any], path: Path = ()) -> Any:
    """Replace every array inside `thing` by `new(path, array)`; return `thing`, or what takes its place.

    Mutable containers are changed in place; an array or a tuple is returned as a new object.
    """
    if isinstance(thing, mx.array):
        return new(path, thing)
    if thing in opaque or not is_container(thing):
        return thing
    if isinstance(thing, tuple):
        values = [replace(value, opaque, new, (*path, i)) for i, value in enumerate(thing)]
        return type(thing)(*values) if hasattr(thing, "_fields") else tuple(values)
    for key, value in list(children(thing)):
        changed = replace(value, opaque, new, (*path, key))
        if changed is not value:
            assign(thing, key, changed)
    return thing
