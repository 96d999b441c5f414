"""hippo_mpi.benchmark and what it writes; its figures themselves are nobody's promise here."""

from __future__ import annotations

import json
import sys
from datetime import date, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from hippo_mpi.measure.benchmark_report import headline
from tests import ranks
from tests.parity.tiny_models import make_checkpoint
from tests.tiny_tokenizer import save_tokenizer

BENCHMARK = str(ranks.BIN / "hippo_mpi.benchmark")
SMALL = ["--trials", "2", "--concurrent", "1,3", "--prompt-tokens", "20", "--generation-tokens", "6"]


def run(*options: str, num_ranks: int = 2) -> str:
    with ranks.ring([[BENCHMARK, *SMALL, *options]] * num_ranks) as running:
        assert [rank.wait() for rank in running] == [0] * num_ranks, running[0].err
        return running[0].out


@pytest.mark.slow
def test_all_modes(tmp_path: Path) -> None:
    picture, trace = tmp_path / "rates.png", tmp_path / "trace.json"
    out = run("--json", "--compare", "mlx-lm", "--plot", str(picture), "--trace", str(trace))
    found: dict[str, Any] = json.loads(out)
    first, second = headline(found)
    assert first == "story-3m, 2 ranks over ring"
    assert second == (
        f"prompts of 20 tokens, 6 generated; medians of 2 trials; {found['date']}, hippo-mpi {version('hippo-mpi')}"
    )
    assert abs(date.fromisoformat(found["date"]) - date.today()) <= timedelta(days=1)
    modes = ["standalone", "pipeline", "replicas", "mlx-lm"]
    assert {(r["mode"], r["concurrent"]) for r in found["results"]} == {(m, c) for m in modes for c in (1, 3)}
    for result in found["results"]:
        assert len(result["trials"]) == 2
        for trial in result["trials"]:
            assert trial["prompt_tps"] > 0
            assert trial["decode_tps"] > 0
            assert trial["first_token_s"] > 0
    assert [hop["size_bytes"] for hop in found["ring"]][::8] == [8, 64 << 20]
    assert len(found["memory"]) == len(found["busy"]) == 2
    assert all(0 < sum(shares.values()) < 1.01 and shares["computing"] > 0 for shares in found["busy"])
    assert picture.read_bytes().startswith(b"\x89PNG")
    events = json.loads(trace.read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert {event["pid"] for event in spans} == {0, 1}
    assert all(event["dur"] >= 0 for event in spans)
    assert any("decode" in event["name"] for event in spans)


@pytest.mark.slow
def test_mlx_lm_s_own_pipeline(tmp_path: Path) -> None:
    """For a model type that has one."""
    folder = make_checkpoint("ministral3", tmp_path)
    save_tokenizer(folder)
    found = json.loads(run("--json", "--compare", "mlx-lm", "--model", str(folder)))
    assert [r["mode"] for r in found["results"]][-1] == "mlx-lm pipeline"
    assert all(trial["decode_tps"] > 0 for trial in found["results"][-1]["trials"])


@pytest.mark.slow
def test_mlx_lm_s_own_tensor_parallelism_under_mpi() -> None:
    """What mlx-lm keeps of the group doesn't keep MPI from its end."""
    command = [BENCHMARK, *SMALL, "--json", "--compare", "mlx-lm", "--parallel", "tensor", "--concurrent", "1"]
    with ranks.single(ranks.mpirun(2, command)) as launcher:
        assert launcher.wait(120) == 0, launcher.err
    assert [r["mode"] for r in json.loads(launcher.out)["results"]][-1] == "mlx-lm tensor"


@pytest.mark.slow
def test_tables_of_the_pipeline_alone() -> None:
    out = run("--pipeline-only", num_ranks=3)
    assert "one hop of the ring" in out
    assert "story-3m, 3 ranks over ring\nprompts of 20 tokens, 6 generated; medians of 2 trials; " in out
    assert "pipeline" in out
    assert "standalone " not in out
    assert "No whole models are shown" in out


@pytest.mark.slow
def test_one_rank() -> None:
    with ranks.single([BENCHMARK, *SMALL]) as running:
        assert running.wait() == 0, running.err
        assert "hop" not in running.out
        assert "standalone" in running.out
        assert "story-3m, 1 rank\n" in running.out


@pytest.mark.slow
def test_what_is_measured_is_not_lost(tmp_path: Path) -> None:
    with ranks.single([BENCHMARK, *SMALL, "--pipeline-only", "--trace", str(tmp_path)]) as running:
        assert running.wait() == 2
        assert "pipeline" in running.out
        assert running.err.splitlines()[-1] == f"error: {tmp_path} can't be written: Is a directory"


NO_MATPLOTLIB = "import sys; sys.modules['matplotlib.figure'] = None; from hippo_mpi import benchmark; benchmark.main()"
FILES = {
    "no such format": ([BENCHMARK], "--plot", "rates.bmp", "unknown format; it must end in one of"),
    "no such folder": ([BENCHMARK], "--trace", "no/trace.json", "can't be written"),
    "no matplotlib": ([sys.executable, "-c", NO_MATPLOTLIB], "--plot", "rates.png", "pip install 'matplotlib>=3.9'"),
}


@pytest.mark.parametrize("case", FILES)
def test_files_are_checked_before_anything_is_measured(case: str, tmp_path: Path) -> None:
    command, option, name, expected = FILES[case]
    with ranks.single([*command, *SMALL, option, str(tmp_path / name)]) as running:
        assert running.wait() == 2
        assert not running.out
        assert running.err.startswith("error: ") and expected in running.err and running.err.count("\n") == 1


@pytest.mark.slow
def test_no_requests_at_once() -> None:
    with ranks.single([BENCHMARK, *SMALL, "--concurrent", "0,1"]) as running:
        assert running.wait() == 2
        assert running.err == (
            "error: argument --concurrent: '0,1' is not a list of numbers of requests such as 1,4,16"
            " (--help lists the options)\n"
        )


@pytest.mark.slow
def test_more_than_the_context() -> None:
    with ranks.ring([[BENCHMARK, *SMALL, "--max-context", "22"]] * 2) as running:
        assert [rank.wait() for rank in running] == [2, 2]
        line = "error: --prompt-tokens 20 and --generation-tokens 6 exceed the context of 22 (--max-context)"
        assert running[0].err.splitlines()[-1] == line
