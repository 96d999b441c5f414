"""Decides which rows take the next step: WAITING -> PREFILLING -> RUNNING -> finished.

Running sequences are spread evenly over as many micro-batches as there are stages, so that every stage has one to work
on: one request runs alone, many fill the batches. Between two steps of running sequences at most `max_batch_tokens`
prompt tokens are read. Prefill and decoding take turns because mlx-lm's models compute rows of equal length: in one
pass with running rows, a chunk would pad each of them to its own length (16 rows and a chunk of 15 tokens, 6 layers of
768: one pass 402 ms, two passes 85 ms; only a single row beside a chunk of a few tokens gains).

Knows positions and counts. Must not know MLX, text or ranks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, MutableSequence
from dataclasses import dataclass, field

from hippo_mpi.engine.prefill import Limits, Prefill
from hippo_mpi.engine.prefix_cache import PrefixCache
from hippo_mpi.engine.request import Sequence
from hippo_mpi.engine.slots import Slots
from hippo_mpi.parallel.step import Step
from hippo_mpi.parallel.step_plan import Returns, StepPlan


@dataclass(eq=False)
class _MicroBatch:
    rows: list[Sequence] = field(default_factory=list)  # while in flight, those of its steps
    joining: list[Sequence] = field(default_factory=list)  # rows of its next step
    num_in_flight: int = 0  # steps; two while the first one's tokens are being read

    @property
    def size(self) -> int:
        return len(self.rows) + len(self.joining)

    @property
    def is_in_flight(self) -> bool:
        return self.num_in_flight > 0


class Scheduler:
    """Makes the steps: admits requests, reads prompts, decodes micro-batches.

    Args:
        num_stages: steps in flight that keep every stage busy.
        limits: what may be in flight at once.
        prefixes: keeps the caches of ended sequences.
        serials: numbers for the plans.
    """

    def __init__(self, num_stages: int, limits: Limits, prefixes: PrefixCache, serials: Iterator[int]) -> None:
        self._num_stages, self._limits, self._serials = num_stages, limits, serials
        self._slots = Slots(prefixes)
        self._waiting: deque[Sequence] = deque()
        self._prefill = Prefill(limits, num_stages, self._slots, lambda: self.running, self._join)
        # Rows that can't share a step take turns instead, each a micro-batch of its own.
        count = num_stages if limits.can_batch else max(num_stages, limits.max_batch_size)
        self._batches = deque(_MicroBatch() for _ in range(count))
        self._batch_of: dict[int, _MicroBatch] = {}  # of steps in flight, by serial
        self._begun: list[int] = []  # requests whose first step has been planned since `take_begun`
        self._prompt_tokens = 0  # read since the last step of a running sequence

    # ---- state

    @property
    def num_waiting(self) -> int:
        """Sequences that haven't been admitted."""
        return len(self._waiting)

    @property
    def running(self) -> list[Sequence]:
        """Sequences whose prompts have been read, in the order of their micro-batches."""
        return [sequence for batch in self._batches for sequence in (*batch.rows, *batch.joining)]

    @property
    def first_prompt(self) -> Sequence | None:
        """Oldest sequence whose prompt is being read; None if there is none."""
        return self._prefill.prompts[0] if self._prefill.prompts else None

    @property
    def is_empty(self) -> bool:
        """True if no sequence waits, is being read or runs."""
        return not self._waiting and not self._prefill.prompts and not self.running

    @property
    def is_settled(self) -> bool:
        """Return whether no retained slot still shares a batched cache with other slots."""
        return self._slots.is_settled

    # ---- changes

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence in order of arrival: one whose grammar had to be compiled doesn't lose its place by that."""
        place = len(self._waiting)
        while place and self._waiting[place - 1].arrival > sequence.arrival:
            place -= 1
        self._waiting.insert(place, sequence)

    def abort(self, sequence: Sequence) -> bool:
        """Remove a sequence; False if it is in flight, in which case `commit` removes it later."""
        resting = [batch.rows for batch in self._batches if not batch.is_in_flight]
        joining = [batch.joining for batch in self._batches]
        queues: list[MutableSequence[Sequence]] = [self._waiting, self._prefill.prompts, *joining, *resting]
        for queue in queues:
            if sequence in queue:
                queue.remove(sequence)
                self._slots.release(sequence)
                return True
        sequence.is_aborted = True
        return False

    def forget_prefixes(self) -> None:
        """Free the caches of ended sequences, with the next step."""
        self._slots.forget_prefixes()

    def next_alone(self) -> Sequence | None:
        """Return the sequence that the next step decodes alone, so that draft tokens may be added; None otherwise."""
        batch = self._choose()
        rows = [] if batch is None else [*batch.rows, *batch.joining]
        return rows[0] if len(rows) == 1 else None

    def next_step(self, draft: list[int] | None = None) -> Step | None:
        """Return the next step; None while every micro-batch is in flight or empty.

        Args:
            draft: draft tokens for the sequence that `next_alone` returned.
        """
        batch = self._choose()
        if batch is not None:
            return self._decode(batch, draft or [])
        if self._is_turn_of_prompts:
            return self._read()
        if self.is_empty and self._slots.has_changes:
            return Step(self._plan([], [], []))
        return None

    def take_begun(self) -> list[int]:
        """Return the ids of requests whose first step has been planned since the last call."""
        begun, self._begun = self._begun, []
        return begun

    def step_ahead(self, step: Step) -> Step | None:
        """Return the step of the same rows that follows `step`, without tokens; None if another step may come first."""
        batch = self._batch_of[step.plan.serial]
        others_come_first = (
            self._waiting or self._prefill.prompts or any(b.size and not b.is_in_flight for b in self._batches)
        )
        rows_may_change = batch.joining or batch.size > min(other.size for other in self._batches) + 1
        if others_come_first or rows_may_change:
            return None
        if any(row.is_ended or row.is_aborted or len(row.tokens) + 1 >= row.max_total_tokens for row in step.rows):
            return None
        return self._decode(batch, [], is_ahead=True)

    def commit(self, step: Step, ended: list[Sequence]) -> None:
        """Note that a step's tokens were appended to its rows; rows that have `ended` leave after their last step."""
        batch = self._batch_of.pop(step.plan.serial)
        batch.num_in_flight -= 1
        for row, draft in zip(step.rows, step.drafts, strict=False):
            if draft:
                row.position = len(row.tokens) - 1
        for sequence in ended:
            sequence.is_ended = True
        if not batch.is_in_flight:
            gone = [row for row in batch.rows if row.is_ended]
            batch.rows = [row for row in batch.rows if not row.is_ended]
            for sequence in gone:
                self._slots.release(sequence, was_batched=len(step.rows) > 1)

    def note_step(self, plan: StepPlan, took_s: float) -> None:
        """Adapt the size of prefill steps to the seconds that one took; other steps are ignored."""
        if not plan.wants_logits:
            self._prefill.pace.note(len(plan.slots) * plan.num_tokens, took_s)

    # ---- decisions

    def _choose(self) -> _MicroBatch | None:
        """Admit, rebalance and begin what can be, then return the micro-batch whose turn it is.

        Returns:
            None if prompts are to be read next, or if every micro-batch is empty or in flight.
        """
        self._admit()
        self._balance()
        self._prefill.begin_first()
        if self._is_turn_of_prompts:
            return None
        return next((batch for batch in self._batches if batch.size and not batch.is_in_flight), None)

    @property
    def _is_turn_of_prompts(self) -> bool:
        """True if prompts are read next: nothing runs, or the room suffices for a full chunk of the oldest prompt."""
        if not self._prefill.prompts:
            return False
        return not self.running or self._room >= min(self._whole_room, self._prefill.next_count)

    @property
    def _whole_room(self) -> int:
        """Prompt tokens that may be read between two steps of one micro-batch."""
        return max(1, self._limits.max_batch_tokens // self._num_stages)

    @property
    def _room(self) -> int:
        return self._whole_room - self._prompt_tokens

    def _admit(self) -> None:
        """Admit requests while there is room, strictly in order, so that none starves."""
        limit = self._limits.cache_tokens
        while self._waiting:
            candidates = [*self._prefill.prompts, *self.running, self._waiting[0]]
            if len(candidates) > self._limits.max_batch_size:
                return
            needed = len(candidates) * max(sequence.max_total_tokens for sequence in candidates)
            if limit is not None and needed > limit and len(candidates) > 1:  # the layer split made room for one
                return
            self._prefill.prompts.append(self._waiting.popleft())

    def _join(self, read: list[Sequence]) -> None:
        """Add sequences that were read together to the smallest micro-batch; their caches share a batch already."""
        min(self._batches, key=lambda batch: batch.size).joining += read

    def _balance(self) -> None:
        """Rows finish at random times; rebalance so that micro-batches differ by at most one row."""
        smallest = min(self._batches, key=lambda batch: batch.size)
        for batch in self._batches:
            while not batch.is_in_flight and batch.size > smallest.size + 1:
                smallest.joining.append((batch.joining or batch.rows).pop())

    def _read(self) -> Step:
        """Return a prefill step: the next chunk of one prompt, or the rest of several.

        Last tokens are left to decoding steps, as in mlx_lm.generate.
        """
        chunk = self._prefill.next_chunk(self._room)
        self._prompt_tokens += chunk.num_tokens
        return Step(self._plan(chunk.rows, chunk.starts, chunk.counts), chunk.tokens, list(chunk.rows))

    def _decode(self, batch: _MicroBatch, draft: list[int], is_ahead: bool = False) -> Step:
        self._batches.remove(batch)
        self._batches.append(batch)  # the others come first next time
        self._prompt_tokens = 0
        batch.rows, batch.joining = [*batch.rows, *batch.joining], []
        starts = [sequence.position for sequence in batch.rows]
        for sequence in batch.rows:
            sequence.position += 1
        plan = self._plan(batch.rows, starts, [1 + len(draft)] * len(starts), Returns.LOGITS)
        batch.num_in_flight += 1
        self._batch_of[plan.serial] = batch
        tokens = [] if is_ahead else [[sequence.tokens[-1], *draft] for sequence in batch.rows]
        return Step(plan, tokens, list(batch.rows), [draft] * len(starts))

    def _plan(
        self, rows: list[Sequence], starts: list[int], counts: list[int], returns: Returns = Returns.NOTHING
    ) -> StepPlan:
        for sequence in rows:
            if not sequence.is_begun:
                sequence.is_begun = True
                self._begun.append(sequence.request.id)
        slots, changes = tuple(sequence.slot for sequence in rows), self._slots.take_changes()
        return StepPlan(
            next(self._serials), slots, tuple(starts), tuple(counts), returns,
            changes.forks, changes.detached, changes.drops,
        )  # fmt: skip
