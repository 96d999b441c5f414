"""Whether the layers are where the machines are fast: plans for prompts too, and what the ranks' work says of a split."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hippo_mpi.errors import ModelError
from hippo_mpi.planning.layer_split import LayerSplit, Machine, plan_split
from hippo_mpi.planning.machine import measured_speeds
from hippo_mpi.serving.supervision import rebalancing
from hippo_mpi.serving.supervision.balance import BetterSplit, WorkWindow, better_split, may_be_better
from hippo_mpi.serving.supervision.request_broker import RequestBroker
from tests.unit import fake_link
from tests.unit.fake_link import numbers_of, ready_ranks, run
from tests.unit.test_front import ask, lose
from tests.unit.test_layer_split import GIB, info

SPEEDS = st.lists(st.floats(0.2, 1.0), min_size=2, max_size=4)


def worked(split: LayerSplit, speeds: list[float]) -> list[float]:
    """Seconds that the ranks of a split would work, if these were their real speeds."""
    return [100 * stage.work * stage.machine.speed / speed for stage, speed in zip(split.stages, speeds, strict=True)]


@settings(max_examples=60, deadline=None)
@given(SPEEDS, st.floats(0, 8))
def test_a_split_follows_the_work_that_was_seen(speeds: list[float], head: float) -> None:
    """Machines that were taken for equally fast: a few minutes later the slowest rank is about as fast as can be."""
    costs = info([1.0] * 32, head)
    split = plan_split(costs, [Machine(f"m{i}", GIB) for i in range(len(speeds))], 4096)
    for _ in range(4):
        better = better_split(split, worked(split, speeds))
        if better is None:
            break
        assert better.gain >= 0.1
        split = plan_split(costs, [stage.machine for stage in split.stages], 4096, better.counts)
    best = plan_split(costs, [Machine(f"m{i}", GIB, speed) for i, speed in enumerate(speeds)], 4096)
    assert better is None
    assert max(worked(split, speeds)) <= max(worked(best, speeds)) / 0.89


def test_what_is_even_stays() -> None:
    split = plan_split(info([1.0] * 12), [Machine("a", GIB), Machine("b", GIB)], 4096)
    assert better_split(split, [60.0, 57.0]) is None
    assert better_split(split, [60.0, 0.0]) is None, "a rank that has said nothing"
    assert better_split(split, [60.0, 30.0]).counts == [4, 8]  # type: ignore[union-attr]


def test_a_window_is_a_minute_of_work() -> None:
    window = WorkWindow()
    assert window.note(1, [0.0, 0.0]) is None
    assert window.note(1, [59.0, 20.0]) is None
    assert window.note(1, [61.0, 20.5]) == [61.0, 20.5]
    assert window.note(1, [120.0, 40.0]) is None
    assert window.note(2, [90.0, 90.0]) is None, "other ranks, whose sums began anew"
    assert window.note(2, [90.0, 150.0]) == [0.0, 60.0]


def test_prompts_count_beside_answers() -> None:
    """The head reads no prompt: who has it gets more layers than by its bytes alone; slow arithmetic costs layers."""
    costs = info([1.0] * 12, head=6.0)
    machines = [Machine("a", GIB, flops_per_byte=5.0), Machine("b", GIB, flops_per_byte=5.0)]
    assert plan_split(costs, machines).counts == [3, 9]
    counted = replace(costs, layer_flops=[1.0] * 12)
    assert plan_split(counted, machines).counts == [4, 8]
    slow = [machines[0], replace(machines[1], flops_per_byte=1.0)]
    assert plan_split(counted, slow).counts[1] < 8


def test_speeds_are_measured() -> None:
    found = measured_speeds()
    assert 1e8 < found.bytes_per_s < 1e13 and 1e8 < found.flops_per_s < 1e15


def test_a_split_is_taken_between_requests() -> None:
    """Running answers end first, those that come meanwhile are answered after it; a split that doesn't load is dropped."""

    async def work() -> None:
        front = RequestBroker(10, "m")
        ranks = await ready_ranks(front)
        begun = ask(front)
        front.take_split([4, 8])
        late = ask(front)
        assert not front.take_turn() and ranks.added == numbers_of([begun]) and front.layer_splits == {}
        await ranks.say(fake_link.output(0, 7, "", "stop"))
        assert front.turn_is_over.is_set() and front.take_turn()
        assert front.model == "m" and front.layer_splits == {"m": [4, 8]} and ranks.is_closed
        await ranks.end()
        ranks = await ready_ranks(front)
        assert ranks.added == numbers_of([late]) and not front.turn_is_over.is_set()
        await ranks.end()
        lose(front)
        assert front.layer_splits == {"m": [4, 8]}, "they had loaded it"
        front.lose_ranks("killed while loading", 3)
        assert front.layer_splits == {}

    run(work())


def test_a_model_that_cannot_be_planned_any_more_ends_no_server(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its folder has gone; once it is back the better split is told, and once only."""
    monkeypatch.setattr(rebalancing, "_LOOK_S", 0.01)
    caplog.set_level("INFO")
    plans: list[BetterSplit | None] = [None, BetterSplit([4, 8], 0.3)]
    taken: list[list[int]] = []

    def plan(*_: object) -> BetterSplit | None:
        if len(plans) > 1 and plans.pop(0) is None:
            raise ModelError("no such model folder")
        return plans[-1]

    async def beside(planned: Callable[[], BetterSplit | None]) -> BetterSplit | None:
        return planned()

    parts = [SimpleNamespace(layers=(0, 6)), SimpleNamespace(layers=(6, 12))]
    broker = SimpleNamespace(
        model="m", num_starts=1, is_ready=True, take_split=taken.append, beat=SimpleNamespace(ranks=[]),
        about=SimpleNamespace(ranks=parts, machines=[], max_context=4096),
    )  # fmt: skip
    catalogue = SimpleNamespace(find=lambda name: SimpleNamespace(name=name, better_split=plan), beside=beside)

    async def work() -> None:
        watch = asyncio.ensure_future(rebalancing.watch_balance(cast(Any, broker), cast(Any, catalogue), is_taken=True))
        for minute in range(5):
            broker.beat.ranks = [SimpleNamespace(busy_s=61.0 * minute), SimpleNamespace(busy_s=20.0 * minute)]
            await asyncio.sleep(0.2)
            assert not watch.done()
        watch.cancel()

    run(work())
    assert "can't be planned: no such model folder" in caplog.text
    assert taken == [[4, 8]]
    assert not may_be_better([60.0, 55.0, 56.0]) and may_be_better([60.0, 20.0])


def test_a_layout_that_does_not_load_is_not_tried_again() -> None:
    async def work() -> None:
        front = RequestBroker(10, "m")
        ranks = fake_link.FakeRanks(front)
        await ranks.say(fake_link.ready("mlp only"))
        await ranks.end()
        lose(front)
        assert front.about is not None and front.about.layout == "mlp only"
        front.lose_ranks("too little memory", 3)
        assert front.about.layout is None and front.about.max_context == fake_link.MAX_CONTEXT

    run(work())
