"""Which sequence does what next. Sequences with work to do take turns; prompts are cut into chunks.

Chunks of a prompt follow one another through the stages without waiting for results; a sequence that decodes
waits for its token. Knows positions and counts. Must not know MLX, text or ranks.
"""

from __future__ import annotations

from collections import deque

from hippo_mpi.engine.request import FinishReason, Sequence
from hippo_mpi.parallel.step_plan import StepPlan

_WHOLE_CHUNK_TOKENS = 2048  # mlx_lm.generate's
_CHUNKS_PER_STAGE = 8  # with 8 chunks a stage, filling and draining the pipeline costs 1 part in 16 at 2 stages


class Scheduler:
    """Makes the StepPlans for the sequences that run."""

    def __init__(self, num_stages: int, prefill_step_size: int | None = None) -> None:
        self._num_stages, self._prefill_step_size = num_stages, prefill_step_size
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
        count = min(self._chunk_tokens(sequence), todo - 1) if todo > 1 else 1
        plan = StepPlan(self._serial, sequence.request.slot, sequence.position, count, wants_logits=todo == 1)
        tokens = sequence.tokens[sequence.position : sequence.position + count]
        self._serial += 1
        sequence.position += count
        if plan.wants_logits:
            sequence.awaits_logits = True
            self._by_serial[plan.serial] = sequence
        return plan, tokens

    def _chunk_tokens(self, sequence: Sequence) -> int:
        """Prompt tokens per step: few enough that the chunks keep all stages busy, enough to be efficient."""
        if self._prefill_step_size is not None:
            return self._prefill_step_size
        if self._num_stages == 1:
            return _WHOLE_CHUNK_TOKENS
        prompt = len(sequence.request.prompt) - sequence.request.cached_tokens
        return max(64, min(512, -(-prompt // (_CHUNKS_PER_STAGE * self._num_stages))))

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
