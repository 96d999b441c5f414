"""Which sequence does what next. Sequences with work to do take turns; prompts are cut into chunks.

Chunks of a prompt follow one another through the stages without waiting for results; a sequence that decodes
waits for its token. Knows positions and counts. Must not know MLX, text or ranks.
"""

from __future__ import annotations

from collections import deque

from hippo_mpi.engine.request import FinishReason, Sequence
from hippo_mpi.parallel.step_plan import StepPlan


class Scheduler:
    """Makes the StepPlans for the sequences that run."""

    def __init__(self, chunk_tokens: int) -> None:
        self.chunk_tokens = chunk_tokens
        self._turns: deque[Sequence] = deque()
        self._by_serial: dict[int, Sequence] = {}
        self._serial = 0

    @property
    def is_empty(self) -> bool:
        return not self._turns

    @property
    def running(self) -> list[Sequence]:
        return list(self._turns)

    def add(self, sequence: Sequence) -> None:
        self._turns.append(sequence)

    def next_plan(self) -> tuple[StepPlan, list[int]] | None:
        """The next step and its tokens; None while every sequence waits for a token."""
        for _ in range(len(self._turns)):
            sequence = self._turns[0]
            self._turns.rotate(-1)
            if not sequence.awaits_logits:
                return self._plan(sequence)
        return None

    def _plan(self, sequence: Sequence) -> tuple[StepPlan, list[int]]:
        # As mlx_lm.generate does, the prompt's last token is a step of its own.
        todo = len(sequence.tokens) - sequence.position
        count = min(self.chunk_tokens, todo - 1) if todo > 1 else 1
        plan = StepPlan(self._serial, sequence.request.slot, sequence.position, count, wants_logits=todo == 1)
        tokens = sequence.tokens[sequence.position : sequence.position + count]
        self._serial += 1
        sequence.position += count
        if plan.wants_logits:
            sequence.awaits_logits = True
            self._by_serial[plan.serial] = sequence
        return plan, tokens

    def sequence_of(self, plan: StepPlan) -> Sequence:
        return self._by_serial[plan.serial]

    def commit(self, plan: StepPlan, token: int, finish_reason: FinishReason | None) -> None:
        """Append a step's token; a sequence that has finished leaves."""
        sequence = self._by_serial.pop(plan.serial)
        sequence.awaits_logits = False
        sequence.tokens.append(token)
        if finish_reason is not None:
            sequence.finish_reason = finish_reason
            self._turns.remove(sequence)

    def release(self, slot: int) -> StepPlan:
        """The plan that frees a slot on every rank."""
        plan = StepPlan(self._serial, slot, 0, 0, wants_logits=False)
        self._serial += 1
        return plan
