"""One script on several ranks in one process: each rank a greenlet, over in-process channels."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import mlx.nn as nn
from greenlet import getcurrent, greenlet

from hippo_mpi.library.pipelined import route_calls
from hippo_mpi.parallel.peer import Peer
from hippo_mpi.sharding.stage import Stage
from hippo_mpi.transport.channel import LocalChannel, Queue


def pipelined(stages: Sequence[Stage]) -> list[nn.Module]:
    """Return the stages' models, each as its rank's script has it."""
    size = len(stages)
    queues: list[Queue] = [deque() for _ in stages]

    def let_others_run() -> None:
        getcurrent().parent.switch()

    for rank, stage in enumerate(stages):
        channel = LocalChannel(queues[rank], queues[(rank + 1) % size], let_others_run)
        route_calls(stage.model, Peer(stage, channel, rank, size, lambda doing, activity=None: None))
    return [stage.model for stage in stages]


def run_script(script: Callable[[nn.Module], Any], models: Sequence[nn.Module]) -> list[Any]:
    """Run a script once for each rank's model; returns what each returned."""
    found: list[Any] = [None] * len(models)

    def run(rank: int) -> None:
        found[rank] = script(models[rank])

    running = [greenlet(run) for _ in models]
    rounds = 0
    while any(not rank.dead for rank in running):
        for number, rank in enumerate(running):
            if not rank.dead:
                rank.switch(number) if rounds == 0 else rank.switch()
        rounds += 1
        assert rounds < 100_000, "every rank waits for another"
    return found
