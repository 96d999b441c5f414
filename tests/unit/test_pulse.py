"""Slow isn't dead: what moves a deadline, and what doesn't."""

from __future__ import annotations

import time

import pytest

from hippo_mpi.engine.prefill_pace import PrefillPace
from hippo_mpi.transport.pulse import Activity, Pulse


def compute(seconds: float) -> None:
    ends = time.process_time() + seconds
    while time.process_time() < ends:
        sum(range(1000))


def test_computing_moves_the_deadline() -> None:
    pulse = Pulse(timeout_s=30)
    pulse.progress("computing step 1", Activity.COMPUTING)
    compute(0.1)
    assert pulse.is_working()


@pytest.mark.parametrize("activity", [Activity.WAITING, Activity.COMPUTING])
def test_neither_waiting_nor_sleeping_does(activity: Activity) -> None:
    """MLX's receives spin, so a rank that waits uses a core; one that is stuck in its work uses none."""
    pulse = Pulse(timeout_s=30)
    pulse.progress("step 1", activity)
    pulse.is_working()
    if activity is Activity.WAITING:
        compute(0.1)
    else:
        time.sleep(0.2)
    assert not pulse.is_working()


def test_an_endless_loop_ends() -> None:
    pulse = Pulse(timeout_s=0.001)
    pulse.progress("computing step 1", Activity.COMPUTING)
    compute(0.15)
    assert not pulse.is_working()


def test_a_rank_that_may_only_wait_for_others_in_its_work_is_trusted_for_less_long() -> None:
    """Inside a sum over ranks, one that waits uses the CPU as one that works does."""
    pulse = Pulse(timeout_s=0.02)
    for activity, is_trusted in ((Activity.COMPUTING, True), (Activity.TOGETHER, False)):
        pulse.progress("computing step 1", activity)
        compute(0.15)
        assert pulse.is_working() is is_trusted


def test_the_longest_step_is_known() -> None:
    pulse = Pulse(timeout_s=30)
    for activity, seconds in ((Activity.OTHER, 0.2), (Activity.COMPUTING, 0.05), (Activity.WAITING, 0.2)):
        pulse.progress("step 0", activity)
        time.sleep(seconds)
    pulse.progress("computing step 1", Activity.COMPUTING)
    assert 0.05 <= pulse.longest_s < 0.2


def test_quick_steps_have_sizes_that_nothing_measured_changes() -> None:
    sizes = []
    pace = PrefillPace(deadline_s=30)
    for took_s in (0.01, 0.2, 0.03, 0.1, 1.0, 1.0):
        sizes.append(pace.limit(2048))
        pace.note(sizes[-1], took_s)
    assert sizes == [4, 16, 64, 256, 1024, 2048]


def test_slow_steps_stay_well_under_the_deadline() -> None:
    pace, token_s = PrefillPace(deadline_s=30), 0.1
    for _ in range(6):
        size = pace.limit(2048)
        pace.note(size, size * token_s)
        assert size * token_s <= 7.5
    assert size == 75
    for _ in range(3):  # another program takes the machine
        size = pace.limit(2048)
        pace.note(size, size * 0.5)
    assert size == 15
    for _ in range(5):  # and gives it back
        size = pace.limit(2048)
        pace.note(size, size * 0.001)
    assert size == 2048


def test_a_machine_that_was_slow_for_once_is_fast_again() -> None:
    pace = PrefillPace(deadline_s=30)
    for num_tokens in (4, 16, 64, 256, 1024):
        pace.note(num_tokens, 0.001 * num_tokens)
    pace.note(1024, 200.0)
    for expected in (38, 2048):
        assert pace.limit(2048) == expected
        pace.note(expected, 0.001 * expected)


def test_a_short_step_says_little() -> None:
    pace = PrefillPace(deadline_s=30)
    for num_tokens in (4, 16, 64, 256, 1024, 2048):
        pace.note(num_tokens, 0.001 * num_tokens)
    pace.note(1, 0.05)  # the end of a prompt: all of it is overhead
    assert pace.limit(2048) == 2048


def test_without_a_deadline_steps_are_as_long_as_wanted() -> None:
    assert PrefillPace(None).limit(2048) == 2048
