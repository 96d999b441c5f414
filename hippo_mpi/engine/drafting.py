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


@dataclass
class _Reading:
    """What the draft model has read of one sequence: so many tokens, the last of them from a draft."""

    cache: list[Any]
    num_tokens: int = 0
    draft_start: int = 0
    draft: list[int] = field(default_factory=list)


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

    def propose(self, sequence: Sequence, most: int) -> list[int]:
        """The likeliest tokens behind `sequence`, at most `most`; none while its prompt is being read."""
        tokens, count = sequence.tokens, min(most, self._num_draft_tokens)
        if sequence not in self._readings:
            self._readings[sequence] = _Reading(make_prompt_cache(self._model))
        reading = self._readings[sequence]
        if self._most_tokens is not None and len(tokens) + count > self._most_tokens:
            return []
        if not _take_back(reading, tokens):
            return []
        chunk = tokens[reading.num_tokens : reading.num_tokens + _CHUNK_TOKENS]
        if max(chunk) >= self._vocab_size:  # MLX doesn't check what it looks up
            return []
        draft = [self._read(reading, mx.array([chunk]))]
        if reading.num_tokens < len(tokens):
            mx.eval([cache.state for cache in reading.cache])
            return []
        for _ in range(count - 1):
            draft.append(self._read(reading, draft[-1]))
        found = cast(list[int], mx.concatenate(draft, axis=1)[0].tolist())
        reading.draft_start, reading.draft = len(tokens), found
        return list(takewhile(lambda token: token < self._vocab_size, found))

    def _read(self, reading: _Reading, tokens: mx.array) -> mx.array:
        """The likeliest token (1, 1) behind `tokens` (1, L)."""
        reading.num_tokens += tokens.shape[1]
        return mx.argmax(self._model(tokens, cache=reading.cache)[:, -1:, :], axis=-1)


def _take_back(reading: _Reading, tokens: list[int]) -> bool:
    """Forget what wasn't accepted of a draft; False if the draft model's caches have grown beyond that."""
    pairs = zip(reading.draft, tokens[reading.draft_start :], strict=False)
    num_accepted = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    wrong = reading.num_tokens - (reading.draft_start + num_accepted) if reading.draft else 0
    if wrong > 0:
        if not can_trim_prompt_cache(reading.cache):
            return False
        trim_prompt_cache(reading.cache, wrong)
        reading.num_tokens -= wrong
    reading.draft = []
    return True
