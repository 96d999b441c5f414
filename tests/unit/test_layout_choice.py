"""What is predicted for ways to share a model, against sums made by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hippo_mpi.config.links import Link
from hippo_mpi.planning.layer_times import SHAPES, KindTimes, RankTimes
from hippo_mpi.planning.layout_choice import (
    ALONE,
    LOADS,
    PIPELINE,
    TENSOR,
    Comparison,
    LinkTimes,
    ModelSizes,
    Prediction,
    Way,
    best,
    link_times,
    reason,
    shapes_of,
    table,
)

MS = 1e-3
WHOLE = tuple(seconds * MS for seconds in (4, 4.4, 5, 6, 8, 100))  # by place in SHAPES
SPLIT, ATTENTION, MLP = (tuple(share * seconds for seconds in WHOLE) for share in (0.5, 0.8, 0.7))
PARTS = {"self_attn.o_proj": ATTENTION, "mlp.down_proj": MLP}
HEAD, HEAD_PART = (6 * MS,) * len(SHAPES), (3 * MS,) * len(SHAPES)
SIZES = ModelSizes(hidden=1024, vocab=32768, value_bytes=4, num_shared=1)
NUM_LAYERS = 10


def compared(
    link: LinkTimes,
    num_ranks: int = 2,
    counts: list[int] | None = None,
    is_exact: bool = False,
    stages: dict[int, list[int]] | None = None,
) -> Comparison:
    exchanges = dict.fromkeys(PARTS, (SIZES.hidden,) * (2 if is_exact else 1))
    rank = RankTimes((KindTimes(tuple(range(NUM_LAYERS)), WHOLE, SPLIT, PARTS, exchanges),), HEAD, HEAD_PART)
    return Comparison([rank] * num_ranks, {num_ranks: counts or [5, 5], **(stages or {})}, True, SIZES, link)


def free(seconds: float = 0.0) -> LinkTimes:
    return LinkTimes(((1 << 10, seconds),), ((4 << 10, seconds),))


def rates(comparison: Comparison) -> dict[str, dict[str, float]]:
    return {one.name: dict(one.tokens_per_s) for one in comparison.predictions()}


def test_without_a_link_each_way_takes_what_its_parts_take() -> None:
    found = rates(compared(free()))
    assert found[ALONE]["one"] == pytest.approx(1 / (NUM_LAYERS * 4 * MS + 6 * MS))
    assert found[PIPELINE]["one"] == pytest.approx(found[ALONE]["one"])  # the ranks work one after the other
    assert found[TENSOR]["one"] == pytest.approx(1 / (NUM_LAYERS * 2 * MS + 3 * MS))
    assert found["mlp only, head whole"]["one"] == pytest.approx(1 / (NUM_LAYERS * 2.8 * MS + 6 * MS))
    assert found[PIPELINE]["many"] == pytest.approx(16 / (2 * (5 * 6 * MS + 6 * MS)))  # 8 rows at a time
    three_ranks = rates(compared(free(), 3, [4, 3, 3]))
    between_4_and_8 = (5 + (16 / 3 - 4) / 4) * MS
    assert three_ranks[PIPELINE]["many"] == pytest.approx(16 / (3 * (4 * between_4_and_8 + 6 * MS)))
    assert found[TENSOR]["prompts"] == pytest.approx(256 / (NUM_LAYERS * 50 * MS))


def test_each_sum_costs_what_the_link_says() -> None:
    quick, slow = (rates(compared(free(seconds))) for seconds in (0.0, 1 * MS))
    sums = 2 * NUM_LAYERS + 1 + 1  # of both blocks, of what rank 0 shares, and of the logits
    assert 1 / slow[TENSOR]["one"] - 1 / quick[TENSOR]["one"] == pytest.approx(sums * MS)
    assert 1 / slow[PIPELINE]["one"] - 1 / quick[PIPELINE]["one"] == pytest.approx(2 * MS)
    exact = rates(compared(free(1 * MS), is_exact=True))
    assert 1 / exact[TENSOR]["one"] - 1 / slow[TENSOR]["one"] == pytest.approx(2 * NUM_LAYERS * MS)


def test_sums_that_were_timed_with_the_layers_are_not_counted_twice() -> None:
    timed = replace(compared(free(1 * MS)), include_sums=True)
    shared_s = 1 * MS
    assert rates(timed)[TENSOR]["one"] == pytest.approx(1 / (NUM_LAYERS * 2 * MS + 3 * MS + shared_s))


def test_stages_of_ranks() -> None:
    """Four ranks: a part of a layer takes half as long as the whole one, as if a third of it couldn't be split."""
    shares = {"num_ranks": 4, "counts": [3, 3, 2, 2], "stages": {2: [6, 4]}}
    layer_s = (4 - 2 * (1 / 2) / (3 / 4)) * MS
    quick, slow = (rates(compared(free(seconds), **shares))["tensor, 2 stages"] for seconds in (0.0, 1 * MS))
    assert quick["one"] == pytest.approx(1 / (NUM_LAYERS * layer_s + 6 * MS))
    messages = 2 * NUM_LAYERS * 2 + 2 * 3  # there and back for each sum; what arrives in a stage is shared by one, too
    assert 1 / slow["one"] - 1 / quick["one"] == pytest.approx(messages * MS)
    timed = replace(compared(free(1 * MS), **shares), include_sums=True)
    assert 1 / slow["one"] - 1 / rates(timed)["tensor, 2 stages"]["one"] == pytest.approx(
        2 * NUM_LAYERS * (1 / 2) / (3 / 4) * MS
    )


@pytest.mark.parametrize(
    ("sum_s", "chosen"),
    # An attention saves 0.4 ms, an MLP 1.6, the head 3.
    [(0.1, TENSOR), (0.8, "mlp only"), (1.6, PIPELINE), (5.0, PIPELINE)],
)
def test_what_costs_more_than_it_saves_is_not_split(sum_s: float, chosen: str) -> None:
    attention, mlp = (tuple(share * seconds for seconds in WHOLE) for share in (0.9, 0.6))
    comparison = compared(LinkTimes(((1 << 10, sum_s * MS),), ((4 << 10, 0.0),)))
    (kind,) = comparison.times[0].kinds
    parts = {"self_attn.o_proj": attention, "mlp.down_proj": mlp}
    times = replace(comparison.times[0], kinds=(replace(kind, parts=parts),))
    assert best(replace(comparison, times=[times] * 2).predictions(), "one").name == chosen


def test_many_requests_fill_a_pipeline_over_a_slow_link() -> None:
    predictions = compared(free(3 * MS)).predictions()
    assert best(predictions, "many").name == PIPELINE
    said = reason(best(predictions, "many"), predictions, "many")
    assert said.startswith("chosen: pipeline, ")
    assert "for 16 at once" in said


def test_one_rank_is_taken_where_it_is_faster() -> None:
    predictions = compared(free(50 * MS)).predictions()
    chosen = best(predictions, "one")
    said = reason(chosen, predictions, "one")
    assert said.startswith("chosen: one rank alone, 21.7 tokens/s predicted for one request; pipeline: 6.85; the other")
    assert table(predictions, chosen).count("*") == 1
    assert "*" not in table(predictions)


def test_one_rank_that_would_be_faster_but_has_no_room_is_named() -> None:
    predictions = compared(free(50 * MS)).predictions({ALONE: "rank 0 has 2 GiB too little memory"})
    chosen = best(predictions, "one")
    assert chosen.name == PIPELINE
    said = reason(chosen, predictions, "one")
    assert "; one rank alone would give 21.7, but rank 0 has 2 GiB too little memory" in said


def test_the_first_is_taken_if_it_is_nearly_as_fast() -> None:
    pipeline, tensor, some, fast = (
        Prediction(Way(name), dict.fromkeys(LOADS, rate))
        for name, rate in ((PIPELINE, 10.0), (TENSOR, 10.4), ("some", 10.6), ("fast", 11.0))
    )
    assert best([pipeline, tensor], "one") is pipeline
    assert best([pipeline, tensor, some], "one") is tensor
    assert best([pipeline, tensor, some, fast], "one") is some


def test_what_cannot_be_taken_is_passed_over() -> None:
    predictions = compared(free()).predictions({TENSOR: "it doesn't fit"})
    assert best(predictions, "one").name == "tensor, head whole"
    assert "it doesn't fit" in table(predictions, best(predictions, "one"))
    tensor = Prediction(Way(TENSOR, ("mlp",)), dict.fromkeys(LOADS, 9.0), "it doesn't fit")
    pipeline = Prediction(Way(PIPELINE), dict.fromkeys(LOADS, 1.0))
    assert best([tensor, pipeline], "one") is pipeline


@given(latency=st.floats(1e-6, 0.1), rate=st.floats(1e6, 1e10), num_ranks=st.integers(2, 8))
def test_a_slower_link_is_never_faster(latency: float, rate: float, num_ranks: int) -> None:
    counts = [1] * (num_ranks - 1) + [NUM_LAYERS - num_ranks + 1]
    here, slower = (
        rates(compared(link_times(Link(latency * factor, rate / factor), num_ranks, 4), num_ranks, counts))
        for factor in (1, 2)
    )
    for name, by_load in here.items():
        assert all(slower[name][load] <= by_load[load] * (1 + 1e-9) for load in LOADS)


def test_another_link_takes_the_place_of_the_measured_one() -> None:
    near = compared(free())
    assert best(near.predictions(), "one").name == TENSOR
    assert best(near.over(Link(0.1, 1e6)).predictions(), "one").name == ALONE


@pytest.mark.parametrize("num_ranks", range(2, 9))
@pytest.mark.parametrize(("load", "rows"), [("one", 1), ("few", 4), ("many", 16)])
def test_what_a_choice_hangs_on_is_timed(load: str, rows: int, num_ranks: int) -> None:
    """The steps of pipelines with a stage for each rank, or for several, have fewer rows, perhaps between two shapes."""
    timed = {SHAPES[place][0] for place in shapes_of(load, num_ranks)}
    assert rows in timed
    for num_stages in (number for number in range(1, num_ranks + 1) if num_ranks % number == 0):
        step = rows / min(rows, num_stages)
        known = [shape[0] for shape in SHAPES if shape[1] == 1]
        assert max(count for count in known if count <= step) in timed
        assert min(count for count in known if count >= step) in timed
