"""A rank that has joined, and a model that all ranks have agreed on: what the body of a command works with."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from hippo_mpi.config.options import RunOptions
from hippo_mpi.offline.conversation import write
from hippo_mpi.offline.progress import Progress
from hippo_mpi.runtime.agreement import Agreement
from hippo_mpi.runtime.pipeline import Pipeline
from hippo_mpi.sharding.slot_caches import KVSettings
from hippo_mpi.transport.control import Control
from hippo_mpi.transport.launcher import Launcher
from hippo_mpi.transport.world import World

_R_co = TypeVar("_R_co", bound=RunOptions, covariant=True)


@dataclass(frozen=True)
class Session(Generic[_R_co]):
    """One rank of a run."""

    options: _R_co
    world: World
    control: Control
    launcher: Launcher
    settings: KVSettings
    agreement: Agreement
    progress: Progress

    def load(self) -> Pipeline:
        """Load this rank's part of the model. Over several hosts, people are shown which holds what."""
        split = self.agreement.split  # on rank 0
        if split is not None and len({stage.machine.name for stage in split.stages}) > 1:
            sys.stderr.write(f"{split.table()}\n")
        pipeline = Pipeline(self.world, self.control, self.agreement, self.settings, self.progress.loading)
        self.progress.clear()
        return pipeline

    def show(self, text: str) -> None:
        """Write to standard output, for as long as its reader takes."""
        with self.control.pausing():
            write(text)

    def show_plan(self, as_json: bool, simulation: dict[str, Any] | None = None) -> None:
        """Print, on rank 0, which rank would hold what; as JSON also what a simulation found."""
        split = self.agreement.split
        if split is None:
            return
        if as_json:
            plan = {"model": self.options.model, "plan": split.as_object(), **(simulation or {})}
            print(json.dumps(plan), flush=True)
        else:
            print(split.table(), flush=True)

    def follow(self) -> None:
        """Load, run rank 0's steps, and end: what every rank but the first does."""
        pipeline = self.load()
        pipeline.follow()
        pipeline.end()
