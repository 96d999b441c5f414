"""A rank of hippo_mpi.generate that goes astray at its tenth step, while it loads, or in its choice of experts, as its first argument says."""

from __future__ import annotations

import os
import sys
import time
from typing import Any, NoReturn

from hippo_mpi import generate
from hippo_mpi.errors import ForeignError
from hippo_mpi.parallel import worker
from hippo_mpi.parallel.step_plan import StepPlan
from hippo_mpi.runtime import pipeline
from hippo_mpi.sharding.sharded_stage import ShardedStage, load_sharded_stage

kind = sys.argv.pop(1)
follow = worker.Follower.follow
count = 0


def astray(self: worker.Follower) -> StepPlan | None:
    global count
    count += 1
    if count == 10:
        if kind == "raise":
            raise ValueError("this rank was told to raise")
        if kind == "exit":
            os._exit(7)
        if kind == "hang":
            time.sleep(1000)
        if kind == "skip":
            self._next_serial += 1
    return follow(self)


def unable(*_: object) -> NoReturn:
    raise ForeignError("this rank was told not to load")


def with_another_router(*given: Any) -> ShardedStage:
    stage = load_sharded_stage(*given)
    for name, module in stage.model.named_modules():
        if name.endswith(".gate"):
            module.weight = -module.weight
    return stage


worker.Follower.follow = astray  # type: ignore[method-assign]
if kind == "load":
    pipeline.load_stage = unable
if kind == "choose":
    pipeline.load_sharded_stage = with_another_router
generate.main()
