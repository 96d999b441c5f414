"""What every rank but the first does where each holds a part of every layer: it takes part in rank 0's steps."""

from __future__ import annotations

import mlx.core as mx

from hippo_mpi.errors import DesyncError
from hippo_mpi.parallel.step_plan import StepPlan, decode
from hippo_mpi.parallel.worker import rearrange
from hippo_mpi.sharding.sharded_stage import ShardedStage
from hippo_mpi.sharding.slot_caches import KVSettings, SlotCaches
from hippo_mpi.transport.channel import Channel
from hippo_mpi.transport.pulse import Activity, Progress


class ShardedFollower:
    """Carries out one plan after the other, with the same sums in the same order as rank 0.

    Args:
        stage: this rank's part of the model.
        channel: to the next rank and from the previous one; plans are passed on.
        settings: of the caches.
        is_last: whether the next rank is rank 0.
        progress: told what this rank does next.
    """

    def __init__(
        self, stage: ShardedStage, channel: Channel, settings: KVSettings, is_last: bool, progress: Progress
    ) -> None:
        self._stage, self._channel, self._progress, self._is_last = stage, channel, progress, is_last
        self.caches = SlotCaches(stage.model, settings)
        self._next_serial = 0

    def follow(self) -> StepPlan | None:
        """Wait for the next plan and carry it out.

        A step is still being computed on return, so that the next one's graph can be built meanwhile.

        Returns:
            The plan; None if it was the last message.

        Raises:
            DesyncError: a step was skipped, or doesn't fit what this rank holds.
        """
        header = self._channel.receive().header
        if not self._is_last:
            self._channel.send(header, [])
        if not header:
            self._stage.collective.flush()
            return None
        plan = decode(header)
        if plan.serial != self._next_serial:
            raise DesyncError(f"expected step {self._next_serial}, got {plan.serial}")
        self._next_serial += 1
        if plan.has_rows:
            self._compute(plan)
        else:
            rearrange(self.caches, plan)
            mx.eval(self.caches.moved())
        self._progress(f"waiting after {plan}", Activity.WAITING)
        return plan

    def _compute(self, plan: StepPlan) -> None:
        self._progress(f"computing {plan}", Activity.TOGETHER)
        collective = self._stage.collective
        before = collective.last
        rearrange(self.caches, plan)
        cache = self.caches.at(plan.slots, plan.positions, plan.counts)
        tokens = mx.zeros((len(plan.slots), plan.num_tokens), mx.int32)  # only their shape matters here
        self._stage.forward(tokens, cache, plan.wants_logits).run(None)
        state = self.caches.advance(plan.slots, plan.ends)
        if before is not None:
            mx.eval(before)
        if plan.wants_logits:
            mx.async_eval(collective.last, state)  # type: ignore[no-untyped-call]
        else:  # as on rank 0: what only logits would need isn't computed, on any rank
            mx.eval(state)
            collective.forget()
