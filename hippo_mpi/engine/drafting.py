"""Speculative decoding: a small draft model, whole on rank 0, proposes what an answer says next.

A step takes a running row's last token and the draft tokens behind it: one pass over all layers, and one trip round
the ring, for several tokens. Rank 0 samples behind each, as it would have one by one, and stops at the first draft token
that is another: so a draft changes how long an answer takes, and not its tokens, sampled ones neither.

Leviathan et al., "Fast Inference from Transformers via Speculative Decoding" (2022), but for the acceptance: theirs
keeps the distribution of sampled tokens, and this the tokens that a seed gives.
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

_CHUNK_TOKENS = 512  # of a prompt that are read before a step: few, as rank 0's part of it waits


@dataclass(eq=False)
class _Reading:
    """What the draft model has read: tokens, the first of which are known to be the sequence's."""

    cache: list[Any]
    tokens: list[int] = field(default_factory=list)
    num_sure: int = 0


class Drafter:
    """A draft model.

    Args:
        model: whole, with its weights.
        vocab_size: tokens below it are known to both models.
        most_tokens: that it can read; None: any number.
        num_draft_tokens: at most, for one step.
    """

    def __init__(self, model: nn.Module, vocab_size: int, most_tokens: int | None, num_draft_tokens: int) -> None:
        self._model, self._vocab_size, self._most_tokens = model, vocab_size, most_tokens
        self._num_draft_tokens = num_draft_tokens
        self._readings: WeakKeyDictionary[Sequence, _Reading] = WeakKeyDictionary()
        self._last: _Reading | None = None

    def propose(self, sequence: Sequence, most: int) -> list[int]:
        """The likeliest tokens behind `sequence`, at most `most`; none while its prompt is being read."""
        tokens, count = sequence.tokens, min(most, self._num_draft_tokens)
        if self._most_tokens is not None and len(tokens) + count > self._most_tokens:
            return []
        reading = self._reading_of(sequence)
        if not _take_back(reading, tokens):
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
        found = cast(list[int], mx.concatenate(draft, axis=1)[0].tolist())
        reading.tokens += found[:-1]
        return list(takewhile(lambda token: token < self._vocab_size, found))

    def _reading_of(self, sequence: Sequence) -> _Reading:
        """A new sequence goes on with what was read last, if that one has ended: a chat's turn costs what it adds."""
        if sequence not in self._readings:
            reading = self._last
            if reading is None or reading in self._readings.values() or not can_trim_prompt_cache(reading.cache):
                reading = _Reading(make_prompt_cache(self._model))
            reading.num_sure = 0
            self._readings[sequence] = reading
        self._last = self._readings[sequence]
        return self._last

    def _read(self, reading: _Reading, tokens: mx.array) -> mx.array:
        """The likeliest token (1, 1) behind `tokens` (1, L)."""
        return mx.argmax(self._model(tokens, cache=reading.cache)[:, -1:, :], axis=-1)


def _take_back(reading: _Reading, tokens: list[int]) -> bool:
    """Forget what isn't the sequence's, and its last token; False if the draft model's caches can't any more."""
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
