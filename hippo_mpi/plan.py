"""hippo_mpi.plan: what each rank would hold, without loading a weight, and with --simulate what they would give.

mlx.launch --hostfile hostfile -n 2 hippo_mpi.plan --model M
hippo_mpi.plan --model M --machine mini1:16 --machine mini2:24:1.5
hippo_mpi.plan --model M --machine mini1:16 --machine mini2:16 --simulate --link thunderbolt4 --link wifi
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hippo_mpi import config
from hippo_mpi.checkpoint.blueprint import has_weights
from hippo_mpi.engine.prefill import chunk_tokens
from hippo_mpi.errors import UserError
from hippo_mpi.measure.prediction import LINKS, Link, MeasuredStage, Workload, check_can_time, measure_stage
from hippo_mpi.measure.simulation_report import (
    prediction_object,
    prediction_table,
    read_machines,
    read_times,
)
from hippo_mpi.planning.layer_split import Machine
from hippo_mpi.planning.machine import longest_chunk
from hippo_mpi.runtime.entry import run
from hippo_mpi.runtime.session import Session
from hippo_mpi.shard.stage import load_stage


class _Parser(config.Parser):
    """Plans for the machines that the times of --stage-times were measured for, if no others are given."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> argparse.Namespace:  # type: ignore[override]
        found: argparse.Namespace = super().parse_args(args, namespace)
        if found.simulate and found.stage_times and not found.machines:
            found.machines = read_machines(found.stage_times)
        return found


def make_parser() -> config.Parser:
    parser = _Parser(prog="hippo_mpi.plan", description=(__doc__ or "").splitlines()[0])
    config.add_model_options(parser)
    config.add_draft_options(parser)
    parser.set_defaults(show_plan=True)  # a config alone will do, as for hippo_mpi.generate --show-plan
    parser.add_argument(
        "--machine",
        type=Machine.from_option,
        action="append",
        dest="machines",
        metavar="MACHINE",
        help="plan for machines that aren't here: NAME:GIBIBYTES[:SPEED], once per rank; speed is relative",
    )
    parser.add_argument(
        "--json", action="store_true", help="print the plan, and what --simulate finds, as one JSON object"
    )
    group = parser.add_argument_group("simulation")
    group.add_argument(
        "--simulate",
        action="store_true",
        help="time every stage by itself, here or on the launched ranks, and predict what they give over a link",
    )
    group.add_argument(
        "--link",
        type=_link,
        action="append",
        dest="links",
        metavar="LINK",
        help=f"{', '.join(link.name for link in LINKS)}, or LATENCY,BANDWIDTH such as 300us,2GB/s (hippo_mpi.benchmark"
        f" measures both); as often as you like (default: {LINKS[0].name})",
    )
    group.add_argument("--prompt-tokens", type=config.positive, default=1024, help="tokens of the prompt")
    group.add_argument(
        "--concurrent", type=config.request_counts, default=(1, 4, 16), help="numbers of requests at once"
    )
    group.add_argument(
        "--stage-times", type=Path, help="a --json output to take the times and machines from, instead of measuring"
    )
    config.add_cache_options(parser)
    config.add_run_options(parser)
    return parser


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


def plan(session: Session) -> int:
    arguments = session.arguments
    _check(session)
    if not (arguments.json and arguments.simulate):
        session.show_plan()
    if arguments.simulate:
        simulation = _simulate(session)
        session.progress.clear()
        if session.world.rank == 0:
            if arguments.json:
                session.show_plan(prediction_object(*simulation))
            else:
                print(f"\n{prediction_table(*simulation)}")
    session.control.close()
    return 0


def _check(session: Session) -> None:
    """Raise a UserError for options that can't be followed, before anything is printed."""
    arguments, folder = session.arguments, session.agreement.checkpoint.source.path
    if not arguments.simulate and (arguments.links or arguments.stage_times):
        raise UserError("--link and --stage-times are for a simulation: add --simulate")
    if arguments.simulate and not arguments.stage_times and not has_weights(folder):
        raise UserError(
            f"--simulate times the stages, and {folder} has no weights: give --stage-times, or download them"
        )


def _simulate(session: Session) -> tuple[list[MeasuredStage], list[Link], Workload]:
    """Return the times of all stages (on rank 0), the links, and what is asked of them."""
    arguments, agreement = session.arguments, session.agreement
    num_stages, prompt = len(agreement.counts), arguments.prompt_tokens
    chunk = arguments.prefill_step_size or chunk_tokens(prompt, num_stages, longest_chunk())
    workload = Workload(prompt, chunk, arguments.concurrent, agreement.can_batch is not False)
    if arguments.stage_times:
        stages = read_times(arguments.stage_times, workload, agreement.counts)
    else:
        check_can_time(agreement.checkpoint.flow)
        stages = _measure(session, workload)
    return stages, arguments.links or LINKS[:1], workload


def _measure(session: Session, workload: Workload) -> list[MeasuredStage]:
    """Times by rank, on rank 0: each rank's own, or, for machines that aren't here, one stage after the other."""
    control, counts = session.control, session.agreement.counts

    def measure(rank: int) -> MeasuredStage:
        checkpoint, loading = session.agreement.checkpoint, f"loading stage {rank}"
        stage = load_stage(checkpoint, *session.agreement.layers_of(rank), lambda done_bytes: control.progress(loading))
        session.progress.clear()
        return measure_stage(stage, session.settings, workload, len(counts), control.progress)

    if session.arguments.machines is None:
        gathered = control.gather(measure(session.world.rank))
        control.meet()
        return gathered or []
    if session.world.rank > 0:
        control.meet()
        return []
    times = [measure(rank).at_speed(machine.speed) for rank, machine in enumerate(session.arguments.machines)]
    control.meet()
    return times


def main() -> None:
    run(make_parser(), plan)


if __name__ == "__main__":
    main()
