"""All stages of a pipeline in one process: the real Leader and Followers over in-process channels."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path

import mlx.core as mx

from hippo_mpi.checkpoint.checkpoint import Checkpoint, ModelSource, open_checkpoint
from hippo_mpi.errors import DesyncError
from hippo_mpi.parallel.step import Step, StepResult, run_step
from hippo_mpi.parallel.step_plan import Returns, StepPlan
from hippo_mpi.parallel.worker import Follower, Leader
from hippo_mpi.sharding.slot_caches import KVSettings
from hippo_mpi.sharding.stage import Stage, load_stage
from hippo_mpi.transport.channel import Channel, LocalChannel, Queue


def open_folder(folder: Path) -> Checkpoint:
    return open_checkpoint(ModelSource(folder))


def make_stages(checkpoint: Checkpoint, counts: Sequence[int]) -> list[Stage]:
    """Stages with their own weights and NaN in every other."""
    ends = list(accumulate(counts))
    return [load_stage(checkpoint, end - count, end) for count, end in zip(counts, ends, strict=True)]


class LocalRing:
    """A Leader whose neighbours are a function call away."""

    def __init__(self, stages: list[Stage], settings: KVSettings | None = None) -> None:
        size, settings = len(stages), settings or KVSettings()
        self.queues: list[Queue] = [deque() for _ in range(size)]
        self.followers: list[Follower] = []
        channels: list[Channel] = [
            LocalChannel(self.queues[rank], self.queues[(rank + 1) % size], self._pump((rank - 1) % size))
            for rank in range(size)
        ]
        self.leader = Leader(stages[0], channels[0], settings, size)
        for rank in range(1, size):
            self.followers.append(Follower(stages[rank], channels[rank], settings, rank == size - 1))
        self._serial = 0

    def _pump(self, rank: int) -> Callable[[], object]:
        def pump() -> object:
            if rank == 0:
                raise DesyncError("a receive from rank 0, but it sent nothing")
            return self.followers[rank - 1].follow()

        return pump

    def plan(self, slot: int, position: int, num_tokens: int, wants_logits: bool = True) -> StepPlan:
        plan = StepPlan(
            self._serial, (slot,), (position,), (num_tokens,), Returns.LOGITS if wants_logits else Returns.NOTHING
        )
        self._serial += 1
        return plan

    def logits(self, tokens: Sequence[int], position: int, slot: int = 0) -> mx.array:
        """Run one step to its end: logits (1, L, V)."""
        result = self.step(self.plan(slot, position, len(tokens)), [list(tokens)]) or self.wait()
        assert result is not None
        return result.logits

    def step(self, plan: StepPlan, tokens: list[list[int]]) -> StepResult | None:
        """Begin a step; the result of the oldest one, if it is due."""
        return run_step(self.leader, Step(plan, tokens))

    def wait(self) -> StepResult | None:
        """The result of the oldest step."""
        return run_step(self.leader, None)
