"""Compares what --parallel auto takes, and predicts, with what a pipeline and tensor parallelism really give.

python tests/measure/layouts.py [--preload libblas.so.3] [--trials 3] [--latencies-ms 0,0.3,1,3] [MODEL ...]

Two ranks, each on a core of its own; their ring goes through links of each latency (`shaped_link`; 0: none). A cell is a model, a
link and a number of requests. It is good if what was taken is within 5 % of the best of both ways. Where auto takes one of
these, its run is one more of the same, and the rates are averaged: two runs of one layout differ by up to 10 % here.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from dataclasses import dataclass
from typing import Any

from tests import ranks
from tests.measure.figures import run_pinned
from tests.measure.shaped_link import run_over_link

REQUESTS = {"one": 1, "few": 4, "many": 16}
BYTES_PER_S = 2e9
NEAR, NOT_WORSE, CLOSE = 0.95, 0.97, 0.15


@dataclass(frozen=True)
class Cell:
    """Tokens per second, and what was said of them."""

    pipeline: float
    tensor: float
    auto: float
    predicted: float
    chosen: str

    @property
    def by_way(self) -> dict[str, float]:
        """Return the rate of each layout, by name."""
        found = {"pipeline": self.pipeline, "tensor": self.tensor}
        return {**found, self.chosen: statistics.mean([self.auto, found.get(self.chosen, self.auto)])}

    @property
    def share(self) -> float:
        """Return what was taken, as a part of the best."""
        return self.by_way[self.chosen] / max(self.by_way.values())

    def __str__(self) -> str:
        return (
            f"pipeline {self.pipeline:7.1f}  tensor {self.tensor:7.1f}  auto {self.auto:7.1f} ({self.share:.2f} of the"
            f" best, predicted {self.predicted:.1f}: {self.predicted / self.by_way[self.chosen] - 1:+.0%})  {self.chosen}"
        )


def benchmark(model: str, parallel: list[str], loads: list[str], latency_s: float, args: argparse.Namespace) -> Any:
    counts = ",".join(str(REQUESTS[load]) for load in loads)
    options = [
        "--model", model, *parallel, "--concurrent", counts, "--trials", str(args.trials), "--pipeline-only", "--json",
        "--prompt-tokens", "32", "--generation-tokens", "24",
    ]  # fmt: skip
    if not latency_s:
        return json.loads(run_pinned(2, [str(ranks.BIN / "hippo_mpi.benchmark"), *options], args.preload))
    return json.loads(run_over_link("hippo_mpi.benchmark", options, args.preload, latency_s, BYTES_PER_S).out)


def rates(found: Any) -> dict[int, float]:
    return {
        result["concurrent"]: statistics.median(trial["decode_tps"] for trial in result["trials"])
        for result in found["results"]
    }


def measure(model: str, latency_s: float, args: argparse.Namespace) -> dict[str, Cell]:
    ways = [
        rates(benchmark(model, ["--parallel", way], list(REQUESTS), latency_s, args)) for way in ("pipeline", "tensor")
    ]
    cells = {}
    for load, count in REQUESTS.items():
        found = benchmark(model, ["--parallel", "auto", "--plan-for", load], [load], latency_s, args)
        note = next(note for note in found["notes"] if note.startswith("chosen: "))
        said = re.match(r"chosen: (.*), ([\d,.]+) tokens/s predicted", note)
        assert said is not None
        predicted = float(said[2].replace(",", ""))
        cells[load] = Cell(ways[0][count], ways[1][count], rates(found)[count], predicted, said[1])
        print(f"{latency_s * 1e3:4.1f} ms, {count:>2} at once: {cells[load]}", flush=True)
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--preload", default="")
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument(
        "--latencies-ms", type=lambda text: [float(one) for one in text.split(",")], default=[0, 0.3, 1, 3]
    )
    args = parser.parse_args()
    cells: list[Cell] = []
    for model in args.models:
        print(model)
        for latency_ms in args.latencies_ms:
            cells += measure(model, latency_ms / 1e3, args).values()
    shares = [cell.share for cell in cells]
    against = min(cell.by_way[cell.chosen] / cell.by_way["pipeline"] for cell in cells)
    close = sum(abs(cell.predicted / cell.by_way[cell.chosen] - 1) <= CLOSE for cell in cells)
    print(
        f"{sum(share >= NEAR for share in shares)} of {len(cells)} cells within {1 - NEAR:.0%} of the best; at least"
        f" {against:.2f} of the pipeline (aim {NOT_WORSE}); {close} of {len(cells)} predictions within {CLOSE:.0%}"
    )


if __name__ == "__main__":
    main()
