"""Follows whether an answer is inside a thought: a grammar applies only outside, and a limit ends a long one.

The start and end marks of thoughts are the tokenizer's, found by mlx-lm.

Legend: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

_TAIL_TOKENS = 32  # at the end of a prompt, where its template may have begun a thought, or ended one


class Thinking:
    """Tracks the thoughts of one answer.

    Args:
        tokenizer: has the marks of thoughts.
        prompt: its tokens; a template may end with the beginning of a thought.
        max_tokens: a thought of this many tokens is ended; None: never.
    """

    def __init__(self, tokenizer: TokenizerWrapper, prompt: Sequence[int], max_tokens: int | None = None) -> None:
        self._start: list[int] = list(tokenizer.think_start_tokens) if tokenizer.has_thinking else []
        self._end: list[int] = list(tokenizer.think_end_tokens) if tokenizer.has_thinking else []
        self._limit = max_tokens
        tail = list(prompt[-_TAIL_TOKENS:])
        began, ended = _rfind(tail, self._start), _rfind(tail, self._end)
        self.is_open = began > ended
        self._may_begin = bool(self._start) and began == ended  # == -1: the template has neither begun nor ended one
        self._count = 0  # tokens since the thought, or the answer, began
        self._said: list[int] = []  # the last of them, as many as the next mark has
        self._left: list[int] = []  # tokens of the end mark that are still to be forced

    @property
    def is_limited(self) -> bool:
        """True if a long thought will be ended."""
        return self._limit is not None and bool(self._end)

    @property
    def first(self) -> int | None:
        """Token with which a thought may begin here; None if none may."""
        return self._start[0] if self._may_begin and len(self._start) == 1 else None

    def forced(self, logits: mx.array) -> mx.array | None:
        """Return logits (1, V) that allow only the end mark, once a thought is too long; None otherwise."""
        if not self._left:
            return None
        allowed = np.zeros(logits.shape[-1], bool)
        allowed[self._left[0]] = True
        return mx.where(mx.array(allowed), logits, -mx.inf)

    def accept(self, token: int) -> None:
        """Advance by one token of the answer."""
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
    """Return how many of an answer's tokens belong to thoughts, marks included."""
    thinking, count = Thinking(tokenizer, prompt), 0
    for token in answer:
        was_open = thinking.is_open
        thinking.accept(token)
        count += was_open or thinking.is_open
    return count


def _rfind(tokens: list[int], mark: list[int]) -> int:
    """Return where the last occurrence of `mark` begins; -1 if there is none."""
    places = range(len(tokens) - len(mark), -1, -1) if mark else ()
    return next((at for at in places if tokens[at : at + len(mark)] == mark), -1)
