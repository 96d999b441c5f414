"""hippo_mpi.plan: show what each rank would hold, without loading weights; --simulate predicts the speed.

mlx.launch --hostfile hostfile -n 2 hippo_mpi.plan --model M
hippo_mpi.plan --model M --machine mini1:16 --machine mini2:24:1.5
hippo_mpi.plan --model M --machine mini1:16 --machine mini2:16 --simulate --link thunderbolt4 --link wifi
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from hippo_mpi.checkpoint.blueprint import has_weights
from hippo_mpi.config import checks
from hippo_mpi.config.links import LINKS, Link
from hippo_mpi.config.options import DraftOptions, RunOptions
from hippo_mpi.config.parser import OptionsParser, option
from hippo_mpi.engine.prefill import chunk_tokens
from hippo_mpi.errors import UserError
from hippo_mpi.measure.prediction import MeasuredStage, Workload, check_can_time, measure_stage
from hippo_mpi.measure.simulation_report import (
    prediction_object,
    prediction_table,
    read_machines,
    read_times,
)
from hippo_mpi.planning.layer_split import Machine
from hippo_mpi.planning.layout_choice import Comparison, Prediction, best, table
from hippo_mpi.planning.machine import longest_chunk
from hippo_mpi.runtime.entry import run
from hippo_mpi.runtime.layout_planner import PlannedLayout
from hippo_mpi.runtime.session import Session
from hippo_mpi.sharding.stage import load_stage

_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_BYTES_PER_S = {"Gbit/s": 1e9 / 8, "Mbit/s": 1e6 / 8, "GB/s": 1e9, "MB/s": 1e6}


def _link(text: str) -> Link:
    for link in LINKS:
        if text == link.name:
            return link
    latency, _, bandwidth = text.partition(",")
    try:
        return Link(_with_unit(latency, _SECONDS), _with_unit(bandwidth, _BYTES_PER_S), text)
    except ValueError:
        names = ", ".join(link.name for link in LINKS)
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither {names} nor LATENCY,BANDWIDTH such as 300us,2GB/s"
        ) from None


def _with_unit(text: str, units: dict[str, float]) -> float:
    """A number above 0 with one of `units` behind it; the longest that fits."""
    unit = max((unit for unit in units if text.endswith(unit)), key=len, default="")
    value = float(text.removesuffix(unit)) * units[unit] if unit else 0.0
    if not 0 < value < float("inf"):
        raise ValueError(text)
    return value


@dataclass(frozen=True, kw_only=True)
class _SimulationOptions:
    """What is predicted, and from which times."""

    GROUP: ClassVar = "simulation"
    simulate: bool = option(
        False, "time each stage by itself, here or on the launched ranks, and predict the speed over a link"
    )
    links: Sequence[Link] | None = option(
        None,
        f"{', '.join(link.name for link in LINKS)}, or LATENCY,BANDWIDTH such as 300us,2GB/s (hippo_mpi.benchmark"
        f" measures both); can be repeated (default: {LINKS[0].name})",
        "--link", check=_link, action="append", metavar="LINK",
    )  # fmt: skip
    prompt_tokens: int = option(1024, "tokens of the prompt", check=checks.positive)
    concurrent: tuple[int, ...] = option((1, 4, 16), "numbers of concurrent requests", check=checks.request_counts)
    stage_times: Path | None = option(
        None, "take times and machines from this --json output instead of measuring", check=Path
    )


@dataclass(frozen=True, kw_only=True)
class PlanOptions(RunOptions, DraftOptions, _SimulationOptions):
    """All options of hippo_mpi.plan."""

    machines: list[Machine] | None = option(
        None, "plan for machines that aren't here: NAME:GIBIBYTES[:SPEED], once per rank; speed is relative",
        "--machine", check=Machine.from_option, action="append", metavar="MACHINE",
    )  # fmt: skip
    json: bool = option(False, "print the plan, and the results of --simulate, as one JSON object")

    @property
    def shows_progress(self) -> bool:
        """Whether people are told how far a start is."""
        return not self.json

    @property
    def only_plans(self) -> bool:
        """Whether the plan is all that is wanted: a config alone will do, as for hippo_mpi.generate --show-plan."""
        return True

    @property
    def planned_link(self) -> Link | None:
        """The link between machines that aren't here, if there are such."""
        return self.links[0] if self.links else None

    @property
    def has_comparison(self) -> bool:
        """Whether what each way to share a model would give is shown, at every load."""
        return self.parallel == "auto" or (self.simulate and self.parallel != "pipeline")


class _Parser(OptionsParser[PlanOptions]):
    """Plans for the machines that the times of --stage-times were measured for, if no others are given."""

    def read(self, argv: Sequence[str] | None = None) -> PlanOptions:
        """Return the options of a command line.

        Raises:
            UserError: one is wrong, or the file with times can't be read.
        """
        options = super().read(argv)
        if not options.simulate and (options.stage_times or (options.links and options.parallel != "auto")):
            raise UserError("--link and --stage-times need --simulate")
        if options.stage_times and options.parallel != "pipeline":
            raise UserError("--stage-times are those of a pipeline's stages: leave it out, or --parallel")
        if options.simulate and options.stage_times and not options.machines:
            return replace(options, machines=read_machines(options.stage_times))
        return options


def make_parser() -> OptionsParser[PlanOptions]:
    """Return the parser of the command line."""
    return _Parser(PlanOptions, prog="hippo_mpi.plan", description=(__doc__ or "").splitlines()[0])


def plan(session: Session[PlanOptions]) -> int:
    """Show the plan, and what it would give. Returns the exit status."""
    options = session.options
    _check(session)
    planned = session.agreement.planned
    if planned is not None and planned.comparison is not None:
        _show_comparison(session, planned, planned.comparison)
    elif not (options.json and options.simulate):
        session.show_plan(options.json)
    if options.simulate and options.parallel == "pipeline":
        simulation = _simulate(session)
        session.progress.clear()
        if session.world.rank == 0:
            if options.json:
                session.show_plan(True, prediction_object(*simulation))
            else:
                print(f"\n{prediction_table(*simulation)}")
    session.control.close()
    return 0


def _show_comparison(session: Session[PlanOptions], planned: PlannedLayout, comparison: Comparison) -> None:
    """Print the plan, and what each way to share the model would give over each link."""
    options = session.options
    # Between machines that aren't here nothing was measured.
    links = options.links or (LINKS[:1] if options.machines else [])
    by_link = {link.name: comparison.over(link) for link in links} or {"": comparison}
    found = {name: by.predictions(planned.problems) for name, by in by_link.items()}
    if options.json:
        layouts = [
            {"link": name, "predictions": [_prediction_object(one) for one in each]} for name, each in found.items()
        ]
        session.show_plan(True, {"layouts": layouts, "notes": planned.notes})
        return
    session.show_plan(False)
    for name, predictions in found.items():
        chosen = best(predictions, options.load) if options.parallel == "auto" else None
        if options.layout is not None:
            chosen = next((one for one in predictions if one.name == options.layout), None)
        print(f"\n{f'over {name}' if name else 'over the link between these ranks, as it was measured'}:")
        print(table(predictions, chosen), flush=True)


def _prediction_object(prediction: Prediction) -> dict[str, Any]:
    return {**asdict(prediction.way), "tokens_per_s": prediction.tokens_per_s, "problem": prediction.problem}


def _check(session: Session[PlanOptions]) -> None:
    """Raise a UserError for options that can't be followed, before anything is printed."""
    options, folder = session.options, session.agreement.checkpoint.source.path
    compares = options.links or (options.simulate and options.parallel != "pipeline")
    if compares and session.agreement.layout.num_ranks == 1:
        raise UserError(
            f"{'--link' if options.links else '--simulate'} needs several ranks: give --machine NAME:GIBIBYTES once per rank, or start them with ./launch/run"
            " -n 2 --command plan"
        )
    if options.simulate and options.parallel == "pipeline" and not options.stage_times and not has_weights(folder):
        raise UserError(f"--simulate needs weights, and {folder} has none: give --stage-times, or download them")


def _simulate(session: Session[PlanOptions]) -> tuple[list[MeasuredStage], list[Link], Workload]:
    """Return the times of all stages (on rank 0), the links, and what is asked of them."""
    options, agreement = session.options, session.agreement
    num_stages, prompt = len(agreement.counts), options.prompt_tokens
    chunk = options.prefill_step_size or chunk_tokens(prompt, num_stages, longest_chunk())
    workload = Workload(prompt, chunk, options.concurrent, agreement.can_batch is not False)
    if options.stage_times:
        stages = read_times(options.stage_times, workload, agreement.counts)
    else:
        check_can_time(agreement.checkpoint.flow)
        stages = _measure(session, workload)
    return stages, [*(options.links or LINKS[:1])], workload


def _measure(session: Session[PlanOptions], workload: Workload) -> list[MeasuredStage]:
    """Times by rank, on rank 0: each rank's own, or, for machines that aren't here, one stage after the other."""
    control, counts = session.control, session.agreement.counts

    def measure(rank: int) -> MeasuredStage:
        checkpoint, loading = session.agreement.checkpoint, f"loading stage {rank}"
        stage = load_stage(checkpoint, *session.agreement.layers_of(rank), lambda done_bytes: control.progress(loading))
        session.progress.clear()
        return measure_stage(stage, session.settings, workload, len(counts), control.progress)

    if session.options.machines is None:
        gathered = control.gather(measure(session.world.rank))
        control.meet()
        return gathered or []
    if session.world.rank > 0:
        control.meet()
        return []
    times = [measure(rank).at_speed(machine.speed) for rank, machine in enumerate(session.options.machines)]
    control.meet()
    return times


def main() -> None:
    """Run the command on this process's command line; ends the process."""
    run(make_parser(), plan, machines=lambda options: options.machines)


if __name__ == "__main__":
    main()
