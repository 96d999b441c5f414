"""Prefixes that are still in the caches of all ranks: which slot holds which tokens. Least recently used first out.

Matched by tokens, on rank 0; the other ranks only see slots that are forked and dropped. Knows slots and counts.
Must not know MLX or ranks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable

_LEAST_TOKENS = 16  # shorter ones cost more to copy than to compute


class PrefixCache:
    """Slots kept for requests to come.

    Args:
        budget_tokens: most tokens that all kept slots may hold together; 0 keeps nothing.
        can_cut: whether a slot may lose tokens at its end; of one that can't, only the whole is of use.
    """

    def __init__(self, budget_tokens: int, can_cut: Callable[[int], bool]) -> None:
        self._budget, self._can_cut = budget_tokens, can_cut
        self._kept: OrderedDict[int, list[int]] = OrderedDict()  # slot -> its tokens, oldest use first
        self.num_tokens = 0

    def match(self, prompt: list[int], running: Iterable[tuple[int, list[int]]]) -> tuple[int, int] | None:
        """(slot, number of tokens) of the longest usable prefix of `prompt`, among what is kept and what is running.

        At least one token of the prompt is left over.
        """
        best: tuple[int, int] | None = None
        if not self._budget:
            return None
        for slot, tokens in [*self._kept.items(), *running]:
            common = min(_common(tokens, prompt), len(prompt) - 1)
            if common >= (best[1] + 1 if best else _LEAST_TOKENS) and (common == len(tokens) or self._can_cut(slot)):
                best = slot, common
        if best is not None and best[0] in self._kept:
            self._kept.move_to_end(best[0])
        return best

    def take(self, slot: int, num_tokens: int) -> bool:
        """Hand a kept slot over to a sequence that begins with all of its tokens, instead of a copy."""
        if slot not in self._kept or len(self._kept[slot]) != num_tokens:
            return False
        self._forget(slot)
        return True

    def keep(self, slot: int, tokens: list[int]) -> list[int]:
        """Keep `slot`, which holds `tokens`; returns the slots that must go for it, perhaps itself."""
        if len(tokens) > self._budget or not tokens or tokens in self._kept.values():
            return [slot]
        gone = []
        if self._can_cut(slot):  # then it serves for all that it begins with
            gone = [other for other, kept in self._kept.items() if kept == tokens[: len(kept)]]
        for other in gone:
            self._forget(other)
        self._kept[slot] = tokens
        self.num_tokens += len(tokens)
        while self.num_tokens > self._budget:
            oldest = next(iter(self._kept))
            self._forget(oldest)
            gone.append(oldest)
        return gone

    def clear(self) -> list[int]:
        """Forget everything; returns the slots."""
        slots = list(self._kept)
        self._kept.clear()
        self.num_tokens = 0
        return slots

    def _forget(self, slot: int) -> None:
        self.num_tokens -= len(self._kept.pop(slot))


def _common(first: list[int], second: list[int]) -> int:
    length = min(len(first), len(second))
    if first[:length] == second[:length]:
        return length
    return next(i for i in range(length) if first[i] != second[i])
