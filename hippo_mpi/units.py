"""Numbers as people read them."""

from __future__ import annotations


def count_of(number: int, noun: str) -> str:
    """Return a number with its noun: 1 rank, 2 ranks, 1,024 ranks."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
