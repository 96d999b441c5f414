"""Answers that go round in circles are found; others aren't."""

from __future__ import annotations

import random

from hippo_mpi.engine.loops import RepetitionDetector


def first_loop(tokens: list[int], texts: list[str], max_repeats: int = 4) -> int | None:
    detector = RepetitionDetector(max_repeats)
    said = ""
    for number, (token, text) in enumerate(zip(tokens, texts, strict=True)):
        said += text
        if detector.take(token, said):
            return number
    return None


def test_tokens_that_come_again() -> None:
    for period in (1, 3, 40, 256):
        lead, part = list(range(1000, 1007)), list(range(period))
        tokens = lead + part * 30
        found = first_loop(tokens, [""] * len(tokens))
        assert found == 6 + period + max(3 * period, 16)


def test_tokens_that_don_t() -> None:
    random.seed(3)
    tokens = [random.randrange(50) for _ in range(2000)]
    assert first_loop(tokens, [""] * len(tokens)) is None
    assert first_loop([*([1] * 16), 2] * 3, [""] * 51) is None
    assert first_loop(list(range(300)) * 6, [""] * 1800) is None  # longer than what is looked back at


def test_lines() -> None:
    """The same line counts, however it was cut into tokens; short ones and blank ones don't."""
    same = "The fox went home again.\n"
    texts = ["Once.\n", *[same] * 3, "And a hen came to see.\n", same, "\n", same, "}\n", same, same, same]
    assert first_loop(list(range(len(texts))), texts) == 10
    assert first_loop(list(range(50)), ["}\n"] * 50) is None
