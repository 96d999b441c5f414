"""Steps through the ring: what rank 0 does (`Leader`) and what every other rank does (`Follower`).

Rank 0 pushes steps and pops results in the same order; up to one step per stage is in flight. The others obey:
receive, compute, send on. Everything they do follows from the StepPlan that travels in front of the arrays.

Python takes some milliseconds to build a step's graph. So plans run ahead of arrays: each rank announces a step as
soon as it knows the shapes of what it will send, and the next rank builds its graph while the first one computes.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import mlx.core as mx

from hippo_mpi.errors import DesyncError
from hippo_mpi.parallel.step import SlotLimits, Step, StepResult
from hippo_mpi.parallel.step_plan import StepPlan, decode, encode
from hippo_mpi.sharding.slot_caches import KVSettings, SlotCaches
from hippo_mpi.sharding.stage import Forward, Stage
from hippo_mpi.transport.channel import Channel, Message
from hippo_mpi.transport.pulse import Activity, Progress


def _quiet(doing: str, activity: Activity = Activity.OTHER) -> None:
    pass


@dataclass(eq=False)
class _Built:
    """A step whose graph has been built."""

    step: Step
    forward: Forward
    state: list[mx.array] = field(default_factory=list)  # arrays of caches, to be evaluated with it

    @property
    def plan(self) -> StepPlan:
        return self.step.plan


class Leader:
    """Rank 0's side, a StepRunner: begins steps and returns logits.

    `exchange` begins a step and builds the logits of the one that is due. `advance` waits for these logits, then begins
    a step whose graph was built meanwhile.
    """

    def __init__(
        self, stage: Stage, channel: Channel, settings: KVSettings, num_stages: int, progress: Progress = _quiet
    ) -> None:
        self._stage, self._channel, self._progress = stage, channel, progress
        # A model that loops over its layers goes round the ring several times per step: only one at a time keeps order.
        self._is_looped = stage.flow.num_rounds > 1
        self._num_stages = 1 if self._is_looped else num_stages
        self._computing = Activity.TOGETHER if stage.is_sharded else Activity.COMPUTING
        self.caches = SlotCaches(stage.model, settings)
        self._in_flight: deque[_Built] = deque()
        self._ahead: _Built | None = None  # being computed, and not in flight yet
        self._begun: _Built | None = None
        self._due: tuple[_Built | None, Message | None] = None, None

    @property
    def num_in_flight(self) -> int:
        """Return how many steps have been begun whose result hasn't been taken."""
        return len(self._in_flight) + self.is_ahead

    @property
    def depth(self) -> int:
        """Return how many steps keep every stage busy: one per stage, including the one being begun."""
        return self._num_stages

    @property
    def can_look_ahead(self) -> bool:
        """Return whether a step's graph can be built before its tokens are known."""
        return not self._stage.flow.looks_at_values and self._stage.is_lazy

    @property
    def is_ahead(self) -> bool:
        """Return whether `advance` has begun the next step already, in which case `exchange` takes no other."""
        return self._ahead is not None

    def note_progress(self, doing: str) -> None:
        """Tell the watchdog that rank 0 makes progress outside a step."""
        self._progress(doing)

    def slot_limits(self, slot: int) -> SlotLimits:
        """Return what a slot's caches allow."""
        return SlotLimits(self.caches.can_trim(slot), self.caches.num_revocable(slot))

    def exchange(self, step: Step | None) -> StepResult | None:
        """Begin a step and build the logits of the oldest one in flight, if it is due.

        Args:
            step: the step to begin; None: wait for the oldest one.

        Returns:
            The step that is due with its logits (B, L, V), not to be evaluated before `advance`; None if no step is
            due, or if it wanted no logits.

        Raises:
            DesyncError: a message belongs to another step.
        """
        plan = None if step is None else step.plan
        if plan is not None and not plan.has_rows:
            rearrange(self.caches, plan)
            if not self._stage.is_alone:
                self._channel.announce(encode(plan), [])
            mx.eval(self.caches.moved())
            return None
        begun, self._ahead = self._ahead, None
        if step is not None:
            assert begun is None, "another step comes first"
            self._progress(f"computing {step.plan}", self._computing)
            padded = [row + [0] * (step.plan.num_tokens - len(row)) for row in step.tokens]
            begun = self._build(step, mx.array(padded, mx.int32))
            self._submit(begun)
        due = None
        if begun is not None and (self._is_looped or begun.forward.logits is not None):
            self._send(begun)
            due, begun = begun, None
        elif self._in_flight and (begun is None or len(self._in_flight) >= self._num_stages - 1):
            due = self._in_flight.popleft()
        self._begun, self._due = begun, (due, self._finish(due) if due is not None else None)
        if due is None or not due.plan.wants_logits:
            return None
        assert due.forward.logits is not None
        return StepResult(due.step, due.forward.logits)

    def advance(self, ahead: Step | None = None, ids: mx.array | None = None) -> None:
        """Send the step that `exchange` began, and wait for the result that it returned.

        Order: compute the new step, receive the oldest result, then send the new one (schedule.py says why).

        Args:
            ahead: the step that comes next, if `can_look_ahead`. Its graph is built while others are computed, but it
                is begun only afterwards, so that MLX can update the caches in place.
            ids: (B, L), its tokens, unevaluated, computed from the logits.
        """
        built = self._build(ahead, ids) if ahead is not None and ids is not None else None
        due, message = self._due
        if due is not None and message is not None:
            message.wait()
            self._progress(f"finishing {due.plan}", Activity.FINISHING)
        if self._begun is not None:
            self._send(self._begun)
            if not self._begun.forward.is_done:
                self._in_flight.append(self._begun)
        if due is not None:
            mx.eval(due.state, [] if ids is None else ids)
            due.state = []  # references to the caches would keep MLX from updating them in place
        if built is not None:
            self._progress(f"computing {built.plan}", self._computing)
            self._submit(built)
        self._begun, self._due, self._ahead = None, (None, None), built

    def _build(self, step: Step, ids: mx.array) -> _Built:
        plan = step.plan
        if self._stage.is_sharded:  # before the first sum, in which the others take part
            self._channel.announce(encode(plan), [])
        rearrange(self.caches, plan)
        cache = self.caches.at(plan.slots, plan.positions, plan.counts)
        built = _Built(step, self._stage.forward(ids, cache, plan.wants_logits))
        built.forward.run(None)
        if built.forward.is_done or not self._is_looped:
            built.state = self.caches.advance(plan.slots, plan.ends)
        return built

    def _submit(self, step: _Built) -> None:
        """Start computing a step, and announce to the next rank what will be sent."""
        if step.forward.outgoing is not None:
            self._announce(step.plan, step.forward.outgoing)
            mx.async_eval(step.forward.outgoing)  # type: ignore[no-untyped-call]
        elif step.forward.logits is not None:
            mx.async_eval(step.forward.logits)  # type: ignore[no-untyped-call]

    def _send(self, step: _Built) -> None:
        """Send a step on once it is computed; evaluate its caches while it is on its way."""
        if step.forward.outgoing is not None:
            mx.eval(step.forward.outgoing)
            if self._stage.sends:
                self._channel.deliver(step.forward.outgoing)
        if step.forward.logits is None:
            mx.eval(step.state)
            step.state = []

    def _finish(self, step: _Built) -> Message | None:
        """Follow a step round the ring until the model's code has returned; return the message still to be awaited."""
        forward, message = step.forward, None
        if forward.is_done:
            return None
        while not forward.is_done:
            self._progress(f"waiting for {step.plan}", Activity.WAITING)
            message = self._channel.receive()
            if decode(message.header) != step.plan:
                raise DesyncError(f"rank 0 expected {step.plan}, got {decode(message.header)}")
            forward.run(message.arrays)
            if forward.outgoing is not None:  # the next round of a model that loops over its layers
                self._announce(step.plan, forward.outgoing)
                message.wait()
                self._progress(f"finishing {step.plan}", Activity.FINISHING)
                message = None
                mx.eval(forward.outgoing)
                self._channel.deliver(forward.outgoing)
        if self._is_looped:
            step.state = self.caches.advance(step.plan.slots, step.plan.ends)
        return message

    def _announce(self, plan: StepPlan, arrays: list[mx.array]) -> None:
        if self._stage.sends:
            self._channel.announce(encode(plan), arrays)


class Follower:
    """Every other rank's side: carries out one message after the other.

    Where several ranks hold a stage, the first of them receives its input, and the last one sends what it makes; the
    others pass on what rank 0 has planned before they take part in the stage's sums.
    """

    def __init__(
        self, stage: Stage, channel: Channel, settings: KVSettings, is_last: bool, progress: Progress = _quiet
    ) -> None:
        self._stage, self._channel, self._progress = stage, channel, progress
        self._is_last = is_last
        self._computing = Activity.TOGETHER if stage.is_sharded else Activity.COMPUTING
        self.caches = SlotCaches(stage.model, settings)
        self._next_serial = 0
        self._halfway: dict[int, Forward] = {}  # steps that come round again, by serial (models with looped layers)

    def follow(self) -> StepPlan | None:
        """Wait for the next message and carry it out.

        Returns:
            The plan that it carried; None if it was the last message.

        Raises:
            DesyncError: a step was skipped, or doesn't fit what this rank holds.
        """
        message = self._channel.receive()
        header = message.header
        if not header:
            if not self._is_last:
                self._channel.send(header, [])
            return None
        plan = decode(header)
        forward = self._halfway.pop(plan.serial, None)
        if forward is None:
            if plan.serial != self._next_serial:
                raise DesyncError(f"expected step {self._next_serial}, got {plan.serial}")
            self._next_serial += 1
            rearrange(self.caches, plan)
            if not plan.has_rows:
                if not self._is_last:
                    self._channel.send(header, [])
                mx.eval(self.caches.moved())
                self._progress(f"waiting after {plan}", Activity.WAITING)
                return plan
            if not self._stage.sends:
                self._channel.announce(header, [])
            cache = self.caches.at(plan.slots, plan.positions, plan.counts)
            tokens = mx.zeros((len(plan.slots), plan.num_tokens), mx.int32)  # only their shape matters here
            forward = self._stage.forward(tokens, cache, plan.wants_logits)
        self._compute(plan, forward, message)
        if forward.is_done:
            mx.eval(self.caches.advance(plan.slots, plan.ends))
        else:
            self._halfway[plan.serial] = forward
        self._progress(f"waiting after {plan}", Activity.WAITING)
        return plan

    def _compute(self, plan: StepPlan, forward: Forward, message: Message) -> None:
        """Run this stage's part of a step.

        The graph is built while the rank before still computes the input; the phantoms are walked through while this
        rank computes.
        """
        looks = self._stage.flow.looks_at_values or not self._stage.is_lazy
        if looks:
            message.wait()
            self._progress(f"computing {plan}", self._computing)  # such a model computes while its graph is built
        forward.run(message.arrays)
        outgoing = forward.outgoing
        if outgoing is not None and self._stage.sends:
            self._channel.announce(message.header, outgoing)
        if not looks:
            message.wait()
        self._progress(f"computing {plan}", self._computing)
        if outgoing is not None:
            mx.async_eval(outgoing)  # type: ignore[no-untyped-call]
        if not forward.is_done:
            forward.run(None)
        if outgoing is not None:
            mx.eval(outgoing)
            if self._stage.sends:
                self._channel.deliver(outgoing)


def rearrange(caches: SlotCaches, plan: StepPlan) -> None:
    """Apply a plan's forks, detached slots and drops, in this order, before its forward pass."""
    for source, slot in plan.forks:
        caches.fork(source, slot)
    caches.detach(plan.detached)
    caches.drop(plan.drops)
