"""The schedule as data: golden files, no deadlocks, busy stages, and the real worker follows it."""

from __future__ import annotations

from pathlib import Path

import pytest

from hippo_mpi.parallel.schedule import Action, Deadlock, actions, simulate, table

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
def test_golden(num_stages: int) -> None:
    """If the order changes on purpose: write table(n, 6) to the file, and look at the difference."""
    assert table(num_stages, 6) == (GOLDEN / f"schedule_{num_stages}.txt").read_text()


def equal_stages(_: int, action: Action) -> float:
    return 1.0 if action.kind == "forward" else 0.0


@pytest.mark.parametrize("num_stages", range(1, 9))
@pytest.mark.parametrize("num_steps", [1, 2, 7, 30])
@pytest.mark.parametrize("num_silent", [0, 5])
@pytest.mark.parametrize("max_in_flight", [None, 1, 3])
def test_never_deadlocks_with_blocking_sends(
    num_stages: int, num_steps: int, num_silent: int, max_in_flight: int | None
) -> None:
    schedules = [actions(rank, num_stages, num_steps, max_in_flight, num_silent) for rank in range(num_stages)]
    simulate(schedules, equal_stages, blocking_sends=True)


def test_what_a_simulation_says() -> None:
    """One micro-batch on two stages: forward 1 s, link 0.25 s and 0.5 s, forward 1 s, back again, head 0.5 s."""
    schedules = [actions(rank, 2, 2, max_in_flight=1) for rank in range(2)]
    found = simulate(
        schedules,
        lambda _, action: 1.0 if action.kind == "forward" else 0.5,
        0.5,
        lambda *_: 0.25,
        blocking_sends=False,
    )
    assert found.total_s == 2 * (1 + 0.75 + 1 + 0.75 + 0.5)
    assert found.busy == (3 / 8, 2 / 8)


def test_prompt_chunks_flow_freely() -> None:
    """Nothing comes back until the last step: 8 chunks and a step fill two stages but for the first and last."""
    schedules = [actions(rank, 2, 9, num_silent=8) for rank in range(2)]
    assert simulate(schedules, equal_stages, blocking_sends=False).total_s == 10


@pytest.mark.parametrize("num_stages", [2, 3, 4, 8])
def test_stages_are_busy(num_stages: int) -> None:
    num_steps = 1000
    schedules = [actions(rank, num_stages, num_steps) for rank in range(num_stages)]
    found = simulate(schedules, equal_stages)
    assert min(found.busy) > 0.98


def test_sending_at_once_deadlocks() -> None:
    """Why rank 0 receives before it sends: the obvious order doesn't finish."""
    eager = [Action("forward", 0), Action("send", 0), Action("forward", 1), Action("send", 1), Action("receive", 0)]
    with pytest.raises(Deadlock, match="rank 0 at S1"):
        simulate([[*eager, Action("receive", 1)], actions(1, 2, 2)], equal_stages)


def test_sends_and_receives_match_pairwise() -> None:
    for num_stages in range(2, 9):
        for rank in range(num_stages):
            sent = [a.step for a in actions(rank, num_stages, 20) if a.kind == "send"]
            received = [a.step for a in actions((rank + 1) % num_stages, num_stages, 20) if a.kind == "receive"]
            assert sent == received == list(range(20))
