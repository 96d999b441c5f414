"""Predictions from given times: what can be worked out by hand."""

from __future__ import annotations

import json
from dataclasses import asdict

import msgspec
import pytest

from hippo_mpi.config.links import Link
from hippo_mpi.measure.prediction import MeasuredStage, StageTimes, StepTime, Workload, one_machine, predict
from hippo_mpi.measure.simulation_report import prediction_table

NO_LINK = Link(0.0, float("inf"))
STEPS = {1: StepTime(0.01, 1000, 0.0), 2: StepTime(0.01, 2000, 0.0), 4: StepTime(0.01, 4000, 0.0)}
STAGE = StageTimes([StepTime(0.1, 100_000)] * 8, STEPS)


def workload(*concurrent: int, can_batch: bool = True) -> Workload:
    return Workload(800, 100, concurrent, can_batch)


def test_two_equal_stages_without_a_link() -> None:
    found = predict([STAGE, STAGE], NO_LINK, workload(1, 2, 4))
    assert found.first_token_s == pytest.approx(
        9 * 0.1 + 0.01
    )  # rank 1 is a chunk behind, and reads the last token when it is through
    assert found.decode_tps[1] == pytest.approx(1 / 0.02)  # one after the other
    assert found.decode_tps[2] == pytest.approx(2 / 0.02, rel=0.03)  # both at once
    assert found.decode_tps[4] == pytest.approx(4 / 0.02, rel=0.03)


def test_one_machine_takes_all_rows_at_once() -> None:
    found = predict([one_machine([STAGE, STAGE])], NO_LINK, workload(1, 4))
    assert found.first_token_s == pytest.approx(8 * 0.2 + 0.02)
    assert found.decode_tps[4] == pytest.approx(4 / 0.02)


def test_what_a_link_costs() -> None:
    """For one request, two hops a token; for two, rank 0 sends the next step when the oldest is back."""
    found = predict([STAGE, STAGE], Link(0.005, 1e6), workload(1, 2))
    hop_s = 0.005 + 1000 / 1e6
    assert found.decode_tps[1] == pytest.approx(1 / (0.02 + 2 * hop_s))
    assert found.decode_tps[2] == pytest.approx(1 / (0.01 + 2 * hop_s), rel=0.03)
    slow = predict(
        [STAGE, STAGE], Link(0.0, 1e5), workload(1)
    )  # a chunk takes a second: the link is what is waited for
    assert slow.first_token_s == pytest.approx(0.1 + 8 * 1.0 + 0.01 + 0.01 + 2 * 0.01, rel=0.02)


def test_rows_that_take_turns() -> None:
    found = predict([STAGE, STAGE], NO_LINK, workload(4, can_batch=False))
    assert found.decode_tps[4] == pytest.approx(1 / 0.01, rel=0.03)
    assert Workload(8, 8, (4,), False).batch_sizes(2) == [1]


def measured(factor: float = 2.0) -> MeasuredStage:
    return MeasuredStage(STAGE, STAGE.at_speed(factor), STAGE.at_speed(1 / factor))


def test_times_survive_json() -> None:
    stage = measured()
    assert msgspec.convert(json.loads(json.dumps(asdict(stage))), MeasuredStage, strict=False) == stage
    assert stage.at_speed(2).fastest.steps[1] == StepTime(0.0025, 1000, 0.0)


def test_the_spread_of_the_times_is_shown() -> None:
    """Of times that were half as long once and twice as long once, for one machine and over every link."""
    links = [Link(0.0, 1e9, "cable"), Link(1.0, 1e9, "moon")]
    lines = prediction_table([measured(), measured()], links, workload(1)).splitlines()
    assert lines[:2] == ["2 ranks over cable: 0 us, 1,000 MB/s", "2 ranks over moon: 1,000,000 us, 1,000 MB/s"]
    assert [line.split() for line in lines[-3:]] == [
        ["generation,", "1", "at", "once", "one", "machine", "50.0", "25.0..100.0"],
        ["cable", "50.0", "25.0..100.0", "1.00"],
        ["moon", "0.50", "0.49..0.50", "0.01"],
    ]
    assert "1 rank over cable" in prediction_table([measured()], links, workload(1))
