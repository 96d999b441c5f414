"""Speculative decoding: a small draft model, held whole by rank 0, proposes the next tokens of an answer.

A step decodes a running row's last token and the draft tokens behind it: one pass over all layers, and one trip round
the ring, for several tokens. Rank 0 samples after each of them, as it would have one by one, and stops at the first
draft token that differs. So a draft changes how long an answer takes but not its tokens, not even sampled ones.

Leviathan et al., "Fast Inference from Transformers via Speculative Decoding" (2022), except for the acceptance rule:
theirs keeps the distribution of sampled tokens, this one keeps the very tokens that a seed gives.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, cast
from weakref import WeakKeyDictionary

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache

from hippo_mpi.engine.request import Sequence

_CHUNK_TOKENS = 512  # of a prompt, read by the draft model before a step; few, because rank 0's part of the step waits


@dataclass(eq=False)
class _Reading:
    """What the draft model has read: its cache and tokens, the first `num_sure` known to be the sequence's own."""

    cache: list[Any]
    tokens: list[int] = field(default_factory=list)
    num_sure: int = 0


class Drafter:
    """A draft model and its caches, one per running sequence.

    Args:
        model: the complete draft model, with its weights.
        vocab_size: both models know the tokens below this one.
        max_tokens: the draft model's longest context in tokens; None: unlimited.
        num_draft_tokens: most draft tokens per step.
    """

    def __init__(self, model: nn.Module, vocab_size: int, max_tokens: int | None, num_draft_tokens: int) -> None:
        self._model, self._vocab_size, self._max_tokens = model, vocab_size, max_tokens
        self._num_draft_tokens = num_draft_tokens
        self._readings: WeakKeyDictionary[Sequence, _Reading] = WeakKeyDictionary()
        self._last: _Reading | None = None

    def propose(self, sequence: Sequence, max_tokens: int) -> list[int]:
        """Return up to `max_tokens` likeliest next tokens; none while the draft model is still reading the prompt."""
        tokens, count = sequence.tokens, min(max_tokens, self._num_draft_tokens)
        if self._max_tokens is not None and len(tokens) + count > self._max_tokens:
            return []
        reading = self._reading_of(sequence)
        if not _trim_to_prefix(reading, tokens):
            return []
        chunk = tokens[len(reading.tokens) : len(reading.tokens) + _CHUNK_TOKENS]
        if max(chunk) >= self._vocab_size:  # MLX doesn't check what it looks up
            return []
        draft = [self._read(reading, mx.array([chunk]))]
        reading.tokens += chunk
        if len(reading.tokens) < len(tokens):
            mx.eval([cache.state for cache in reading.cache])
            return []
        for _ in range(count - 1):
            draft.append(self._read(reading, draft[-1]))
        proposed = cast(list[int], mx.concatenate(draft, axis=1)[0].tolist())
        reading.tokens += proposed[:-1]
        return list(takewhile(lambda token: token < self._vocab_size, proposed))

    def _reading_of(self, sequence: Sequence) -> _Reading:
        """Return a sequence's reading.

        A new sequence takes over the reading used last, if its sequence has ended: so the next turn of a chat costs
        only what it adds.
        """
        if sequence not in self._readings:
            reading = self._last
            if reading is None or reading in self._readings.values() or not can_trim_prompt_cache(reading.cache):
                reading = _Reading(make_prompt_cache(self._model))
            reading.num_sure = 0
            self._readings[sequence] = reading
        self._last = self._readings[sequence]
        return self._last

    def _read(self, reading: _Reading, tokens: mx.array) -> mx.array:
        """Run the draft model over `tokens` (1, L); return the likeliest next token (1, 1)."""
        return mx.argmax(self._model(tokens, cache=reading.cache)[:, -1:, :], axis=-1)


def _trim_to_prefix(reading: _Reading, tokens: list[int]) -> bool:
    """Trim a reading to what it has in common with `tokens`, less the last; False if its caches can't be trimmed."""
    sure = reading.num_sure
    pairs = zip(reading.tokens[sure:], tokens[sure:-1], strict=False)
    right = sure + sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    wrong = len(reading.tokens) - right
    if wrong and not can_trim_prompt_cache(reading.cache):
        return False
    trim_prompt_cache(reading.cache, wrong)
    del reading.tokens[right:]
    reading.num_sure = right
    return True
