from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hippo_mpi.errors import PlanError
from hippo_mpi.planning.costs import CacheCost, ModelInfo
from hippo_mpi.planning.layer_split import Machine, plan_split
from hippo_mpi.planning.model_costs import model_info
from hippo_mpi.sharding.slot_caches import KVSettings
from tests.local_ring import open_folder
from tests.parity import tiny_models
from tests.parity.tiny_models import make_checkpoint

GIB = 1 << 30


def info(work: list[float], head: float = 0.0, forbidden: dict[int, str] | None = None, size: int = 1000) -> ModelInfo:
    num = len(work)
    return ModelInfo(
        num, [size] * num, work, [0.0] * num, size, head, [CacheCost(0, 10)] * num, forbidden or {}, 4096, True, 100
    )


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(1, 9), min_size=3, max_size=8),
    st.floats(0, 20),
    st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=1, max_size=3),
)
def test_split_is_the_best_one(work: list[float], head: float, speeds: list[float]) -> None:
    """Against all possible splits: none has a faster slowest stage."""
    machines = [Machine(f"m{i}", GIB, speed) for i, speed in enumerate(speeds)]
    found = plan_split(info(work, head), machines)
    assert sum(found.counts) == len(work)
    assert min(found.counts) > 0

    def slowest(bounds: tuple[int, ...]) -> float:
        edges = [0, *bounds, len(work)]
        parts = [sum(work[a:b]) for a, b in itertools.pairwise(edges)]
        parts[0] += head
        return max(part / speed for part, speed in zip(parts, speeds, strict=True))

    best = min(slowest(cuts) for cuts in itertools.combinations(range(1, len(work)), len(speeds) - 1))
    assert max(stage.work for stage in found.stages) == pytest.approx(best)


def test_memory_moves_layers() -> None:
    small = Machine("small", (256 << 20) + 1000 + 2000 + 2 * 40960 + 500)
    found = plan_split(info([1.0] * 8), [small, Machine("large", GIB)])
    assert found.counts == [2, 6]
    assert found.fits


def test_forbidden_cuts_are_avoided() -> None:
    found = plan_split(
        info([1.0] * 8, forbidden={3: "why", 4: "why", 5: "why"}), [Machine("a", GIB), Machine("b", GIB)]
    )
    assert found.counts[0] in (2, 6)


def test_context_shrinks_until_it_fits() -> None:
    machine = Machine("m", (256 << 20) + 9000 + 8 * 10 * 2048)
    assert plan_split(info([1.0] * 8), [machine]).max_context == 2048
    with pytest.raises(PlanError, match="doesn't fit"):
        plan_split(info([1.0] * 8), [machine], max_context=4096)


@pytest.mark.parametrize(
    ("split", "complaint"),
    [
        ((4, 3), "covers 7 layers but the model has 8; try --layer-split 4,4"),
        ((8, 0), "leaves a rank without layers"),
        ((4, 2, 2), "is for 3 ranks, but there are 2"),
        ((3, 5), "can't be cut .because.; it can be cut before 1, 2, 4, 5, 6, 7"),
    ],
)
def test_impossible_layer_split(split: tuple[int, ...], complaint: str) -> None:
    machines = [Machine("a", GIB), Machine("b", GIB)]
    with pytest.raises(PlanError, match=complaint):
        plan_split(info([1.0] * 8, forbidden={3: "because"}), machines, layer_split=split)


def test_more_ranks_than_stages() -> None:
    machines = [Machine(f"m{i}", GIB) for i in range(4)]
    with pytest.raises(PlanError, match="4 ranks, but the model has 3 layers"):
        plan_split(info([1.0] * 3), machines)
    with pytest.raises(PlanError, match="can be cut into 2 stages at most"):
        plan_split(info([1.0] * 3, forbidden={1: "why"}), machines[:3])


def test_caches_count_for_the_layers_that_have_them(tmp_path: Path) -> None:
    """nemotron_h has caches for some of its layers only: mamba and attention, not experts."""
    checkpoint = open_folder(make_checkpoint("nemotron_h", tmp_path))
    kinds = tiny_models.config_of("nemotron_h")["hybrid_override_pattern"]
    caches = model_info(checkpoint, KVSettings()).caches
    for kind, cache in zip(kinds, caches, strict=True):
        assert (cache.fixed > 0) == (kind == "M")
        assert (cache.per_token > 0) == (kind == "*")


def test_room_for_caches() -> None:
    """Half of what is left, on the rank with the least; what sequences take at once comes off first."""
    found = plan_split(replace(info([1.0] * 4), caches=[CacheCost(1000, 10)] * 4), [Machine("m", GIB)] * 2, 512)
    stage = found.stages[0]
    room = (stage.margin_bytes + stage.cache_bytes) // 2
    assert found.cache_room(8) == (8, (room - 8 * 2000) // 20)
    assert found.sequence_bytes(1) == found.sequence_bytes(256) == 2 * (1000 + 256 * 10)
    large = replace(found, info=replace(found.info, caches=[CacheCost(room // 6, 0)] * 4))
    assert large.cache_room(8) == (3, None)


def test_a_draft_model_counts_with_what_it_computes() -> None:
    """On rank 0, three times for a step: the same work as six layers of the model."""
    machines = [Machine("a", GIB), Machine("b", GIB)]
    drafted = info([1.0] * 10).with_draft(info([0.5] * 3, head=0.5), 3)
    assert plan_split(info([1.0] * 10), machines).counts == [5, 5]
    assert plan_split(drafted, machines).counts == [2, 8]


def test_what_every_rank_holds_is_counted_on_each() -> None:
    model = replace(info([1.0] * 8), shared_bytes=500)
    stages = plan_split(model, [Machine("a", 1 << 40)] * 2).stages
    assert [stage.weight_bytes - 1000 * (stage.stop - stage.start) for stage in stages] == [1000, 500]
