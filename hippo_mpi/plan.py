"""hippo_mpi.plan: what each rank would hold, without loading a weight.

mlx.launch --hostfile hostfile -n 2 hippo_mpi.plan --model M
hippo_mpi.plan --model M --machine mini1:16 --machine mini2:24:1.5
"""

from __future__ import annotations

import argparse

from hippo_mpi import command, config
from hippo_mpi.command import Session
from hippo_mpi.shard.layer_split import Machine


def make_parser() -> config.Parser:
    parser = config.Parser(prog="hippo_mpi.plan", description=(__doc__ or "").splitlines()[0])
    config.add_model_options(parser)
    parser.add_argument(
        "--machine",
        type=_machine,
        action="append",
        dest="machines",
        help="plan for machines that aren't here: NAME:GIBIBYTES[:SPEED], once per rank; speed is relative",
    )
    config.add_cache_options(parser)
    config.add_run_options(parser)
    return parser


def _machine(text: str) -> Machine:
    parts = text.split(":")
    if len(parts) not in (2, 3):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME:GIBIBYTES[:SPEED]")
    speed = config.above_0(parts[2]) if len(parts) == 3 else 1.0
    return Machine(parts[0], int(config.above_0(parts[1]) * 2**30), speed)


def show(session: Session) -> int:
    if session.agreement.split is not None:
        print(session.agreement.split.table())
    session.control.close()
    return 0


def main() -> None:
    command.run(make_parser(), show)


if __name__ == "__main__":
    main()
