"""Whether an answer is thinking: a grammar waits until it isn't, and a limit ends it.

The marks of thoughts are the tokenizer's, found by mlx-lm.

Legend: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

_TAIL_TOKENS = 32  # of a prompt: where its template may have begun a thought, or ended one


class Thinking:
    """Follows one answer.

    Args:
        prompt: its tokens; a template may end with the beginning of a thought.
        max_tokens: after so many tokens a thought is ended; None: never.
    """

    def __init__(self, tokenizer: TokenizerWrapper, prompt: Sequence[int], max_tokens: int | None = None) -> None:
        self._start: list[int] = list(tokenizer.think_start_tokens) if tokenizer.has_thinking else []
        self._end: list[int] = list(tokenizer.think_end_tokens) if tokenizer.has_thinking else []
        self._limit = max_tokens
        tail = list(prompt[-_TAIL_TOKENS:])
        began, ended = _rfind(tail, self._start), _rfind(tail, self._end)
        self.is_open = began > ended
        self._may_begin = bool(self._start) and began == ended  # == -1: the template has decided nothing
        self._count = 0  # tokens since the thought began, or since the answer did
        self._said: list[int] = []  # the last of them, as many as a mark has
        self._left: list[int] = []  # of the end mark, which is being forced

    @property
    def is_limited(self) -> bool:
        return self._limit is not None and bool(self._end)

    @property
    def first(self) -> int | None:
        """The token with which a thought may begin here; None where it may not."""
        return self._start[0] if self._may_begin and len(self._start) == 1 else None

    def forced(self, logits: mx.array) -> mx.array | None:
        """Logits (1, V) that leave only the end of a thought that has become too long; None if it hasn't."""
        if not self._left:
            return None
        allowed = np.zeros(logits.shape[-1], bool)
        allowed[self._left[0]] = True
        return mx.where(mx.array(allowed), logits, -mx.inf)

    def accept(self, token: int) -> None:
        """The answer goes on with this token."""
        if not self._end:
            return
        if self._left:
            del self._left[0]
        mark = self._end if self.is_open else self._start
        self._said = [*self._said, token][-len(mark) :]
        self._count += 1
        if self._said == mark:
            self.is_open, self._count, self._said, self._left = not self.is_open, 0, [], []
        if self.is_open and self._limit is not None and self._count >= self._limit and not self._left:
            self._left = list(self._end)
        self._may_begin = False


def thought_tokens(tokenizer: TokenizerWrapper, prompt: Sequence[int], answer: Sequence[int]) -> int:
    """How many of an answer's tokens were thoughts, with their marks."""
    thinking, found = Thinking(tokenizer, prompt), 0
    for token in answer:
        was_open = thinking.is_open
        thinking.accept(token)
        found += was_open or thinking.is_open
    return found


def _rfind(tokens: list[int], mark: list[int]) -> int:
    """Where the last occurrence of `mark` begins; -1 if there is none."""
    places = range(len(tokens) - len(mark), -1, -1) if mark else ()
    return next((at for at in places if tokens[at : at + len(mark)] == mark), -1)
