"""How often something is timed: within limits, equally often on every rank, and not at all if it would take too long."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from hippo_mpi.planning.timed_tries import Effort, Run, by_size, in_turn
from hippo_mpi.transport.local_collective import AbsentRanks, LocalCollective, run_ranks


def counting(seconds: float, calls: list[float], sleep_s: float = 0.0) -> Run:
    def run() -> float:
        time.sleep(sleep_s)
        calls.append(seconds)
        return seconds

    return run


@pytest.mark.parametrize(("effort", "tries"), [(Effort(0.0, 25), 3), (Effort(1e6, 7), 7)])
def test_tries_are_limited(effort: Effort, tries: int) -> None:
    calls: list[float] = []
    assert in_turn([counting(1.0, calls), counting(2.0, calls)], effort, AbsentRanks(0), lambda: None) == [1.0, 2.0]
    assert calls == [1.0, 2.0] * tries


def test_ranks_of_different_speeds_try_as_often() -> None:
    calls: list[list[float]] = [[], []]

    def rank(number: int) -> Callable[[], list[float]]:
        run = counting(1.0, calls[number], 0.02 * number)
        return lambda: in_turn([run], Effort(0.1, 1000), LocalCollective(), lambda: None)

    run_ranks([rank(0), rank(1)])
    assert len(calls[0]) == len(calls[1]) >= 3


def test_what_would_take_too_long_is_concluded() -> None:
    calls: list[float] = []
    sizes = [1, 2, 16]

    expected: dict[int, float] = {}

    def runs(size: int) -> Callable[[float], list[Run]]:
        def made(expected_s: float) -> list[Run]:
            expected[size] = expected_s
            return [counting(0.3 * size, calls)]

        return made

    efforts = dict.fromkeys(range(3), Effort(0.0, 3))
    found = by_size([runs(size) for size in sizes], sizes, efforts, AbsentRanks(0), lambda: None)
    assert [seconds for (seconds,) in found] == pytest.approx([0.3, 0.6, 4.8])
    assert max(calls) == 0.6
    assert expected == pytest.approx({1: 0.3, 2: 0.6})


def test_a_pause_decides_nothing() -> None:
    """Of one of two runs, in its second try."""
    seconds = iter([1e-3, 10.0])
    runs: list[Run] = [lambda: 1e-3, lambda: next(seconds, 1e-3)]
    found = by_size([lambda _: runs] * 2, [1, 2], {1: Effort(0.1, 6)}, AbsentRanks(0), lambda: None)
    assert found[1] == [1e-3, 1e-3]


def test_what_is_not_asked_for_is_concluded() -> None:
    calls: list[float] = []
    sizes = [1, 2, 4]
    runs = [lambda _, size=size: [counting(1e-3 * size**2, calls)] for size in sizes]
    found = by_size(runs, sizes, {1: Effort(0.0, 3)}, AbsentRanks(0), lambda: None)
    assert [seconds for (seconds,) in found] == pytest.approx([2e-3, 4e-3, 8e-3])
    assert calls == [1e-3] * 4 + [4e-3] * 3  # the smallest, roughly, to know what to expect
