"""Tables of a benchmark, as people read them."""

from __future__ import annotations

from typing import Any

from hippo_mpi.measure.benchmark_report import report


def test_headings_stand_over_their_columns() -> None:
    """Also a long one, of ranks that share their layers; none of them is called a pipeline."""
    trial = {"decode_tps": 27.2, "prompt_tps": 129.2, "first_token_s": 0.124}
    benchmark: dict[str, Any] = {
        "model": "m", "precision": None, "backend": "ring", "ranks": 2, "trials": 1, "prompt_tokens": 16,
        "generation_tokens": 16, "date": "2026-11-27", "version": "0.1.0", "ring": [],
        "results": [{"mode": "tensor", "concurrent": 1, "trials": [trial]}],
        "busy": [{"computing together": 1.0}, {"computing together": 0.918, "waiting": 0.082}],
    }  # fmt: skip
    told = report(benchmark, has_whole=False)
    assert "pipeline" not in told.replace("--pipeline-only", "")
    _, head, *rows = told.split("where each rank's time went")[1].split("\n\n")[0].splitlines()
    assert head.split() == ["rank", "computing", "together", "waiting"]
    assert [len(head), head.index("together") + len("together")] == [
        len(rows[1]),
        rows[1].index("91.8%") + len("91.8%"),
    ]
