"""Limits how many prompt tokens a step may read, so that no step comes near the deadline."""

from __future__ import annotations

_FIRST_TOKENS = 4
_MAX_GROWTH = 4
_SHARE_OF_DEADLINE = 0.25


class PrefillPace:
    """Sizes prefill steps by how long earlier ones took.

    The speed of a model on its machines is unknown before its first step, and ranges over five orders of magnitude. So
    the first step is short, and each one may have four times as many tokens as the longest before. Where steps are
    quick, the sizes don't depend on measured times, so every run reads a prompt in the same steps.

    Args:
        deadline_s: seconds after which a rank that is in a step counts as stuck; None: never.
    """

    def __init__(self, deadline_s: float | None) -> None:
        self._max_step_s = None if deadline_s is None else _SHARE_OF_DEADLINE * deadline_s
        self._longest_tokens = 0
        self._token_s = 0.0

    def note(self, num_tokens: int, took_s: float) -> None:
        """Learn from a prefill step of `num_tokens` in total; one much shorter than allowed is no measure of speed."""
        if num_tokens * _MAX_GROWTH >= min(self._longest_tokens, self._in_time()):
            self._token_s = took_s / num_tokens
        self._longest_tokens = max(self._longest_tokens, num_tokens)

    def limit(self, wanted_tokens: int) -> int:
        """Return how many of `wanted_tokens` the next step may read; at least one."""
        if self._max_step_s is None:
            return wanted_tokens
        if not self._longest_tokens:
            return min(wanted_tokens, _FIRST_TOKENS)
        return max(1, min(wanted_tokens, _MAX_GROWTH * self._longest_tokens, self._in_time()))

    def _in_time(self) -> int:
        """Return how many tokens a step can read in its share of the deadline."""
        return int((self._max_step_s or 0.0) / max(self._token_s, 1e-9))
