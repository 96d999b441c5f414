"""The record of a step, and the protocol of what runs it.

A scheduler makes a `Step`; it comes back in its `StepResult` with everything that the scheduler knew, so that nothing
has to be looked up again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import mlx.core as mx

from hippo_mpi.parallel.step_plan import StepPlan


@dataclass(eq=False)
class Step:
    """One forward pass of some rows through all layers.

    Args:
        plan: what every rank does.
        tokens: each row's, drafts included; empty if they come from another step's logits (`StepRunner.advance`).
        rows: the maker's own object for each row; a runner doesn't look at them.
        drafts: the draft tokens at the end of each row's tokens, which are to be verified.
    """

    plan: StepPlan
    tokens: list[list[int]] = field(default_factory=list)
    rows: list[Any] = field(default_factory=list)
    drafts: list[list[int]] = field(default_factory=list)


@dataclass(frozen=True)
class StepResult:
    """The logits of a step.

    Args:
        step: the step, as it was begun.
        logits: (B, L, V), unevaluated, and not to be evaluated before `StepRunner.advance`.
    """

    step: Step
    logits: mx.array


@dataclass(frozen=True)
class SlotLimits:
    """What a slot's caches allow.

    Args:
        can_trim: whether tokens can be removed at the end.
        num_revocable: how many tokens could be added now and removed again.
    """

    can_trim: bool
    num_revocable: int


class StepRunner(Protocol):
    """Runs steps in the order in which they are begun, each with one call of `exchange` and one of `advance`."""

    @property
    def depth(self) -> int:
        """Return how many steps in flight keep every rank busy, including the one being begun."""

    @property
    def num_in_flight(self) -> int:
        """Return how many steps have been begun whose result hasn't been taken."""

    @property
    def is_ahead(self) -> bool:
        """Return whether `advance` has begun the next step already, in which case `exchange` takes no other."""

    @property
    def can_look_ahead(self) -> bool:
        """Return whether a step can be built before its tokens are known."""

    def exchange(self, step: Step | None) -> StepResult | None:
        """Begin a step, and return the result of the oldest one in flight if it is due.

        Args:
            step: the step to begin; None: wait for the oldest one.

        Returns:
            None if no step is due, or if the one that is due has no result.
        """

    def advance(self, ahead: Step | None = None, ids: mx.array | None = None) -> None:
        """Wait for the result that `exchange` has returned, and begin the step that comes next, if it is known.

        Args:
            ahead: that step, if `can_look_ahead`.
            ids: (B, L), its tokens, unevaluated, computed from the result's logits.
        """

    def slot_limits(self, slot: int) -> SlotLimits:
        """Return what a slot's caches allow; nothing if the slot is empty."""

    def note_progress(self, doing: str) -> None:
        """Tell the watchdog that rank 0 makes progress outside a step."""


def run_step(runner: StepRunner, step: Step | None) -> StepResult | None:
    """Call `exchange`, then `advance`; the logits (B, L, V) of the result may then be evaluated."""
    result = runner.exchange(step)
    runner.advance()
    return result
