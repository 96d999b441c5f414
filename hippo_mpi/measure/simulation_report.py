"""Shows a simulation's predictions, for people and for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec

from hippo_mpi.config.links import Link
from hippo_mpi.errors import UserError
from hippo_mpi.measure.prediction import MeasuredStage, Prediction, StageTimes, Workload, one_machine, predict
from hippo_mpi.planning.layer_split import Machine
from hippo_mpi.units import count_of, show_rate

_NO_LINK = Link(0.0, float("inf"))


@dataclass(frozen=True)
class Predicted:
    """Predictions from the medians of all times, from the shortest ones, and from the longest."""

    typical: Prediction
    fastest: Prediction
    slowest: Prediction

    @classmethod
    def over(cls, link: Link, stages: Sequence[MeasuredStage], workload: Workload) -> Predicted:
        """Predict the rates of the stages together over a link."""

        def predicted(times: list[StageTimes]) -> Prediction:
            return predict(times, link, workload)

        return cls(
            predicted([stage.typical for stage in stages]),
            predicted([stage.fastest for stage in stages]),
            predicted([stage.slowest for stage in stages]),
        )

    @classmethod
    def alone(cls, stages: Sequence[MeasuredStage], workload: Workload) -> Predicted:
        """Predict the rates of one machine that holds all stages."""
        whole = MeasuredStage(
            one_machine([stage.typical for stage in stages]),
            one_machine([stage.fastest for stage in stages]),
            one_machine([stage.slowest for stage in stages]),
        )
        return cls.over(_NO_LINK, [whole], workload)


def prediction_object(stages: Sequence[MeasuredStage], links: Sequence[Link], workload: Workload) -> dict[str, Any]:
    """Return all predictions as an object for JSON, with the times that --stage-times reads."""
    return {
        "workload": asdict(workload),
        "times": [asdict(stage) for stage in stages],
        "one_machine": asdict(Predicted.alone(stages, workload)),
        "links": [asdict(link) | {"pipeline": asdict(Predicted.over(link, stages, workload))} for link in links],
    }


def prediction_table(stages: Sequence[MeasuredStage], links: Sequence[Link], workload: Workload) -> str:
    """Return a table of rates in tokens per second, by load: of one machine, and of the ranks over each link."""
    alone = Predicted.alone(stages, workload)
    together = [(link.name, Predicted.over(link, stages, workload)) for link in links]
    lines = [
        f"{count_of(len(stages), 'rank')} over {link.name}: {link.latency_s * 1e6:,.0f} us, {link.bytes_per_s / 1e6:,.0f} MB/s"
        for link in links
    ]
    lines.append("one machine: all layers, no link; ranges: from the shortest and longest of the repeated timings")
    lines.append(f"{'predicted':<26} {'':<14} {'tok/s':>10} {'range':>20} {'ratio':>6}")
    for row in (None, *workload.concurrent):
        title = f"prompt of {workload.prompt_tokens:,} tokens" if row is None else f"generation, {row} at once"
        for name, by in [("one machine", alone), *together]:
            rates = [_rate(prediction, row, workload) for prediction in (by.typical, by.slowest, by.fastest)]
            ratio = "" if by is alone else f"{rates[0] / _rate(alone.typical, row, workload):.2f}"
            span = f"{show_rate(rates[1])}..{show_rate(rates[2])}"
            lines.append(f"{title:<26} {name:<14.14} {show_rate(rates[0]):>10} {span:>20} {ratio:>6}".rstrip())
            title = ""
    return "\n".join(lines)


def _rate(prediction: Prediction, num_requests: int | None, workload: Workload) -> float:
    """Return tokens per second of `num_requests` at once; None: of reading the prompt."""
    if num_requests is None:
        return workload.prompt_tokens / prediction.first_token_s
    return prediction.decode_tps[num_requests]


def read_machines(path: Path) -> list[Machine]:
    """Return the machines that the times in a --json output were measured for.

    Raises:
        UserError: the file can't be read.
    """
    return [Machine(**rank["machine"]) for rank in _read(path)["plan"]["ranks"]]


def read_times(path: Path, workload: Workload, layer_counts: Sequence[int]) -> list[MeasuredStage]:
    """Return the times in a --json output.

    Args:
        path: the output.
        workload: that must have been measured.
        layer_counts: layers per rank that must have been measured.

    Raises:
        UserError: the file can't be read, or was measured for other layers or another load.
    """
    output = _read(path)
    stages = msgspec.convert(output["times"], list[MeasuredStage], strict=False)  # numbers of rows are text in JSON
    counts = [stop - start for start, stop in (rank["layers"] for rank in output["plan"]["ranks"])]
    if counts != [*layer_counts]:
        theirs, ours = (", ".join(map(str, layers)) for layers in (counts, layer_counts))
        raise UserError(f"--stage-times {path} was measured for {theirs} layers, but this plan has {ours}")
    num_chunks = -(-workload.prompt_tokens // workload.chunk_tokens)
    missing = {*workload.batch_sizes(len(stages))} - {*stages[0].typical.steps}
    if missing or any(len(stage.typical.chunks) != num_chunks for stage in stages):
        raise UserError(f"--stage-times {path} was measured with a different --prompt-tokens or --concurrent")
    return stages


def _read(path: Path) -> dict[str, Any]:
    try:
        output: dict[str, Any] = json.loads(path.read_text())
        for rank, stage in zip(output["plan"]["ranks"], output["times"], strict=True):
            Machine(**rank["machine"])
            msgspec.convert(stage, MeasuredStage, strict=False)
            start, stop = rank["layers"]
            stop - start
    except OSError as error:
        raise UserError(f"--stage-times {path} can't be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, msgspec.ValidationError):
        raise UserError(f"--stage-times {path} is not output of hippo_mpi.plan --simulate --json") from None
    return output
