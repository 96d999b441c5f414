"""hippo_mpi.plan: what each rank would hold, for launched ranks and for machines that aren't here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import ranks

PLAN = str(ranks.BIN / "hippo_mpi.plan")
GENERATE = str(ranks.BIN / "hippo_mpi.generate")


@pytest.mark.slow
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


@pytest.mark.slow
def test_simulation_of_launched_ranks(tmp_path: Path) -> None:
    """Each rank times its own stage; the same times then tell of other links."""
    options = ["--simulate", "--json", "--prompt-tokens", "200", "--concurrent", "1,3"]
    with ranks.ring([[PLAN, *options]] * 2) as running:
        assert [rank.wait() for rank in running] == [0, 0], running[0].err
        found = json.loads(running[0].out)
    assert len(found["times"]) == 2
    assert [len(stage["chunks"]) for stage in found["times"]] == [4, 4]  # of 64 tokens and less
    assert set(found["times"][1]["steps"]) == {"1", "2", "3"}  # micro-batches of 3 requests, and all 3 on one machine
    assert found["times"][0]["steps"]["2"]["num_bytes"] == 2 * 128 * 2  # two rows of 128 numbers in bfloat16
    times = tmp_path / "times.json"
    times.write_text(json.dumps(found))
    rates = []
    for link in ("10us,10GB/s", "1s,10GB/s"):
        command = [PLAN, *options, "--stage-times", str(times), "--link", link]
        with ranks.single([*command, "--machine", "a:8", "--machine", "b:8"]) as again:
            assert again.wait() == 0, again.err
            rates.append(json.loads(again.out)["pipeline"]["decode_tps"]["1"])
    assert rates[0] > 10 * rates[1]
    assert 0.4 < rates[1] < 0.5  # two hops of a second, and the stages


@pytest.mark.slow
def test_simulation_as_a_table() -> None:
    with ranks.single([PLAN, "--simulate", "--machine", "a:8", "--machine", "b:8:2", "--link", "wifi"]) as running:
        assert running.wait() == 0, running.err
        lines = running.out.splitlines()
    assert "link: 3,000 us, 62 MB/s" in lines[-6]
    assert lines[-5].split() == ["predicted", "one", "machine", "2", "ranks", "ratio"]
    assert lines[-1].startswith("generation, 16 at once")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--link", "string"], "'string' is neither thunderbolt4, thunderbolt5, 10gbe, wifi nor LATENCY,BANDWIDTH"),
        (["--link", "0us,1GB/s"], "is neither"),
        (["--json"], "--json prints what a simulation found: add --simulate"),
        (["--simulate", "--concurrent", "0"], "is not a list of numbers of requests such as 1,4,16"),
        (["--simulate", "--stage-times", "nowhere.json"], "--stage-times nowhere.json can't be read: No such file"),
        (["--simulate", "--stage-times", str(Path(__file__))], "is no output of hippo_mpi.plan --simulate --json"),
    ],
)
def test_bad_simulations(options: list[str], line: str) -> None:
    """Every rank finds it, and rank 0 says it."""
    with ranks.ring([[PLAN, *options]] * 2) as running:
        assert [rank.wait() for rank in running] == [2, 2]
    assert line in running[0].err
    assert running[0].err.count("error:") == 1 and "rank 1" not in running[0].err


def test_what_every_rank_finds_is_said_by_rank_0(tmp_path: Path) -> None:
    """Even if it is the last one to find it."""
    slow = tmp_path / "slow.py"
    slow.write_text(
        "import time\nfrom hippo_mpi import plan\nfound = plan.plan\n"
        "plan.plan = lambda session: (time.sleep(0.2), found(session))[1]\nplan.main()\n"
    )
    with ranks.ring([[str(ranks.BIN / "python"), str(slow), "--json"], [PLAN, "--json"]]) as running:
        assert [rank.wait() for rank in running] == [2, 2]
    assert running[0].err == "error: --json prints what a simulation found: add --simulate\n"
