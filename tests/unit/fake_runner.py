"""A runner without a model: what it answers depends on what its slots hold, so that a wrong position, fork or slot shows."""

from __future__ import annotations

import sys
import zlib
from collections import deque
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np

from hippo_mpi.errors import DesyncError
from hippo_mpi.parallel.step import SlotLimits, Step, StepResult
from hippo_mpi.parallel.step_plan import StepPlan

VOCAB = 24
END, POISON = 0, 1  # the token that ends answers, and one that the detokenizer doesn't bear
WORDS = "ab c"


def logits_after(tokens: list[int]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """(V,), another for each `tokens`."""
    return np.random.default_rng(zlib.crc32(bytes(tokens))).normal(size=VOCAB).astype(np.float32)


class Slots:
    """What the ranks hold: tokens by slot, and which slots lie in one cache.

    Raises:
        DesyncError: a plan asks for what isn't there.
    """

    def __init__(self, can_trim: bool) -> None:
        self.can_trim = can_trim
        self.tokens: dict[int, list[int]] = {}
        self.company: dict[int, set[int]] = {}

    def rearrange(self, plan: StepPlan) -> None:
        for source, slot in plan.forks:
            if source not in self.tokens or slot in self.tokens:
                raise DesyncError(f"fork of {source} to {slot}, among {sorted(self.tokens)}")
            self._add(slot, self.tokens[source])
        for slot in plan.detached:
            self._add(slot, self.tokens[slot])
        for slot in plan.drops:  # perhaps of a sequence that no step has begun
            self._leave(slot)
            self.tokens.pop(slot, None), self.company.pop(slot, None)

    def take(self, plan: StepPlan, tokens: list[list[int]]) -> list[list[int]]:
        """What each row's slot holds after a step of these tokens."""
        for slot, position, count, row in zip(plan.slots, plan.positions, plan.counts, tokens, strict=True):
            held = self.tokens.get(slot, [])
            if len(row) != count or position > len(held):
                raise DesyncError(f"slot {slot} holds {len(held)} tokens, but {count} come at {position}")
            if 0 < position < len(held) and not self.can_trim:
                raise DesyncError(f"slot {slot} holds {len(held)} tokens and can't be trimmed to {position}")
            self._add(slot, held[:position] + row)
        company = set(plan.slots)
        if len(company) != len(plan.slots):
            raise DesyncError(f"a slot twice: {plan}")
        self.company.update(dict.fromkeys(plan.slots, company))
        return [self.tokens[slot] for slot in plan.slots]

    def _add(self, slot: int, tokens: list[int]) -> None:
        self._leave(slot)
        self.tokens[slot], self.company[slot] = list(tokens), {slot}

    def _leave(self, slot: int) -> None:
        self.company.get(slot, set()).discard(slot)


@dataclass(eq=False)
class _Begun:
    step: Step
    logits: mx.array  # (B, L, V)


class FakeRunner:
    """A StepRunner that begins and finishes steps when the Leader does.

    Args:
        depth: stages.
        can_trim: whether slots may lose tokens.
    """

    def __init__(self, depth: int = 1, can_trim: bool = True, can_look_ahead: bool = True) -> None:
        self.depth, self.can_look_ahead = depth, can_look_ahead
        self.slots = Slots(can_trim)
        self.steps: list[Step] = []
        self._in_flight: deque[_Begun] = deque()
        self._begun: _Begun | None = None
        self._ahead: _Begun | None = None

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight) + self.is_ahead

    @property
    def is_ahead(self) -> bool:
        return self._ahead is not None

    def slot_limits(self, slot: int) -> SlotLimits:
        can_trim = self.slots.can_trim and slot in self.slots.tokens
        is_alone = can_trim and len(self.slots.company[slot]) == 1
        return SlotLimits(can_trim, sys.maxsize if is_alone else 0)

    def note_progress(self, doing: str) -> None:
        pass

    def exchange(self, step: Step | None) -> StepResult | None:
        if step is not None and not step.plan.has_rows:
            self._note(step)
            return None
        begun, self._ahead = self._ahead, None
        if step is not None:
            assert begun is None, "another step comes first"
            begun = self._run(step, step.tokens)
        due = None
        if begun is not None and self.depth == 1 and begun.step.plan.wants_logits:
            due, begun = begun, None
        elif self._in_flight and (begun is None or len(self._in_flight) >= self.depth - 1):
            due = self._in_flight.popleft()
        self._begun = begun
        return None if due is None else StepResult(due.step, due.logits)

    def advance(self, ahead: Step | None = None, ids: mx.array | None = None) -> None:
        begun, self._begun = self._begun, None
        if begun is not None and begun.step.plan.wants_logits:
            self._in_flight.append(begun)
        if ahead is not None:
            assert self.can_look_ahead and ids is not None
            found: Any = ids.tolist()
            self._ahead = self._run(ahead, found)

    def _note(self, step: Step) -> None:
        assert step.plan.serial == len(self.steps), "a step is missing"
        self.steps.append(step)
        self.slots.rearrange(step.plan)

    def _run(self, step: Step, tokens: list[list[int]]) -> _Begun:
        self._note(step)
        held, length = self.slots.take(step.plan, tokens), step.plan.num_tokens
        wanted = range(length) if step.plan.wants_logits else ()
        rows = [[logits_after(row[: len(row) - length + i + 1]) for i in wanted] for row in held]
        return _Begun(step, mx.array(np.array(rows)))


class _Detokenizer:
    def __init__(self) -> None:
        self.text = ""

    def add_token(self, token: int) -> None:
        if token == POISON:
            raise ValueError("poison")
        self.text += WORDS[token % len(WORDS)]

    def finalize(self) -> None:
        pass


class _Tokenizer(SimpleNamespace):
    @property
    def detokenizer(self) -> _Detokenizer:
        return _Detokenizer()


def fake_tokenizer() -> Any:
    return _Tokenizer(eos_token_ids={END}, has_thinking=False, encode=lambda text, add_special_tokens: [2])
