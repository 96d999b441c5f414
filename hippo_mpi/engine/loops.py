"""Answers that go round in circles: the same tokens, or the same line, again and again."""

from __future__ import annotations

import numpy as np

_LONGEST_PERIOD = 256  # tokens
_LEAST_TOKENS = 16  # that must have come again: "ha ha ha" is no loop
_LEAST_CHARS = 16  # of a line: a lone bracket may come often


class LoopWatch:
    """Watches one answer.

    Args:
        most_repeats: times in a row that the same may come.
    """

    def __init__(self, most_repeats: int) -> None:
        self._most = most_repeats
        self._tokens: list[int] = []
        # By period p, less 1: how many of the last tokens in a row are the same as the one p before.
        self._runs = np.zeros(_LONGEST_PERIOD, np.int64)
        periods = np.arange(1, _LONGEST_PERIOD + 1)
        self._limits = np.maximum((self._most - 1) * periods, _LEAST_TOKENS)
        self._num_read, self._line, self._same_lines = 0, "", 0

    def take(self, token: int, text: str) -> bool:
        """Whether the answer is in a loop with this token; `text` is all of it so far."""
        return self._take_token(token) or self._take_text(text)

    def _take_token(self, token: int) -> bool:
        before = np.array(self._tokens[::-1], np.int64)
        num = len(before)
        self._runs[:num] = np.where(before == token, self._runs[:num] + 1, 0)
        self._tokens = [*self._tokens[-_LONGEST_PERIOD + 1 :], token]
        return bool((self._runs >= self._limits).any())

    def _take_text(self, text: str) -> bool:
        end = text.rfind("\n")
        if end < self._num_read:
            return False
        lines = text[self._num_read : end].split("\n")
        self._num_read = end + 1
        for line in lines:
            if len(line.strip()) < _LEAST_CHARS:
                continue
            self._same_lines = self._same_lines + 1 if line == self._line else 1
            self._line = line
            if self._same_lines >= self._most:
                return True
        return False
