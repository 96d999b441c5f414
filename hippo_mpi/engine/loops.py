"""Detects answers that repeat the same tokens, or the same line, again and again."""

from __future__ import annotations

import numpy as np

_LONGEST_PERIOD = 256  # tokens
_MIN_TOKENS = 16  # that must have repeated: "ha ha ha" is no loop
_MIN_CHARS = 16  # of a line that counts: a lone bracket may come often


class RepetitionDetector:
    """Follows one answer and tells when it repeats itself.

    Args:
        max_repeats: how often in a row the same tokens or line may come; this often is a repetition.
    """

    def __init__(self, max_repeats: int) -> None:
        self._max_repeats = max_repeats
        self._tokens: list[int] = []
        # At index p - 1: how many of the last tokens in a row equal the token p before them.
        self._runs = np.zeros(_LONGEST_PERIOD, np.int64)
        periods = np.arange(1, _LONGEST_PERIOD + 1)
        self._limits = np.maximum((self._max_repeats - 1) * periods, _MIN_TOKENS)
        self._num_read, self._line, self._same_lines = 0, "", 0

    def take(self, token: int, text: str) -> bool:
        """Add a token and return whether the answer now repeats itself; `text` is the whole answer so far."""
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
            if len(line.strip()) < _MIN_CHARS:
                continue
            self._same_lines = self._same_lines + 1 if line == self._line else 1
            self._line = line
            if self._same_lines >= self._max_repeats:
                return True
        return False
