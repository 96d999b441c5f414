"""A rank of hippo_mpi.generate that goes astray at its tenth step, as its first argument says."""

from __future__ import annotations

import os
import sys
import time

from hippo_mpi import generate
from hippo_mpi.parallel import worker
from hippo_mpi.parallel.step_plan import StepPlan

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


worker.Follower.follow = astray  # type: ignore[method-assign]
generate.main()
