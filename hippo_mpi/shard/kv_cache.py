"""The slots of one stage: a prompt cache per sequence, addressed by position.

Every cache is mlx-lm's own. A stage keeps the full list, for its phantoms too (their rows have width 0).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.generate import maybe_quantize_kv_cache
from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache

from hippo_mpi.errors import DesyncError, UserError


@dataclass(frozen=True)
class KVSettings:
    """mlx_lm.generate's options of the same names."""

    max_kv_size: int | None = None
    kv_bits: int | None = None
    kv_group_size: int = 64
    quantized_kv_start: int = 5000


class SlotCaches:
    """Caches by slot, each with the number of tokens that it holds."""

    def __init__(self, model: nn.Module, settings: KVSettings) -> None:
        self._model, self._settings = model, settings
        self._slots: dict[int, tuple[list[Any], int]] = {}

    def at(self, slot: int, position: int) -> list[Any]:
        """The cache of `slot`, trimmed to hold `position` tokens; a fresh one for position 0.

        Raises:
            DesyncError: it holds fewer tokens, or more and can't be trimmed.
        """
        if position == 0:
            self._slots[slot] = (make_prompt_cache(self._model, self._settings.max_kv_size), 0)
        cache, length = self._slots.get(slot, ([], 0))
        if length < position:
            raise DesyncError(f"slot {slot} holds {length} tokens, but the step begins at {position}")
        if length > position:
            if not can_trim_prompt_cache(cache):
                raise DesyncError(f"slot {slot} holds {length} tokens and can't be trimmed to {position}")
            trim_prompt_cache(cache, length - position)
        return cache

    def advance(self, slot: int, length: int) -> list[mx.array]:
        """Note that the slot now holds `length` tokens; returns its arrays, to be evaluated."""
        cache, _ = self._slots[slot]
        settings = self._settings
        try:
            maybe_quantize_kv_cache(cache, settings.quantized_kv_start, settings.kv_group_size, settings.kv_bits)
        except (NotImplementedError, ValueError) as error:
            raise UserError(f"--kv-bits doesn't work with this model's caches: {error}") from None
        self._slots[slot] = (cache, length)
        return [value for _, value in tree_flatten([c.state for c in cache]) if isinstance(value, mx.array)]

    def release(self, slot: int) -> None:
        self._slots.pop(slot, None)

    def can_trim(self, slot: int) -> bool:
        return slot in self._slots and can_trim_prompt_cache(self._slots[slot][0])
