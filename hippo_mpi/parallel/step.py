"""What goes through the ranks and comes back: the record of a step, and what runs it.

A scheduler makes a `Step`; it comes back in its `StepResult` with all that the scheduler knew, so that nobody asks again.
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
        tokens: of each row, drafts included; empty if they are made of another step's logits (`StepRunner.advance`).
        rows: whatever its maker knows each row by; a runner doesn't look at them.
        drafts: the last ones of each row's tokens, which are to be checked.
    """

    plan: StepPlan
    tokens: list[list[int]] = field(default_factory=list)
    rows: list[Any] = field(default_factory=list)
    drafts: list[list[int]] = field(default_factory=list)


@dataclass(frozen=True)
class StepResult:
    """What a step gave.

    Args:
        logits: (B, L, V), unevaluated, and not to be evaluated before `StepRunner.advance`.
    """

    step: Step
    logits: mx.array


@dataclass(frozen=True)
class SlotLimits:
    """What a slot's caches bear.

    Args:
        can_trim: whether it may lose tokens at its end.
        num_revocable: how many tokens it could take on now and lose again.
    """

    can_trim: bool
    num_revocable: int


class StepRunner(Protocol):
    """Runs steps in the order in which they are begun; two calls a time, `exchange` and `advance`."""

    @property
    def depth(self) -> int:
        """Return how many steps in flight keep every rank busy, the one that is being begun among them."""

    @property
    def num_in_flight(self) -> int:
        """Return how many steps have been begun whose result hasn't been taken."""

    @property
    def is_ahead(self) -> bool:
        """Return whether `advance` has begun a step: it is the next one, and `exchange` takes no other."""

    @property
    def can_look_ahead(self) -> bool:
        """Return whether a step can be built before the tokens are known that it is about."""

    def exchange(self, step: Step | None) -> StepResult | None:
        """Begin a step, and return the oldest one's result if it is due, and a step with one.

        Without a step, the oldest is waited for.
        """

    def advance(self, ahead: Step | None = None, ids: mx.array | None = None) -> None:
        """Wait for what `exchange` has returned, and begin the step that comes next, if it is known.

        Args:
            ahead: that step, if `can_look_ahead`.
            ids: (B, L), its tokens, made of the result's logits and unevaluated.
        """

    def slot_limits(self, slot: int) -> SlotLimits:
        """Return what a slot bears; nothing, if it holds nothing."""

    def note_progress(self, doing: str) -> None:
        """Tell the watchdog that rank 0 gets on without a step."""


def run_step(runner: StepRunner, step: Step | None) -> StepResult | None:
    """Call `exchange` and `advance`, so that the logits may be evaluated."""
    result = runner.exchange(step)
    runner.advance()
    return result
