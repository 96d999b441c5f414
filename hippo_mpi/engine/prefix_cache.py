"""Prefixes that are still in the caches of all ranks: which slot holds which tokens. Evicts the least recently used.

Rank 0 matches prompts by their tokens, among prefixes with the same salt: a cached prompt is answered sooner, so
without salts a client could find out by trying what somebody else has asked. The other ranks only see slots that are
forked and dropped. Knows slots and counts. Must not know MLX or ranks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

_MIN_TOKENS = 16  # a shorter prefix costs more to copy than to compute
_MAX_SLOTS = 64  # few, as each is compared with every prompt
_BLOCK = 1024  # tokens compared at a time, in C rather than in a Python loop


@dataclass(frozen=True)
class PrefixBudget:
    """Bytes that kept slots may take on the rank with the least room, and the bytes of a slot by its tokens."""

    num_bytes: int
    bytes_of: Callable[[int], int]


@dataclass(frozen=True)
class _Kept:
    """The tokens that a slot holds, and the salt of those who may use them."""

    salt: str
    tokens: list[int]

    def begins(self, other: _Kept) -> bool:
        return self.salt == other.salt and self.tokens == other.tokens[: len(self.tokens)]


class PrefixCache:
    """Slots kept for future requests.

    Args:
        budget: bytes to keep; None keeps nothing.
        can_cut: tells whether a slot can lose tokens at its end; one that can't is only useful as a whole.
    """

    def __init__(self, budget: PrefixBudget | None, can_cut: Callable[[int], bool]) -> None:
        self._budget, self._can_cut = budget, can_cut
        self._kept: OrderedDict[int, _Kept] = OrderedDict()  # by slot, oldest use first
        self._num_bytes = 0
        self.version = 0  # changes whenever the kept slots change

    def match(
        self, prompt: list[int], running: Iterable[tuple[int, list[int]]], salt: str = ""
    ) -> tuple[int, int] | None:
        """Return (slot, number of tokens) of the longest usable cached prefix of `prompt`, or None.

        At least one token of the prompt is left over.

        Args:
            prompt: its tokens.
            running: (slot, tokens) of running sequences with the same salt, whose caches can be copied too.
            salt: only kept prefixes with the same salt are considered.
        """
        best: tuple[int, int] | None = None
        if self._budget is None:
            return None
        kept = ((slot, one.tokens) for slot, one in self._kept.items() if one.salt == salt)
        for slot, tokens in [*kept, *running]:
            needed = best[1] + 1 if best else _MIN_TOKENS
            if len(prompt) <= needed or tokens[:needed] != prompt[:needed]:
                continue
            common = min(_common(tokens, prompt), len(prompt) - 1)
            if common == len(tokens) or self._can_cut(slot):
                best = slot, common
        if best is not None and best[0] in self._kept:
            self._kept.move_to_end(best[0])
        return best

    def is_worth_waiting(self, prompt: list[int], other: list[int], cached: int) -> bool:
        """Return whether `prompt`, with `cached` tokens cached, shares a much longer prefix with the unread `other`."""
        needed = cached + _MIN_TOKENS
        return self._budget is not None and len(prompt) >= needed and prompt[:needed] == other[:needed]

    def take(self, slot: int, num_tokens: int) -> bool:
        """Hand a kept slot over, instead of a copy, if all `num_tokens` of it are wanted; return whether it was."""
        if slot not in self._kept or len(self._kept[slot].tokens) != num_tokens:
            return False
        self._forget(slot)
        return True

    def keep(self, slot: int, tokens: list[int], salt: str = "") -> list[int]:
        """Keep `slot`, which holds `tokens`; return the slots to drop in exchange, perhaps `slot` itself."""
        new = _Kept(salt, tokens)
        if self._budget is None or not tokens or new in self._kept.values():
            return [slot]
        gone = []
        if self._can_cut(slot):  # then it makes kept prefixes of its own tokens redundant
            gone = [other for other, kept in self._kept.items() if kept.begins(new)]
        for other in gone:
            self._forget(other)
        self._kept[slot] = new
        self.version += 1
        self._num_bytes += self._budget.bytes_of(len(tokens))
        while self._num_bytes > self._budget.num_bytes or len(self._kept) > _MAX_SLOTS:
            oldest = next(iter(self._kept))
            self._forget(oldest)
            gone.append(oldest)
        return gone

    def clear(self) -> list[int]:
        """Forget everything; return the slots to drop."""
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
