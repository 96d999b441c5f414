"""The slots of one stage: rows of prompt caches, addressed by position and grouped as the steps want them.

Every cache is mlx-lm's own: an ordinary one for a row that runs alone, a batched one for rows that run together.
A stage keeps the full list of layers' caches, for its phantoms too (their rows have width 0).
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
    """mlx_lm.generate's options of the same names."""

    max_kv_size: int | None = None
    kv_bits: int | None = None
    kv_group_size: int = 64
    quantized_kv_start: int = 5000

    @classmethod
    def from_options(cls, options: CacheOptions) -> KVSettings:
        return cls(options.max_kv_size, options.kv_bits, options.kv_group_size, options.quantized_kv_start)


@dataclass
class _CacheGroup:
    """Slots whose rows lie in one cache, in the order of its rows, with the number of tokens of each."""

    slots: list[int]
    lengths: list[int]
    cache: list[Any]


class SlotCaches:
    """Caches by slot, each with the number of tokens that it holds."""

    def __init__(self, model: nn.Module, settings: KVSettings) -> None:
        self._model, self._settings = model, settings
        self._blocks: dict[int, _CacheGroup] = {}
        self._moved: list[list[Any]] = []  # caches of rows that were moved, and haven't been evaluated since

    def __contains__(self, slot: int) -> bool:
        return slot in self._blocks

    def at(self, slots: Sequence[int], positions: Sequence[int], counts: Sequence[int]) -> list[Any]:
        """The cache whose rows are `slots`, holding `positions` tokens, ready for `counts` more; a fresh one for position 0.

        Rows with fewer tokens than the longest must be padded on the right.

        Raises:
            DesyncError: a slot holds fewer tokens, or more and can't be trimmed.
        """
        block = self._alone(slots[0], positions[0]) if len(slots) == 1 else self._together(slots, positions)
        for slot, length, position in zip(block.slots, block.lengths, positions, strict=True):
            if length != position:
                raise DesyncError(f"slot {slot} holds {length} tokens, but the step begins at {position}")
        if len(set(counts)) > 1:
            padding = [max(counts) - count for count in counts]
            for layer in block.cache:
                layer.prepare(lengths=list(counts), right_padding=padding)
        return block.cache

    def advance(self, slots: Sequence[int], lengths: list[int]) -> list[mx.array]:
        """Note that a step has filled `slots` up to `lengths`; returns arrays of caches, to be evaluated."""
        block, settings = self._blocks[slots[0]], self._settings
        if len({new - old for new, old in zip(lengths, block.lengths, strict=True)}) > 1:  # some were padded
            for layer in block.cache:
                if not layer.empty():
                    layer.finalize()
        try:
            maybe_quantize_kv_cache(block.cache, settings.quantized_kv_start, settings.kv_group_size, settings.kv_bits)
        except (NotImplementedError, ValueError) as error:
            raise UserError(f"--kv-bits doesn't work with this model's caches: {error}") from None
        block.lengths = lengths
        return self.moved() + _arrays(block.cache)

    def moved(self) -> list[mx.array]:
        """Arrays of rows that were moved, to be evaluated: until then they hold on to all rows that they were moved from."""
        moved, self._moved = self._moved, []
        held = {id(block.cache) for block in self._blocks.values()}
        return [array for cache in moved if id(cache) in held for array in _arrays(cache)]

    @property
    def num_bytes(self) -> int:
        """Of all slots."""
        blocks = {id(block): block for block in self._blocks.values()}
        return sum(cache_bytes(entry) for block in blocks.values() for entry in block.cache)

    def fork(self, source: int, slot: int) -> None:
        """Let `slot` begin as a copy of `source`."""
        length, block = self._length(source), self._blocks[source]
        is_alone = len(block.slots) == 1
        row = block.slots.index(source)
        self._add(slot, copy.deepcopy(block.cache) if is_alone else self._extract(block, row), length)

    def detach(self, slots: Sequence[int]) -> None:
        """Give each slot a cache of its own, no longer than it needs; their former company moves together."""
        alone = []
        for slot in slots:
            length, block = self._length(slot), self._blocks[slot]
            if len(block.slots) > 1:
                alone.append((slot, self._extract(block, block.slots.index(slot)), length))
        self.drop([slot for slot, _, _ in alone])
        for slot, cache, length in alone:
            self._add(slot, cache, length)

    def drop(self, slots: Sequence[int]) -> None:
        """Free slots; those that were in company with them move together, and once, as every move is a copy."""
        blocks = {id(self._blocks[slot]): self._blocks.pop(slot) for slot in slots if slot in self._blocks}
        for block in blocks.values():
            rest = [row for row, slot in enumerate(block.slots) if slot in self._blocks]
            if rest:
                self._keep_rows(block, rest)

    def can_trim(self, slot: int) -> bool:
        """Whether a slot may lose any number of tokens at its end."""
        if slot not in self._blocks:
            return False
        cache = self._blocks[slot].cache
        return can_trim_prompt_cache(cache) and not _begins_at(cache)

    def num_revocable(self, slot: int) -> int:
        """How many tokens a slot could take on and lose again; of a slot in company none, as others would be cut, too."""
        if not self.can_trim(slot) or len(self._blocks[slot].slots) > 1:
            return 0
        room = sys.maxsize
        for cache in all_caches(self._blocks[slot].cache):
            if window := getattr(cache, "max_size", None) or getattr(cache, "chunk_size", None):
                room = min(room, window - cache.offset - 1)  # once a window is full, its oldest tokens are lost
        return max(0, room)

    def _length(self, slot: int) -> int:
        block = self._blocks.get(slot)
        if block is None:
            raise DesyncError(f"slot {slot} holds nothing")
        return block.lengths[block.slots.index(slot)]

    def _add(self, slot: int, cache: list[Any], length: int) -> _CacheGroup:
        self._blocks[slot] = _CacheGroup([slot], [length], cache)
        return self._blocks[slot]

    def _alone(self, slot: int, position: int) -> _CacheGroup:
        if position == 0:
            self.drop([slot])
            return self._add(slot, make_prompt_cache(self._model, self._settings.max_kv_size), 0)
        length = self._length(slot)
        self.detach([slot])
        block = self._blocks[slot]
        if length > position:
            if not can_trim_prompt_cache(block.cache) or _begins_at(block.cache) > position:
                raise DesyncError(f"slot {slot} holds {length} tokens and can't be trimmed to {position}")
            trim_prompt_cache(block.cache, length - position)
            block.lengths = [position]
        return block

    def _together(self, wanted: Sequence[int], positions: Sequence[int]) -> _CacheGroup:
        """The block whose rows are exactly the slots `wanted`, made from those that hold them now."""
        slots = list(wanted)
        for slot, position in zip(slots, positions, strict=True):
            if position == 0 or self._length(slot) > position:
                self._alone(slot, position)
        groups: list[_CacheGroup] = []
        for slot in slots:
            if not any(self._blocks[slot] is group for group in groups):
                groups.append(self._blocks[slot])
        if len(groups) == 1 and groups[0].slots == slots:
            return groups[0]
        for block in groups:
            self._split_off(block, [row for row, slot in enumerate(block.slots) if slot not in slots])
        groups = list({id(self._blocks[slot]): self._blocks[slot] for slot in slots}.values())
        order = [slot for group in groups for slot in group.slots]
        lengths = [length for group in groups for length in group.lengths]
        cache = _joined([group.cache for group in groups], [len(group.slots) for group in groups])
        if order != slots:
            rows = [order.index(slot) for slot in slots]
            for layer in cache:
                layer.filter(mx.array(rows))
            lengths = [lengths[row] for row in rows]
        block = _CacheGroup(slots, lengths, cache)
        self._blocks.update(dict.fromkeys(slots, block))
        return block

    def _split_off(self, block: _CacheGroup, rows: list[int]) -> None:
        """Move some rows of a block into one of their own; they stay here, for steps to come."""
        rest = [row for row in range(len(block.slots)) if row not in rows]
        if len(rows) == 1:
            slot = block.slots[rows[0]]
            self._alone(slot, self._length(slot))
        elif rows:
            other = _CacheGroup(list(block.slots), list(block.lengths), copy.deepcopy(block.cache))
            self._keep_rows(other, rows)
            self._blocks.update(dict.fromkeys(other.slots, other))
            self._keep_rows(block, rest)

    def _extract(self, block: _CacheGroup, row: int) -> list[Any]:
        """A row of a batched block as ordinary caches; a layer that never uses its cache has a new one."""
        fresh = make_prompt_cache(self._model, self._settings.max_kv_size)
        found = [new if c.empty() else c.extract(row) for c, new in zip(block.cache, fresh, strict=True)]
        self._moved.append(found)
        return found

    def _keep_rows(self, block: _CacheGroup, rows: list[int]) -> None:
        """Shrink a batched block; a row that is left alone gets an ordinary cache again."""
        if len(rows) == 1:
            self._add(block.slots[rows[0]], self._extract(block, rows[0]), block.lengths[rows[0]])
            return
        for layer in block.cache:
            layer.filter(mx.array(rows))
        self._moved.append(block.cache)
        block.slots, block.lengths = [block.slots[r] for r in rows], [block.lengths[r] for r in rows]


def _arrays(cache: list[Any]) -> list[mx.array]:
    states = [entry.state for entry in cache if not entry.empty()]
    return [value for _, value in tree_flatten(states) if isinstance(value, mx.array)]


def _begins_at(cache: list[Any]) -> int:
    """The first position that a cache still holds: llama4's drop what lies before the current chunk."""
    return max((getattr(c, "start_position", 0) for c in all_caches(cache)), default=0)


def _joined(caches: list[list[Any]], num_rows: list[int]) -> list[Any]:
    """One batched cache per layer from caches of one row (ordinary ones) or of several (batched ones)."""
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
    """Caches of single rows as one batched cache per layer.

    Raises:
        AttributeError: mlx-lm can't batch one of them.
    """
    return [rows[0].merge(list(rows)) for rows in zip(*caches, strict=True)]


def cache_bytes(entry: Any) -> int:
    """Bytes that one of mlx-lm's caches holds."""
    try:
        return 0 if entry is None or entry.empty() else int(entry.nbytes)
    except (AttributeError, TypeError, NotImplementedError):
        return 0
