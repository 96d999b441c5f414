"""Ranks, replicas, stages and shards."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hippo_mpi.errors import LaunchError
from hippo_mpi.transport.layout import Layout, Place

COUNTS = st.integers(1, 5)


@given(COUNTS, COUNTS, COUNTS)
def test_every_rank_has_a_place_of_its_own(stages: int, replicas: int, shards: int) -> None:
    layout = Layout(stages, replicas, shards)
    layout.check(layout.num_ranks)
    places = [layout.place(rank) for rank in range(layout.num_ranks)]
    assert sorted({(p.replica, p.stage, p.shard) for p in places}) == [(p.replica, p.stage, p.shard) for p in places]
    for rank, place in enumerate(places):
        before, behind = layout.neighbours(rank)
        assert places[behind] == Place(place.replica, (place.stage + 1) % stages, place.shard)
        assert layout.neighbours(behind)[0] == layout.neighbours(before)[1] == rank


def test_the_error_has_the_equation() -> None:
    with pytest.raises(LaunchError, match=r"^replicas 2 x stages 3 x shards 1 = 6 ranks, but there are 4$"):
        Layout(3, replicas=2).check(4)
