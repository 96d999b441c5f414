"""hippo_mpi.models: list the models of a catalogue, and whether they fit these machines. Loads no weights.

hippo_mpi.models                                            # the bundled ones, on this machine
mlx.launch --hostfile hostfile -n 2 hippo_mpi.models --catalogue cards
hippo_mpi.models --config hippo.yaml --machine mini1:16 --machine mini2:24
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hippo_mpi.checkpoint.hub import downloaded_share
from hippo_mpi.config.bundled import BUNDLED_MODELS
from hippo_mpi.config.options import DeadlineOptions
from hippo_mpi.config.parser import Once, OptionsParser, option
from hippo_mpi.config.yaml_file import ConfigFile, all_cards, read_config
from hippo_mpi.errors import HippoError
from hippo_mpi.planning.layer_split import Machine
from hippo_mpi.runtime.entry import run_without_model
from hippo_mpi.serving.supervision.catalogue import ServedModel
from hippo_mpi.transport.control import Control
from hippo_mpi.units import show_bytes

_ROW = "{:<24} {:>9} {:>5}  {:<9} {:>6} {:>9}  {:<34} {}"


@dataclass(frozen=True, kw_only=True)
class ModelsOptions(DeadlineOptions):
    """All options of hippo_mpi.models."""

    catalogue: Path | None = option(None, "folder of cards; default: that of the bundled models", check=Path)
    config: Path | None = option(None, "list the models of this YAML file instead", action=Once, check=Path)
    machines: list[Machine] | None = option(
        None, "machines that aren't here: NAME:GIBIBYTES[:SPEED], once per rank", "--machine",
        check=Machine.from_option, action="append",
    )  # fmt: skip
    paths: bool = option(False, "also print each model's folder")


def make_parser() -> OptionsParser[ModelsOptions]:
    """Return the parser of the command line."""
    return OptionsParser(ModelsOptions, prog="hippo_mpi.models", description=(__doc__ or "").splitlines()[0])


def list_models(options: ModelsOptions, machines: list[Machine], control: Control) -> int:
    """Print a line for each model. Returns the exit status."""
    control.idle()  # looking at a repo's files may take its time
    file = read_config(options.config) if options.config else ConfigFile()
    folder = options.catalogue or (None if options.config else BUNDLED_MODELS)
    models = [ServedModel.from_card(name, card) for name, card in all_cards(file, folder).items()]
    print(_ROW.format("model", "weights", "here", "precision", "layers", "context", "modes", "fits"))
    for model in models:
        print(_row(model, options.machines or machines))
    if options.paths:
        print()
    for model in models if options.paths else ():
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
    """Run the command on this process's command line; ends the process."""
    run_without_model(make_parser(), list_models)


if __name__ == "__main__":
    main()
