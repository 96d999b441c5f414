"""The wire form of a StepPlan."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hippo_mpi.errors import DesyncError
from hippo_mpi.parallel.step_plan import Returns, StepPlan, decode, encode

INT = st.integers(0, 2**31 - 1)
ROWS = st.lists(st.tuples(INT, INT, INT), max_size=64)
FORKS = st.lists(st.tuples(INT, INT), max_size=9).map(tuple)
SLOTS = st.lists(INT, max_size=9).map(tuple)


@given(st.integers(0, 2**32 - 1), ROWS, st.sampled_from(Returns), FORKS, SLOTS, SLOTS)
def test_decode_inverts_encode(
    serial: int,
    rows: list[tuple[int, int, int]],
    returns: Returns,
    forks: tuple[tuple[int, int], ...],
    parts: tuple[int, ...],
    drops: tuple[int, ...],
) -> None:
    slots, positions, counts = (tuple(row[part] for row in rows) for part in range(3))
    plan = StepPlan(serial, slots, positions, counts, returns, forks, parts, drops)
    assert decode(encode(plan)) == plan


@given(st.binary(max_size=200))
def test_other_bytes_are_an_error(wire: bytes) -> None:
    try:
        plan = decode(wire)
    except DesyncError:
        return
    assert encode(plan) == wire


def test_a_torn_plan_is_an_error() -> None:
    with pytest.raises(DesyncError, match="expected a step, got"):
        decode(encode(StepPlan(1, (1, 2), (3, 4), (1, 1)))[:-1])
