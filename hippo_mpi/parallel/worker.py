"""Steps through the ring: what rank 0 does (`Leader`) beside what every other rank does (`Follower`).

Rank 0 pushes steps and pops results in the same order; up to one step per stage is in flight. The others obey:
receive, compute, send on. Everything they do follows from the StepPlan that travels in front of the arrays.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import mlx.core as mx

from hippo_mpi.errors import DesyncError
from hippo_mpi.parallel.step_plan import StepPlan, decode, encode
from hippo_mpi.shard.kv_cache import KVSettings, SlotCaches
from hippo_mpi.shard.stage import Forward, Stage
from hippo_mpi.transport.channel import Channel

Progress = Callable[[str], None]
"""Told what this rank does next; each call moves the deadline of the watchdog."""


def _quiet(_: str) -> None:
    pass


class Leader:
    """Rank 0's side: begins steps over tokens and hands back logits."""

    def __init__(
        self, stage: Stage, channel: Channel, settings: KVSettings, num_stages: int, progress: Progress = _quiet
    ) -> None:
        self._stage, self._channel, self._progress = stage, channel, progress
        # A model that loops over its layers goes round the ring several times a step: one at a time keeps order.
        self._is_looped = stage.flow.num_rounds > 1
        self._num_stages = 1 if self._is_looped else num_stages
        self.caches = SlotCaches(stage.model, settings)
        self._in_flight: deque[tuple[StepPlan, Forward]] = deque()

    @property
    def num_in_flight(self) -> int:
        """Steps whose logits have not been collected."""
        return len(self._in_flight)

    @property
    def max_in_flight(self) -> int:
        """Steps that keep every stage busy: one per stage, the one being begun among them."""
        return self._num_stages

    def step(self, plan: StepPlan | None, tokens: list[list[int]]) -> tuple[StepPlan, mx.array] | None:
        """Begin the step `plan` over `tokens` (a list per row) and finish the oldest one, if it is due.

        Order: compute the new step, receive the oldest result, then send the new one (schedule.py says why).
        Without a plan, the oldest step is waited for.

        Returns:
            A step that wanted logits, with its logits (B, L, V), not yet evaluated; or None.
        """
        if plan is not None and not plan.has_rows:
            rearrange(self.caches, plan)
            self._send(plan, [])
            return None
        begun = self._begin(plan, tokens) if plan is not None else None
        finished = None
        if self._in_flight and (begun is None or len(self._in_flight) >= self._num_stages - 1):
            finished = self._finish(*self._in_flight.popleft())
        if plan is None or begun is None:
            return finished
        if begun.outgoing is not None:
            self._send(plan, begun.outgoing)
        result = self._finish(plan, begun) if self._is_looped or begun.is_done else None
        state = self.caches.advance(plan.slots, plan.ends)
        if not self._stage.is_whole or not plan.wants_logits:
            mx.eval(state)  # while the step is on its way; on a rank that is alone, sampling evaluates it
        if result is None:
            self._in_flight.append((plan, begun))
            return finished
        return result if plan.wants_logits else finished

    def _begin(self, plan: StepPlan, tokens: list[list[int]]) -> Forward:
        self._progress(f"computing {plan}")
        rearrange(self.caches, plan)
        cache = self.caches.at(plan.slots, plan.positions, plan.counts)
        padded = [row + [0] * (plan.num_tokens - len(row)) for row in tokens]
        forward = self._stage.forward(mx.array(padded, mx.int32), cache, plan.wants_logits)
        forward.run(None)
        if forward.outgoing is not None:
            mx.eval(forward.outgoing)
        return forward

    def _finish(self, plan: StepPlan, forward: Forward) -> tuple[StepPlan, mx.array]:
        """Follow a step round the ring until the model's own code has returned."""
        while not forward.is_done:
            self._progress(f"waiting for {plan}")
            header, arrays = self._channel.receive()
            self._progress(f"finishing {plan}")
            if decode(header) != plan:
                raise DesyncError(f"rank 0 expected {plan}, got {decode(header)}")
            forward.run(arrays)
            if forward.outgoing is not None:  # the next round of a model that loops over its layers
                mx.eval(forward.outgoing)
                self._send(plan, forward.outgoing)
        assert forward.logits is not None
        return plan, forward.logits

    def _send(self, plan: StepPlan, arrays: list[mx.array]) -> None:
        if not self._stage.is_whole:
            self._channel.send(encode(plan), arrays)


class Follower:
    """Every other rank's side: obeys one message after the other."""

    def __init__(
        self, stage: Stage, channel: Channel, settings: KVSettings, is_last: bool, progress: Progress = _quiet
    ) -> None:
        self._stage, self._channel, self._progress = stage, channel, progress
        self._is_last = is_last
        self.caches = SlotCaches(stage.model, settings)
        self._next_serial = 0
        self._halfway: dict[int, Forward] = {}  # steps that come round again, in models that loop over their layers

    def follow(self) -> StepPlan | None:
        """Wait for the next message and do what it says. None: it was the last."""
        header, arrays = self._channel.receive()
        if not header:
            if not self._is_last:
                self._channel.send(header, [])
            return None
        plan = decode(header)
        self._progress(f"computing {plan}")
        forward = self._halfway.pop(plan.serial, None)
        if forward is None:
            if plan.serial != self._next_serial:
                raise DesyncError(f"expected step {self._next_serial}, got {plan.serial}")
            self._next_serial += 1
            rearrange(self.caches, plan)
            if not plan.has_rows:
                if not self._is_last:
                    self._channel.send(header, [])
                self._progress(f"waiting after {plan}")
                return plan
            cache = self.caches.at(plan.slots, plan.positions, plan.counts)
            tokens = mx.zeros((len(plan.slots), plan.num_tokens), mx.int32)  # only their number matters here
            forward = self._stage.forward(tokens, cache, plan.wants_logits)
        forward.run(arrays)
        outgoing = forward.outgoing
        if outgoing is not None:
            mx.eval(outgoing)
            self._channel.send(header, outgoing)
        if forward.is_done:
            mx.eval(self.caches.advance(plan.slots, plan.ends))
        else:
            self._halfway[plan.serial] = forward
        self._progress(f"waiting after {plan}")
        return plan


def rearrange(caches: SlotCaches, plan: StepPlan) -> None:
    """What a plan does to the slots before its forward pass."""
    for source, slot in plan.forks:
        caches.fork(source, slot)
    for slot in plan.drops:
        caches.drop(slot)
