"""Allocates slots by number: to sequences, to kept prefixes, and collects the changes that ranks must be told.

A slot holds the caches of one sequence on every rank. Slots of ended sequences may be kept for prompts with the same
prefix. Knows numbers and tokens. Must not know MLX or ranks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hippo_mpi.engine.prefix_cache import PrefixCache
from hippo_mpi.engine.request import Sequence


@dataclass(frozen=True)
class SlotChanges:
    """What every rank does to its slots before a step, in the order of the fields, which are those of `StepPlan`."""

    forks: tuple[tuple[int, int], ...] = ()
    detached: tuple[int, ...] = ()
    drops: tuple[int, ...] = ()


class Slots:
    """Hands out slots, and collects the changes that ranks must make to them.

    Args:
        prefixes: keeps the slots of ended sequences.
    """

    def __init__(self, prefixes: PrefixCache) -> None:
        self._prefixes = prefixes
        self._free: list[int] = []
        self._count = 0
        self._forks: list[tuple[int, int]] = []
        self._detached: list[int] = []
        self._drops: list[int] = []

    @property
    def is_settled(self) -> bool:
        """Return whether no retained slot still shares a batched cache with other slots."""
        return not self._detached

    @property
    def has_changes(self) -> bool:
        """Return whether ranks must be told of changes."""
        return bool(self._forks or self._detached or self._drops)

    def take_changes(self) -> SlotChanges:
        """Return the collected changes and forget them; the next step must carry them. Dropped slots become free."""
        changes = SlotChanges(tuple(self._forks), tuple(self._detached), tuple(self._drops))
        self._forks, self._detached, self._drops = [], [], []
        self._free += changes.drops
        return changes

    def begin(self, sequence: Sequence, running: Iterable[Sequence]) -> None:
        """Give a prompt a slot that begins with the longest cached prefix of the prompt."""
        source, count = self._find(sequence, running)
        if self._prefixes.take(source, count):
            sequence.slot = source
        else:
            sequence.slot = self._new()
            self._forks += [(source, sequence.slot)] if count else []
        sequence.position = sequence.timings.cached_tokens = count

    def num_cached(self, sequence: Sequence, running: list[Sequence]) -> int:
        """Return how many tokens of a prompt are cached.

        The search is repeated only if the kept or running sequences have changed, because this is called before every
        step for each waiting prompt.
        """
        known = self._prefixes.version, tuple(other.slot for other in running)
        if sequence.searched is None or sequence.searched[0] != known:
            sequence.searched = known, self._find(sequence, running)[1]
        return sequence.searched[1]

    def is_worth_waiting(self, sequence: Sequence, other: Sequence, cached: int) -> bool:
        """Return whether reading `other` first would cache many more tokens of this prompt than the `cached` ones."""
        is_alike = sequence.request.cache_salt == other.request.cache_salt
        return is_alike and self._prefixes.is_worth_waiting(sequence.tokens, other.tokens, cached)

    def release(self, sequence: Sequence, was_batched: bool = False) -> None:
        """Keep the cache of an ended sequence as a prefix for others, or free it.

        Args:
            sequence: one without a slot is ignored.
            was_batched: whether it shared a batched cache in its last step.
        """
        if sequence.slot < 0:
            return
        tokens, salt = sequence.tokens[: sequence.position], sequence.request.cache_salt
        gone = self._prefixes.keep(sequence.slot, tokens, salt)
        self._detached += [sequence.slot] if was_batched and sequence.slot not in gone else []
        self._drops += gone

    def forget_prefixes(self) -> None:
        """Free the kept slots of ended sequences."""
        self._drops += self._prefixes.clear()

    def _find(self, sequence: Sequence, running: Iterable[Sequence]) -> tuple[int, int]:
        """Return (slot, number of tokens) of the longest cached prefix of a prompt; (-1, 0) if there is none."""
        salt = sequence.request.cache_salt
        alike = ((other.slot, other.tokens[: other.position]) for other in running if other.request.cache_salt == salt)
        return self._prefixes.match(sequence.tokens, alike, salt) or (-1, 0)

    def _new(self) -> int:
        if self._free:
            return self._free.pop()
        self._count += 1
        return self._count - 1
