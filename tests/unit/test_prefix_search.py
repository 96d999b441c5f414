"""What is cached of a prompt: found as a plain comparison finds it, and looked for once, not before every step."""

from __future__ import annotations

from itertools import count, takewhile
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hippo_mpi.engine import prefix_cache
from hippo_mpi.engine.prefill import Limits
from hippo_mpi.engine.prefix_cache import PrefixBudget, PrefixCache
from hippo_mpi.engine.request import Request, SamplingParams, Sequence, Timings
from hippo_mpi.engine.scheduler import Scheduler

BUDGET = PrefixBudget(1 << 40, lambda num_tokens: num_tokens)
PROMPTS = st.tuples(st.integers(0, 60), st.integers(0, 3), st.integers(0, 40)).map(
    lambda shape: [*range(shape[0]), *[100 + shape[1]] * shape[2]]
)


def common(first: list[int], second: list[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


@given(st.lists(PROMPTS, max_size=8), st.lists(PROMPTS, max_size=3), PROMPTS, st.sets(st.integers(0, 11)))
def test_the_longest_usable_prefix(
    kept: list[list[int]], running: list[list[int]], prompt: list[int], rigid: set[int]
) -> None:
    """Among caches that may be cut, and `rigid` ones of which only the whole is of use."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix_cache, "_BLOCK", 7)
        cache = PrefixCache(BUDGET, lambda slot: slot not in rigid)
        held: dict[int, list[int]] = {}
        for slot, tokens in enumerate(kept):
            gone = cache.keep(slot, tokens)
            held = {s: t for s, t in {**held, slot: tokens}.items() if s not in gone}
        others = list(enumerate(running, 8))
        usable = [
            shared
            for slot, tokens in [*held.items(), *others]
            if (shared := min(common(tokens, prompt), len(prompt) - 1)) >= 16
            and (slot not in rigid or shared == len(tokens))
        ]
        found = cache.match(prompt, others)
        assert (found[1] if found else 0) == max(usable, default=0)
        for other in kept:
            assert cache.is_worth_waiting(prompt, other, 3) == (common(prompt, other) >= 19)


def test_prompts_that_wait_are_looked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the first of many prompts that begin alike is read, in many steps, the others wait for it."""
    searched: list[int] = []
    match = PrefixCache.match

    def note(self: PrefixCache, prompt: list[int], running: Any, salt: str) -> Any:
        searched.append(prompt[-1])
        return match(self, prompt, running, salt)

    monkeypatch.setattr(PrefixCache, "match", note)
    limits = Limits(max_batch_size=8, prefill_chunk=4, can_batch=True)
    scheduler = Scheduler(1, limits, PrefixCache(BUDGET, lambda slot: True), count())
    sequences = []
    for number in range(8):
        prompt = [*range(200), 1000 + number]
        request = Request(number, prompt, SamplingParams())
        sequences.append(Sequence(request, list(prompt), None, None, Timings()))
        scheduler.add(sequences[-1])
    for _ in range(40):
        assert scheduler.next_step() is not None
    assert sequences[0].position == 160
    assert all(sequence.slot < 0 for sequence in sequences[1:])
    assert sorted(searched) == list(range(1000, 1008))
    for _ in range(40):
        scheduler.next_step()
    assert [sequence.timings.cached_tokens for sequence in sequences] == [0, *[200] * 7]
