"""Decides which prompts are read next, how many together, and how much of each.

Prompts are read in chunks that follow one another without waiting for results; several short prompts may share a step.
Knows positions and counts. Must not know MLX, text or ranks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from hippo_mpi.engine.prefill_pace import PrefillPace
from hippo_mpi.engine.request import Sequence
from hippo_mpi.engine.slots import Slots

_MAX_PADDING = 2  # prompts that are read together are padded to at most this multiple of the shortest
_CHUNKS_PER_STAGE = 8  # with 8 chunks a stage, filling and draining the pipeline costs 1 part in 16 at 2 stages


@dataclass(frozen=True)
class Limits:
    """What may be in flight at once."""

    max_batch_size: int = 1  # sequences that prefill or run
    max_batch_tokens: int = 512  # prompt tokens between two steps of the running sequences
    cache_tokens: int | None = None  # that all sequences together may need, padded to the longest; None: no limit
    prefill_chunk: int | None = None  # prompt tokens per step; None: chosen by the number of stages
    keeps_chunks: bool = False  # whether every step of a prompt but its last must have that many tokens
    can_batch: bool | None = None  # whether rows may share a step; None: the engine probes the model, also for can_pad
    can_pad: bool = False  # whether prompts of different lengths may be read in one step, padded on the right
    longest_chunk: int = 2048  # most prompt tokens per step on one stage; the engine sets it for its machine
    deadline_s: float | None = None  # after which a rank that is in a step counts as stuck; None: never


@dataclass(frozen=True)
class Chunk:
    """Tokens [start, start + count) of one or more prompts, which are read in one step."""

    rows: list[Sequence]
    starts: list[int]
    counts: list[int]

    @property
    def num_tokens(self) -> int:
        """Return how many tokens the step computes, padding included."""
        return len(self.rows) * max(self.counts)

    @property
    def tokens(self) -> list[list[int]]:
        """Return each row's tokens in this chunk."""
        spans = zip(self.rows, self.starts, self.counts, strict=True)
        return [row.tokens[start : start + count] for row, start, count in spans]


class Prefill:
    """Reads prompts, all but the last token of each, which the first decoding step takes.

    Args:
        limits: sizes of steps, and what may share one.
        num_stages: stages to keep busy.
        slots: hands out slots and finds cached prefixes.
        running: returns the sequences that are decoding, whose caches new prompts may copy a prefix from.
        join: called with sequences whose prompts have been read; those of one call should share a step.
    """

    def __init__(
        self,
        limits: Limits,
        num_stages: int,
        slots: Slots,
        running: Callable[[], list[Sequence]],
        join: Callable[[list[Sequence]], None],
    ) -> None:
        self._limits, self._num_stages, self._slots = limits, num_stages, slots
        self._running, self._join = running, join
        self.pace = PrefillPace(limits.deadline_s)
        self.prompts: deque[Sequence] = deque()
        """Sequences whose prompts are being read, oldest first."""
        self._is_turn_of_shortest = False  # whether the next chunk is of the shortest prompt, not of the oldest

    @property
    def next_count(self) -> int:
        """Return how many tokens of the oldest prompt its next step should read; fewer would waste the step's cost."""
        return min(tokens_left(self.prompts[0]), self._chunk_tokens())

    def begin_first(self) -> None:
        """Give the oldest prompt a slot; prompts cached up to their last token start decoding at once."""
        while self.prompts and self.prompts[0].slot < 0:
            self._begin(self.prompts[0])

    def next_chunk(self, room: int) -> Chunk:
        """Return the next chunk of one prompt, or the rest of several, and advance their positions past it.

        Args:
            room: most tokens per row, which applies while other sequences are decoding.
        """
        max_tokens = self._chunk_tokens()
        if self._running() and not self._limits.keeps_chunks:
            max_tokens = min(max_tokens, room)
        rows = self._prompts_together(self._whose_turn(), max_tokens)
        chunk = Chunk(
            rows,
            [sequence.position for sequence in rows],
            [min(tokens_left(sequence), max_tokens) for sequence in rows],
        )
        for sequence, count in zip(rows, chunk.counts, strict=True):
            sequence.position += count
        self._leave([sequence for sequence in rows if not tokens_left(sequence)])
        return chunk

    def _whose_turn(self) -> Sequence:
        """Alternate between the oldest and the shortest prompt, so that a huge one neither blocks nor starves."""
        oldest, *others = self.prompts
        self._is_turn_of_shortest = not self._is_turn_of_shortest
        if self._is_turn_of_shortest:
            return oldest
        for sequence in sorted(others, key=tokens_left):
            if self._may_begin(sequence, [oldest]) and 0 < tokens_left(sequence) < tokens_left(oldest):
                return sequence
        return oldest

    def _prompts_together(self, first: Sequence, max_tokens: int) -> list[Sequence]:
        """Return `first`, and others of similar length if all of them can be read to their ends in one step."""
        rows = [first]
        max_padding = _MAX_PADDING if self._limits.can_pad else 1
        shortest = longest = tokens_left(first)
        others = [sequence for sequence in self.prompts if sequence is not first]
        for sequence in others if self._limits.can_batch and longest <= max_tokens else []:
            if not self._may_begin(sequence, rows):
                continue
            left = tokens_left(sequence)
            low, high = min(shortest, left), max(longest, left)
            if 0 < high <= max_padding * low and high * (len(rows) + 1) <= max_tokens:
                rows.append(sequence)
                shortest, longest = low, high
        return rows

    def _may_begin(self, sequence: Sequence, others: list[Sequence]) -> bool:
        """Give a prompt a slot, unless one of `others` shares its prefix and should be read first."""
        if sequence.slot < 0:
            cached = self._slots.num_cached(sequence, self._running())
            if any(self._slots.is_worth_waiting(sequence, other, cached) for other in others):
                return False
            self._begin(sequence)
        return True

    def _begin(self, sequence: Sequence) -> None:
        self._slots.begin(sequence, self._running())
        if not tokens_left(sequence):
            self._leave([sequence])

    def _leave(self, read: list[Sequence]) -> None:
        for sequence in read:
            self.prompts.remove(sequence)
        self._join(read)

    def _chunk_tokens(self) -> int:
        unread = sum(len(s.request.prompt) - s.timings.cached_tokens for s in self.prompts)
        if self._limits.prefill_chunk is not None:
            return self._limits.prefill_chunk
        return self.pace.limit(chunk_tokens(unread, self._num_stages, self._limits.longest_chunk))


def chunk_tokens(unread_tokens: int, num_stages: int, longest: int) -> int:
    """Return how many prompt tokens a step should read: few enough to keep all stages busy, enough to be efficient."""
    if num_stages == 1:
        return longest
    return max(64, min(512, longest, -(-unread_tokens // (_CHUNKS_PER_STAGE * num_stages))))


def tokens_left(sequence: Sequence) -> int:
    """Return how many tokens of a prompt aren't cached yet, not counting the last."""
    return len(sequence.tokens) - 1 - sequence.position
