"""Prefixes that are still in the caches of all ranks: which slot holds which tokens. Least recently used first out.

Matched by tokens, on rank 0, among those with the same salt: a prompt that is cached is answered sooner, so others must not
be able to try what somebody has asked. The other ranks only see slots that are forked and dropped. Knows slots and counts.
Must not know MLX or ranks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

_LEAST_TOKENS = 16  # shorter ones cost more to copy than to compute
_MOST_SLOTS = 64  # each is compared with every prompt
_BLOCK = 1024  # tokens that are compared at once, without Python


@dataclass(frozen=True)
class PrefixBudget:
    """Bytes that kept slots may take on the rank with the least room, and what one of so many tokens takes."""

    num_bytes: int
    bytes_of: Callable[[int], int]


@dataclass(frozen=True)
class _Kept:
    """What a slot holds, and for whom."""

    salt: str
    tokens: list[int]

    def begins(self, other: _Kept) -> bool:
        return self.salt == other.salt and self.tokens == other.tokens[: len(self.tokens)]


class PrefixCache:
    """Slots kept for requests to come.

    Args:
        budget: None keeps nothing.
        can_cut: whether a slot may lose tokens at its end; of one that can't, only the whole is of use.
    """

    def __init__(self, budget: PrefixBudget | None, can_cut: Callable[[int], bool]) -> None:
        self._budget, self._can_cut = budget, can_cut
        self._kept: OrderedDict[int, _Kept] = OrderedDict()  # by slot, oldest use first
        self._num_bytes = 0
        self.version = 0  # another whenever what is kept is

    def match(
        self, prompt: list[int], running: Iterable[tuple[int, list[int]]], salt: str = ""
    ) -> tuple[int, int] | None:
        """(slot, number of tokens) of the longest usable prefix of `prompt`, among what is kept and what is running with
        the same salt.

        At least one token of the prompt is left over.
        """
        best: tuple[int, int] | None = None
        if self._budget is None:
            return None
        kept = ((slot, one.tokens) for slot, one in self._kept.items() if one.salt == salt)
        for slot, tokens in [*kept, *running]:
            needed = best[1] + 1 if best else _LEAST_TOKENS
            if len(prompt) <= needed or tokens[:needed] != prompt[:needed]:
                continue
            common = min(_common(tokens, prompt), len(prompt) - 1)
            if common == len(tokens) or self._can_cut(slot):
                best = slot, common
        if best is not None and best[0] in self._kept:
            self._kept.move_to_end(best[0])
        return best

    def is_worth_waiting(self, prompt: list[int], other: list[int], cached: int) -> bool:
        """Whether `prompt`, of which so many tokens are cached, has much more in common with one that isn't read yet."""
        needed = cached + _LEAST_TOKENS
        return self._budget is not None and len(prompt) >= needed and prompt[:needed] == other[:needed]

    def take(self, slot: int, num_tokens: int) -> bool:
        """Hand a kept slot over to a sequence that begins with all of its tokens, instead of a copy."""
        if slot not in self._kept or len(self._kept[slot].tokens) != num_tokens:
            return False
        self._forget(slot)
        return True

    def keep(self, slot: int, tokens: list[int], salt: str = "") -> list[int]:
        """Keep `slot`, which holds `tokens`; returns the slots that must go for it, perhaps itself."""
        new = _Kept(salt, tokens)
        if self._budget is None or not tokens or new in self._kept.values():
            return [slot]
        gone = []
        if self._can_cut(slot):  # then it serves for all that it begins with
            gone = [other for other, kept in self._kept.items() if kept.begins(new)]
        for other in gone:
            self._forget(other)
        self._kept[slot] = new
        self.version += 1
        self._num_bytes += self._budget.bytes_of(len(tokens))
        while self._num_bytes > self._budget.num_bytes or len(self._kept) > _MOST_SLOTS:
            oldest = next(iter(self._kept))
            self._forget(oldest)
            gone.append(oldest)
        return gone

    def clear(self) -> list[int]:
        """Forget everything; returns the slots."""
        slots = list(self._kept)
        for slot in slots:
            self._forget(slot)
        return slots

    def _forget(self, slot: int) -> None:
        assert self._budget is not None
        self.version += 1
        self._num_bytes -= self._budget.bytes_of(len(self._kept.pop(slot).tokens))


def _common(first: list[int], second: list[int]) -> int:
    length, start = min(len(first), len(second)), 0
    while start < length and first[start : start + _BLOCK] == second[start : start + _BLOCK]:
        start += _BLOCK
    end = min(start + _BLOCK, length)
    return next((i for i in range(start, end) if first[i] != second[i]), end)
