"""hippo_mpi.plan: what each rank would hold, for launched ranks and for machines that aren't here."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from hippo_mpi.config.bundled import BUNDLED_MODEL
from tests import ranks
from tests.parity.tiny_models import make_checkpoint
from tests.unit.test_blueprint import DEEPSEEK_V3

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


def test_plan_of_parts_of_every_layer() -> None:
    """By speed: the bundled model has four heads, of which three are for the machine that is three times as fast."""
    machines = ["--machine", "slow:8", "--machine", "fast:8:3"]
    with ranks.single([PLAN, "--parallel", "tensor", *machines]) as running:
        assert running.wait() == 0, running.err
    head, _, slow, fast = running.out.splitlines()
    assert head.startswith("12 layers, each split over 2 ranks")
    assert [line.split()[2] for line in (slow, fast)] == ["0-11+head", "0-11"]
    assert [line.split()[-1] for line in (slow, fast)] == ["25%", "75%"]


@pytest.mark.slow
def test_layouts_over_links_that_are_not_here() -> None:
    """What is taken is what is best over the first link; of a layout by width, the sizes are those of the parts."""
    machines = ["--machine", "a:8", "--machine", "b:8", "--parallel", "auto"]
    with ranks.single([PLAN, *machines, "--link", "100ms,1MB/s", "--link", "1us,100GB/s"]) as running:
        assert running.wait() == 0, running.err
    slow, quick = (part.splitlines() for part in running.out.split("\nover ")[1:])
    assert slow[0] == "100ms,1MB/s:" and quick[0] == "1us,100GB/s:"
    assert [line[:14] for line in slow if line.endswith("*")] == ["one rank alone"]
    assert running.out.startswith("12 layers, context of")
    assert "chosen: one rank alone, " in running.err
    with ranks.single([PLAN, *machines, "--parallel", "tensor", "--simulate", "--json"]) as running:
        assert running.wait() == 0, running.err
    found = json.loads(running.out)
    names = [one["name"] for one in found["layouts"][0]["predictions"]]
    assert names[:3] == ["pipeline", "one rank alone", "tensor"]
    assert found["layouts"][0]["link"] == "thunderbolt4"  # which was taken, as none was named
    assert found["plan"]["ranks_per_layer"] == 2
    whole, *parts = (rank["layer_bytes"] for rank in found["plan"]["ranks"])
    assert parts == [whole]  # as much on each rank


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--width-split", "1,1"], "--width-split is for --parallel tensor"),
        (["--parallel", "tensor", "--layer-split", "6,6"], "--layer-split is for --parallel pipeline"),
        (["--parallel", "tensor", "--width-split", "1,2,3"], "width split 1,2,3 is for 3 ranks, but there are 2"),
        (["--parallel", "tensor", "--width-split", "0,1"], "width split 0,1 leaves a rank nothing"),
    ],
)
def test_splits_that_can_not_be(options: list[str], why: str) -> None:
    with ranks.single([PLAN, "--machine", "a:8", "--machine", "b:8", *options]) as running:
        assert running.wait() == 2
    assert len(running.err.splitlines()) == 1
    assert why in running.err


def test_plan_that_does_not_fit_says_what_is_missing() -> None:
    with ranks.single([PLAN, "--machine", "a:0.1", "--machine", "b:0.1"]) as running:
        assert running.wait() == 2
    assert "MiB more memory needed" in running.err
    assert "more ranks, a quantised model or a shorter --max-context" in running.err


@pytest.mark.slow
def test_plan_as_json() -> None:
    """Bytes of each part add up to each machine's memory, and to the checkpoint."""
    machines = ["--machine", "a:8", "--machine", "b:16:2"]
    with ranks.single([PLAN, *machines, "--max-context", "1024", "--json"]) as running:
        assert running.wait() == 0, running.err
        found = json.loads(running.out)
    with ranks.single([GENERATE, "--show-plan", "--max-context", "1024", "--json"]) as running:
        assert running.wait() == 0, running.err
        assert json.loads(running.out)["plan"].keys() == found["plan"].keys()
    assert found["model"] == str(BUNDLED_MODEL)
    assert (found["plan"]["max_context"], found["plan"]["assumptions"]) == (1024, [])
    stages = found["plan"]["ranks"]
    assert [stage["machine"] for stage in stages] == [
        {"name": "a", "memory_bytes": 8 << 30, "speed": 1.0, "flops_per_byte": 30.0},
        {"name": "b", "memory_bytes": 16 << 30, "speed": 2.0, "flops_per_byte": 30.0},
    ]
    parts = ("layer_bytes", "head_bytes", "cache_bytes", "working_bytes", "margin_bytes")
    assert [sum(stage[part] for part in parts) for stage in stages] == [8 << 30, 16 << 30]
    weights = mx.load(str(BUNDLED_MODEL / "model.safetensors"))
    assert isinstance(weights, dict)
    assert sum(s["layer_bytes"] + s["head_bytes"] for s in stages) == sum(w.nbytes for w in weights.values())
    assert (stages[0]["layers"][0], stages[0]["layers"][1], stages[1]["layers"][1]) == (0, stages[1]["layers"][0], 12)


@pytest.mark.slow
def test_the_plan_is_shown_where_several_hosts_load(tmp_path: Path) -> None:
    """On stderr, so that stdout has the answer only."""
    as_second_host = ["unshare", "--uts", "sh", "-c", 'hostname second && exec "$@"', "sh"]
    if subprocess.run([*as_second_host, "true"], capture_output=True).returncode != 0:
        pytest.skip("needs root and Linux, for a second host name")
    command = [GENERATE, "--max-tokens", "2"]
    with ranks.ring([command, [*as_second_host, *command]]) as running:
        assert [rank.wait() for rank in running] == [0, 0], running[0].err
    assert len(running[0].out.splitlines()) == 1
    told = running[0].err.splitlines()
    assert told[0].startswith("12 layers, context of ")
    assert [line.split()[:2] for line in told[2:4]] == [["0", socket.gethostname()[:16]], ["1", "second"]]


def config_alone(folder: Path) -> Path:
    (folder / "config.json").write_bytes((BUNDLED_MODEL / "config.json").read_bytes())
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("command", [[PLAN, "--machine", "a:8", "--machine", "b:8"], [GENERATE, "--show-plan"]])
def test_plan_from_a_config_alone(command: list[str], tmp_path: Path) -> None:
    """The same as with the weights, and a line that says what was assumed."""
    shown = []
    for model in (BUNDLED_MODEL, config_alone(tmp_path)):
        with ranks.single([*command, "--model", str(model)]) as running:
            assert running.wait() == 0, running.err
            shown.append(running.out.splitlines())
    assert [line.split()[:5] for line in shown[1][:-1]] == [line.split()[:5] for line in shown[0]]
    assert shown[1][-1] == f"assumed: {tmp_path} has no weights: sizes are taken from config.json"


@pytest.mark.slow
def test_a_giant_is_planned_in_little_memory(tmp_path: Path) -> None:
    """Half of DeepSeek-V3 in 16 bits, from its config: nothing of it may ever be computed."""
    layers = 30
    (tmp_path / "config.json").write_text(json.dumps(DEEPSEEK_V3 | {"num_hidden_layers": layers}))
    told = "import resource, subprocess, sys\nsubprocess.run(sys.argv[1:], check=True)\n"
    told += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr)"
    machines = [option for number in range(4) for option in ("--machine", f"m{number}:512")]
    command = [sys.executable, "-c", told, PLAN, "--model", str(tmp_path), *machines, "--json"]
    with ranks.single(command) as running:
        assert running.wait() == 0, running.err
    stages = json.loads(running.out)["plan"]["ranks"]
    assert [stage["layers"][1] for stage in stages][-1] == layers
    assert 600e9 < sum(stage["layer_bytes"] + stage["head_bytes"] for stage in stages) < 660e9
    assert int(running.err) * (1 if sys.platform == "darwin" else 1024) < 1 << 30


@pytest.mark.slow
def test_a_config_alone_is_enough_for_a_plan_only(tmp_path: Path) -> None:
    for command, line in (
        ([GENERATE], "has no model*.safetensors"),
        ([PLAN, "--simulate"], "has none: give --stage-times"),
    ):
        with ranks.single([*command, "--model", str(config_alone(tmp_path))]) as running:
            assert running.wait() == 2
        assert f"{tmp_path} {line}" in running.err
        assert len(running.err.splitlines()) == 1 and not running.out


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
    typical = [stage["typical"] for stage in found["times"]]
    assert [len(stage["chunks"]) for stage in typical] == [4, 4]  # of 64 tokens and less
    assert set(typical[1]["steps"]) == {"1", "2", "3"}  # micro-batches of 3 requests, and all 3 on one machine
    assert typical[0]["steps"]["2"]["num_bytes"] == 2 * 128 * 2  # two rows of 128 numbers in bfloat16
    for stage in found["times"]:
        trio = [stage[which]["steps"]["1"]["forward_s"] for which in ("fastest", "typical", "slowest")]
        assert trio == sorted(trio) and trio[0] < trio[2]
    times = tmp_path / "times.json"
    times.write_text(json.dumps(found))
    command = [PLAN, *options, "--stage-times", str(times)]
    with ranks.single([*command, "--link", "10us,10GB/s", "--link", "1s,10GB/s"]) as again:  # on the same machines
        assert again.wait() == 0, again.err
        told = json.loads(again.out)
    assert told["plan"]["ranks"] == found["plan"]["ranks"]
    rates = [link["pipeline"]["typical"]["decode_tps"]["1"] for link in told["links"]]
    assert rates[0] > 10 * rates[1]
    assert 0.4 < rates[1] < 0.5  # two hops of a second, and the stages
    with ranks.single([*command, "--layer-split", "3,9"]) as other:
        assert other.wait() == 2
    assert f"--stage-times {times} was measured for 6, 6 layers, but this plan has 3, 9" in other.err


@pytest.mark.slow
def test_simulation_as_a_table() -> None:
    machines = ["--machine", "a:8", "--machine", "b:8:2"]
    with ranks.single([PLAN, "--simulate", *machines, "--link", "wifi", "--link", "thunderbolt4"]) as running:
        assert running.wait() == 0, running.err
        lines = running.out.splitlines()
    assert "2 ranks over wifi: 3,000 us, 62 MB/s" in lines
    assert "2 ranks over thunderbolt4: 300 us, 2,000 MB/s" in lines
    assert [line[27:41].strip() for line in lines[-6:]] == ["one machine", "wifi", "thunderbolt4"] * 2
    assert lines[-3].startswith("generation, 16 at once")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--link", "string"], "'string' is neither thunderbolt4, thunderbolt5, 10gbe, wifi nor LATENCY,BANDWIDTH"),
        (["--link", "0us,1GB/s"], "is neither"),
        (["--link", "wifi"], "--link and --stage-times need --simulate"),
        (["--simulate", "--concurrent", "0"], "is not a list of numbers of requests such as 1,4,16"),
        (["--simulate", "--stage-times", "nowhere.json"], "--stage-times nowhere.json can't be read: No such file"),
        (["--simulate", "--stage-times", str(Path(__file__))], "is not output of hippo_mpi.plan --simulate --json"),
    ],
)
def test_bad_simulations(options: list[str], line: str) -> None:
    """Every rank finds it, and rank 0 says it."""
    with ranks.ring([[PLAN, *options]] * 2) as running:
        assert [rank.wait() for rank in running] == [2, 2]
    assert line in running[0].err
    assert running[0].err.count("error:") == 1 and "rank 1" not in running[0].err


@pytest.mark.slow
def test_what_every_rank_finds_is_said_by_rank_0(tmp_path: Path) -> None:
    """Even if it is the last one to find it."""
    slow = tmp_path / "slow.py"
    slow.write_text(
        "import time\nfrom hippo_mpi import plan\nfound = plan.plan\n"
        "plan.plan = lambda session: (time.sleep(0.2), found(session))[1]\nplan.main()\n"
    )
    options = ["--simulate", "--model", str(make_checkpoint("nanbeige-loops", tmp_path / "model"))]
    with ranks.ring([[str(ranks.BIN / "python"), str(slow), *options], [PLAN, *options]]) as running:
        assert [rank.wait() for rank in running] == [2, 2]
    assert running[0].err.startswith("error: --simulate can't time the stages of this model one by one")
    assert len(running[0].err.splitlines()) == 1
