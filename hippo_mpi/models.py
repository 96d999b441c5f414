"""hippo_mpi.models: the models of a catalogue, and whether they fit these machines. Loads no weight.

hippo_mpi.models                                            # the bundled ones, on this machine
mlx.launch --hostfile hostfile -n 2 hippo_mpi.models --catalogue cards
hippo_mpi.models --config hippo.yaml --machine mini1:16 --machine mini2:24
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence
from pathlib import Path

from hippo_mpi import config
from hippo_mpi.checkpoint.hub import downloaded_share
from hippo_mpi.errors import HippoError
from hippo_mpi.planning.layer_split import Machine
from hippo_mpi.runtime.entry import run_without_model
from hippo_mpi.serving.config_file import card_parser, read_config
from hippo_mpi.serving.supervision.catalogue import ServedModel, read_catalogue
from hippo_mpi.transport.control import Control
from hippo_mpi.units import show_bytes

_ROW = "{:<24} {:>9} {:>5}  {:<9} {:>6} {:>9}  {:<34} {}"


def make_parser() -> config.Parser:
    parser = config.Parser(prog="hippo_mpi.models", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--catalogue", type=Path, default=config.BUNDLED_MODELS, help="folder of cards")
    parser.add_argument("--config", type=Path, help="the models of a server's YAML file instead")
    parser.add_argument(
        "--machine", type=Machine.from_option, action="append", dest="machines",
        help="machines that aren't here: NAME:GIBIBYTES[:SPEED], once per rank",
    )  # fmt: skip
    parser.add_argument("--paths", action="store_true", help="also print each model's folder")
    config.add_deadlines(parser)
    return parser


def list_models(arguments: argparse.Namespace, machines: list[Machine], control: Control) -> int:
    control.idle()  # looking at a repo's files may take its time
    cards = read_config(arguments.config).cards if arguments.config else read_catalogue(arguments.catalogue)
    models = [ServedModel(name, card_parser().parse_args(options), options) for name, options in cards.items()]
    print(_ROW.format("model", "weights", "here", "precision", "layers", "context", "modes", "fits"))
    for model in models:
        print(_row(model, arguments.machines or machines))
    if arguments.paths:
        print()
    for model in models if arguments.paths else ():
        with contextlib.suppress(HippoError):  # its row says why
            print(f"{model.name:<24} {model.path}")
    return 0


def _row(model: ServedModel, machines: Sequence[Machine]) -> str:
    try:
        info, modes = model.info, ", ".join(model.modes)
    except HippoError as error:
        return f"{model.name:<24} {str(error).splitlines()[0]}"
    try:
        split = model.plan(machines)
        layers = f"{', '.join(map(str, split.counts))} layer{'' if split.counts == [1] else 's'}"
        context, fits = f"{split.max_context:,}", f"yes: {layers}"
    except HippoError as error:
        context, fits = "", f"no: {str(error).splitlines()[0]}"
    weights = show_bytes(sum(info.layer_bytes) + info.head_bytes)
    here = f"{downloaded_share(model.path):.0%}"  # of the weights; the rest is on the hub
    return _ROW.format(model.name, weights, here, model.precision, info.num_layers, context, modes, fits)


def main() -> None:
    run_without_model(make_parser(), list_models)


if __name__ == "__main__":
    main()
