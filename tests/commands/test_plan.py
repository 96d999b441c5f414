"""hippo_mpi.plan: what each rank would hold, for launched ranks and for machines that aren't here."""

from __future__ import annotations

from tests import ranks

PLAN = str(ranks.BIN / "hippo_mpi.plan")
GENERATE = str(ranks.BIN / "hippo_mpi.generate")


def test_plan_of_launched_ranks_is_that_of_generate() -> None:
    shown = []
    for command in ([PLAN], [GENERATE, "--show-plan"]):
        with ranks.ring([command] * 2) as running:
            assert [rank.wait() for rank in running] == [0, 0], running[0].err
            assert not running[1].out
            # Memory that is free differs from moment to moment.
            shown.append([line.split()[:4] for line in running[0].out.splitlines()])
    assert shown[0] == shown[1]
    assert shown[0][0][:2] == ["12", "layers,"]


def test_plan_for_other_machines() -> None:
    command = [PLAN, "--machine", "slow:8:0.5", "--machine", "fast:16:2"]
    with ranks.single(command) as running:
        assert running.wait() == 0, running.err
        slow, fast = running.out.splitlines()[2:4]
    assert "slow" in slow and "8.00 GiB" in slow
    assert "fast" in fast and "16.00 GiB" in fast
    layers = [tuple(map(int, line.split()[2].replace("+head", "").split("-"))) for line in (slow, fast)]
    assert layers[0][0] == 0
    assert layers[1][1] == 11
    assert layers[0][1] - layers[0][0] < layers[1][1] - layers[1][0]


def test_plan_that_does_not_fit_says_what_is_missing() -> None:
    with ranks.single([PLAN, "--machine", "a:0.1", "--machine", "b:0.1"]) as running:
        assert running.wait() == 2
    assert "MiB are missing" in running.err
    assert "more ranks, a quantised model or a shorter --max-context" in running.err


def test_bad_machine() -> None:
    with ranks.single([PLAN, "--machine", "mini"]) as running:
        assert running.wait() == 2
    assert "'mini' is not NAME:GIBIBYTES[:SPEED]" in running.err
