"""The slots of one stage: rows of prompt caches, addressed by position and grouped as the steps need them.

Every cache is mlx-lm's own: an ordinary one for a row that runs alone, a batched one for rows that run together.
A stage keeps the full list of layers' caches, including those of its phantoms (whose rows have width 0).
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.generate import maybe_quantize_kv_cache
from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache

from hippo_mpi.config.options import CacheOptions
from hippo_mpi.errors import DesyncError, UserError
from hippo_mpi.tracing.observer import all_caches


@dataclass(frozen=True)
class KVSettings:
    """Settings of KV caches, as mlx_lm.generate's options of the same names (sizes in tokens)."""

    max_kv_size: int | None = None
    kv_bits: int | None = None
    kv_group_size: int = 64
    quantized_kv_start: int = 5000

    @classmethod
    def from_options(cls, options: CacheOptions) -> KVSettings:
        """Return the settings that the command line gives."""
        return cls(options.max_kv_size, options.kv_bits, options.kv_group_size, options.quantized_kv_start)


@dataclass
class _CacheGroup:
    """Slots that share one cache, in the order of its rows, with the number of tokens of each."""

    slots: list[int]
    lengths: list[int]
    cache: list[Any]


class SlotCaches:
    """Caches by slot, each with the number of tokens that it holds."""

    def __init__(self, model: nn.Module, settings: KVSettings) -> None:
        self._model, self._settings = model, settings
        self._groups: dict[int, _CacheGroup] = {}
        self._moved: list[list[Any]] = []  # caches of rows that were moved and not evaluated since

    def __contains__(self, slot: int) -> bool:
        return slot in self._groups

    def at(self, slots: Sequence[int], positions: Sequence[int], counts: Sequence[int]) -> list[Any]:
        """Return the layers' caches whose rows are `slots`, ready for the tokens of a step.

        Rows with fewer tokens than the longest must be padded on the right.

        Args:
            slots: regrouped into one batched cache if there are several.
            positions: tokens that each slot is to hold before the step; a longer one is trimmed, 0 makes a new cache.
            counts: tokens that the step adds to each row.

        Raises:
            DesyncError: a slot holds fewer tokens, or more and can't be trimmed.
        """
        group = self._alone(slots[0], positions[0]) if len(slots) == 1 else self._together(slots, positions)
        for slot, length, position in zip(group.slots, group.lengths, positions, strict=True):
            if length != position:
                raise DesyncError(f"slot {slot} holds {length} tokens, but the step begins at {position}")
        if len(set(counts)) > 1:
            padding = [max(counts) - count for count in counts]
            for layer in group.cache:
                layer.prepare(lengths=list(counts), right_padding=padding)
        return group.cache

    def advance(self, slots: Sequence[int], lengths: list[int]) -> list[mx.array]:
        """Note that a step has filled `slots` up to `lengths` tokens; return the caches' arrays, to be evaluated.

        Raises:
            UserError: the model's caches can't be quantized.
        """
        group, settings = self._groups[slots[0]], self._settings
        if len({new - old for new, old in zip(lengths, group.lengths, strict=True)}) > 1:  # some were padded
            for layer in group.cache:
                if not layer.empty():
                    layer.finalize()
        try:
            maybe_quantize_kv_cache(group.cache, settings.quantized_kv_start, settings.kv_group_size, settings.kv_bits)
        except (NotImplementedError, ValueError) as error:
            raise UserError(f"--kv-bits doesn't work with this model's caches: {error}") from None
        group.lengths = lengths
        return self.moved() + _arrays(group.cache)

    def moved(self) -> list[mx.array]:
        """Return the arrays of moved rows, to be evaluated: until then they keep all rows of their old cache alive."""
        moved, self._moved = self._moved, []
        held = {id(group.cache) for group in self._groups.values()}
        return [array for cache in moved if id(cache) in held for array in _arrays(cache)]

    @property
    def num_bytes(self) -> int:
        """Bytes of all slots' caches."""
        groups = {id(group): group for group in self._groups.values()}
        return sum(cache_bytes(entry) for group in groups.values() for entry in group.cache)

    def fork(self, source: int, slot: int) -> None:
        """Fill `slot` with a copy of `source`.

        Raises:
            DesyncError: `source` holds nothing.
        """
        length, group = self._length(source), self._groups[source]
        is_alone = len(group.slots) == 1
        row = group.slots.index(source)
        self._add(slot, copy.deepcopy(group.cache) if is_alone else self._extract(group, row), length)

    def detach(self, slots: Sequence[int]) -> None:
        """Move each slot out of its batched cache into one of its own; compact the remaining rows once.

        Raises:
            DesyncError: a slot holds nothing.
        """
        alone = []
        for slot in slots:
            length, group = self._length(slot), self._groups[slot]
            if len(group.slots) > 1:
                alone.append((slot, self._extract(group, group.slots.index(slot)), length))
        self.drop([slot for slot, _, _ in alone])
        for slot, cache, length in alone:
            self._add(slot, cache, length)

    def drop(self, slots: Sequence[int]) -> None:
        """Free slots; compact the remaining rows of a batched cache once for all of them, as each move is a copy."""
        groups = {id(self._groups[slot]): self._groups.pop(slot) for slot in slots if slot in self._groups}
        for group in groups.values():
            rest = [row for row, slot in enumerate(group.slots) if slot in self._groups]
            if rest:
                self._keep_rows(group, rest)

    def can_trim(self, slot: int) -> bool:
        """Return whether any number of tokens can be removed at the end of a slot."""
        if slot not in self._groups:
            return False
        cache = self._groups[slot].cache
        return can_trim_prompt_cache(cache) and not _begins_at(cache)

    def num_revocable(self, slot: int) -> int:
        """Return how many tokens could be added to a slot and removed again.

        None of a slot in a batched cache, as trimming would shorten the other rows too.
        """
        if not self.can_trim(slot) or len(self._groups[slot].slots) > 1:
            return 0
        room = sys.maxsize
        for cache in all_caches(self._groups[slot].cache):
            if window := getattr(cache, "max_size", None) or getattr(cache, "chunk_size", None):
                room = min(room, window - cache.offset - 1)  # once a window is full, its oldest tokens are overwritten
        return max(0, room)

    def _length(self, slot: int) -> int:
        group = self._groups.get(slot)
        if group is None:
            raise DesyncError(f"slot {slot} holds nothing")
        return group.lengths[group.slots.index(slot)]

    def _add(self, slot: int, cache: list[Any], length: int) -> _CacheGroup:
        self._groups[slot] = _CacheGroup([slot], [length], cache)
        return self._groups[slot]

    def _alone(self, slot: int, position: int) -> _CacheGroup:
        if position == 0:
            self.drop([slot])
            return self._add(slot, make_prompt_cache(self._model, self._settings.max_kv_size), 0)
        length = self._length(slot)
        self.detach([slot])
        group = self._groups[slot]
        if length > position:
            if not can_trim_prompt_cache(group.cache) or _begins_at(group.cache) > position:
                raise DesyncError(f"slot {slot} holds {length} tokens and can't be trimmed to {position}")
            trim_prompt_cache(group.cache, length - position)
            group.lengths = [position]
        return group

    def _together(self, wanted: Sequence[int], positions: Sequence[int]) -> _CacheGroup:
        """Return a group whose rows are exactly the slots `wanted`, made from the groups that hold them now."""
        slots = list(wanted)
        for slot, position in zip(slots, positions, strict=True):
            if position == 0 or self._length(slot) > position:
                self._alone(slot, position)
        groups: list[_CacheGroup] = []
        for slot in slots:
            if not any(self._groups[slot] is group for group in groups):
                groups.append(self._groups[slot])
        if len(groups) == 1 and groups[0].slots == slots:
            return groups[0]
        for group in groups:
            self._split_off(group, [row for row, slot in enumerate(group.slots) if slot not in slots])
        groups = list({id(self._groups[slot]): self._groups[slot] for slot in slots}.values())
        order = [slot for group in groups for slot in group.slots]
        lengths = [length for group in groups for length in group.lengths]
        cache = _joined([group.cache for group in groups], [len(group.slots) for group in groups])
        if order != slots:
            rows = [order.index(slot) for slot in slots]
            for layer in cache:
                layer.filter(mx.array(rows))
            lengths = [lengths[row] for row in rows]
        group = _CacheGroup(slots, lengths, cache)
        self._groups.update(dict.fromkeys(slots, group))
        return group

    def _split_off(self, group: _CacheGroup, rows: list[int]) -> None:
        """Move some rows of a group, which the coming step doesn't use, into a group of their own."""
        rest = [row for row in range(len(group.slots)) if row not in rows]
        if len(rows) == 1:
            slot = group.slots[rows[0]]
            self._alone(slot, self._length(slot))
        elif rows:
            other = _CacheGroup(list(group.slots), list(group.lengths), copy.deepcopy(group.cache))
            self._keep_rows(other, rows)
            self._groups.update(dict.fromkeys(other.slots, other))
            self._keep_rows(group, rest)

    def _extract(self, group: _CacheGroup, row: int) -> list[Any]:
        """Return a row of a batched group as ordinary caches; layers that never use their cache get a new one."""
        fresh = make_prompt_cache(self._model, self._settings.max_kv_size)
        extracted = [new if c.empty() else c.extract(row) for c, new in zip(group.cache, fresh, strict=True)]
        self._moved.append(extracted)
        return extracted

    def _keep_rows(self, group: _CacheGroup, rows: list[int]) -> None:
        """Shrink a batched group to these rows; a single remaining row gets an ordinary cache again."""
        if len(rows) == 1:
            self._add(group.slots[rows[0]], self._extract(group, rows[0]), group.lengths[rows[0]])
            return
        for layer in group.cache:
            layer.filter(mx.array(rows))
        self._moved.append(group.cache)
        group.slots, group.lengths = [group.slots[r] for r in rows], [group.lengths[r] for r in rows]


def _arrays(cache: list[Any]) -> list[mx.array]:
    states = [entry.state for entry in cache if not entry.empty()]
    return [value for _, value in tree_flatten(states) if isinstance(value, mx.array)]


def _begins_at(cache: list[Any]) -> int:
    """Return the first position that a cache still holds: llama4's caches drop what precedes the current chunk."""
    return max((getattr(c, "start_position", 0) for c in all_caches(cache)), default=0)


def _joined(caches: list[list[Any]], num_rows: list[int]) -> list[Any]:
    """Return one batched cache per layer, joined from caches of one row (ordinary) or several rows (batched)."""
    joined = None
    start = 0
    while start < len(caches):
        stop = start + 1
        if num_rows[start] > 1:
            part = caches[start]
        else:
            while stop < len(caches) and num_rows[stop] == 1:
                stop += 1
            part = merged(caches[start:stop])
        if joined is None:
            joined = part
        else:
            for layer, other in zip(joined, part, strict=True):
                layer.extend(other)
        start = stop
    assert joined is not None
    return joined


def merged(caches: Sequence[list[Any]]) -> list[Any]:
    """Merge caches of single rows into one batched cache per layer.

    Raises:
        AttributeError: mlx-lm can't batch one of them.
    """
    return [rows[0].merge(list(rows)) for rows in zip(*caches, strict=True)]


def cache_bytes(entry: Any) -> int:
    """Return the bytes that one of mlx-lm's caches holds; 0 if it is empty or can't tell."""
    try:
        return 0 if entry is None or entry.empty() else int(entry.nbytes)
    except (AttributeError, TypeError, NotImplementedError):
        return 0
