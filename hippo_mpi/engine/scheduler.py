"""Which rows take the next step: WAITING -> PREFILLING -> RUNNING -> finished.

Sequences that run are spread evenly over as many micro-batches as there are stages, so that every stage has one
to work on: one request runs alone, many fill the batches. Prompts go through in chunks that follow one another
without waiting for results, short ones several at a time; between two steps of running sequences at most
`max_batch_tokens` prompt tokens go in. They take turns because mlx-lm's models compute rows of equal length: in one
pass with running rows a chunk would pad each of them to its own length (16 rows and a chunk of 15 tokens, 6 layers of
768: one pass 402 ms, two passes 85 ms; only a single row beside a chunk of a few tokens gains).

Knows positions and counts. Must not know MLX, text or ranks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from hippo_mpi.engine.prefill_pace import PrefillPace
from hippo_mpi.engine.prefix_cache import PrefixCache
from hippo_mpi.engine.request import Propose, Sequence
from hippo_mpi.parallel.step_plan import StepPlan

_MOST_PADDING = 2  # prompts that are read together are padded to at most this multiple of the shortest
_CHUNKS_PER_STAGE = 8  # with 8 chunks a stage, filling and draining the pipeline costs 1 part in 16 at 2 stages


@dataclass(frozen=True)
class Limits:
    """What may be in flight at once."""

    max_batch_size: int = 1  # sequences that prefill or run
    max_batch_tokens: int = 512  # prompt tokens between two steps of the running sequences
    cache_tokens: int | None = None  # that sequences may need together, padded to the longest; None: no limit
    prefill_chunk: int | None = None  # prompt tokens per step; None: as suits the number of stages
    can_batch: bool | None = None  # whether rows may share a step; None: the engine asks the model, also for can_pad
    can_pad: bool = False  # whether prompts of different lengths may be read in one step, padded on the right
    longest_chunk: int = 2048  # prompt tokens per step on one stage; the engine asks the machine
    deadline_s: float | None = None  # after which a rank that is in a step counts as stuck; None: never


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


@dataclass(eq=False)
class _Step:
    """One in flight."""

    batch: _MicroBatch
    rows: list[Sequence]
    draft: list[int]  # tokens behind its only row's last one


class Scheduler:
    """Makes the StepPlans.

    Args:
        num_stages: steps that keep every stage busy.
        serials: numbers for the plans.
        propose: drafts tokens for rows that run alone; fuller micro-batches have rows enough.
        num_revocable: how many tokens a slot could take on and lose again.
    """

    def __init__(
        self,
        num_stages: int,
        limits: Limits,
        prefixes: PrefixCache,
        serials: Iterator[int],
        propose: Propose | None = None,
        num_revocable: Callable[[int], int] = lambda slot: 0,
    ) -> None:
        self._num_stages, self._limits, self._prefixes, self._serials = num_stages, limits, prefixes, serials
        self._pace = PrefillPace(limits.deadline_s)
        self._waiting: deque[Sequence] = deque()
        self._prefilling: deque[Sequence] = deque()
        # Rows that can't share a step take turns instead, each a micro-batch of its own.
        count = num_stages if limits.can_batch else max(num_stages, limits.max_batch_size)
        self._batches = deque(_MicroBatch() for _ in range(count))
        self._in_flight: dict[int, _Step] = {}
        self._propose, self._num_revocable = propose, num_revocable
        self._free_slots: list[int] = []
        self._num_slots = 0
        self._forks: list[tuple[int, int]] = []
        self._parts: list[int] = []
        self._drops: list[int] = []
        self._begun: list[int] = []  # requests whose first step has been planned since `take_begun`
        self._prompt_tokens = 0  # that went in since the last step of a running sequence
        self._is_short_s_turn = False  # whether the next chunk is of the shortest prompt, not of the oldest

    # ---- what there is

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> list[Sequence]:
        return [sequence for batch in self._batches for sequence in (*batch.rows, *batch.joining)]

    @property
    def first_prompt(self) -> Sequence | None:
        """The prompt that is being read."""
        return self._prefilling[0] if self._prefilling else None

    @property
    def is_empty(self) -> bool:
        return not self._waiting and not self._prefilling and not self.running

    @property
    def is_settled(self) -> bool:
        """Whether no slot that is kept lies among others' rows, and takes their room."""
        return not self._parts

    # ---- what changes it

    def add(self, sequence: Sequence) -> None:
        self._waiting.append(sequence)

    def abort(self, sequence: Sequence) -> bool:
        """Take a sequence out; False if it is in flight: then `commit` does it."""
        resting = [batch.rows for batch in self._batches if not batch.is_in_flight]
        for queue in (self._waiting, self._prefilling, *(batch.joining for batch in self._batches), *resting):
            if sequence in queue:
                queue.remove(sequence)
                self._release(sequence)
                return True
        sequence.is_aborted = True
        return False

    def forget_prefixes(self) -> None:
        self._drop(self._prefixes.clear())

    def next_plan(self) -> tuple[StepPlan, list[list[int]]] | None:
        """The next step and its tokens by row; None while every micro-batch is in flight or empty."""
        self._admit()
        self._balance()
        self._begin_first_prompt()
        batch = next((b for b in self._batches if b.size and not b.is_in_flight), None)
        whole_room = max(1, self._limits.max_batch_tokens // self._num_stages)
        room = whole_room - self._prompt_tokens
        if self._prefilling and (not self.running or room >= min(whole_room, self._next_count())):
            return self._prefill(room)
        if batch is not None:
            return self._decode(batch)
        if self.is_empty and (self._drops or self._forks or self._parts):
            return self._plan(), []
        return None

    def take_begun(self) -> list[int]:
        """Requests whose first step has been planned since this was asked last."""
        begun, self._begun = self._begun, []
        return begun

    def rows_of(self, plan: StepPlan) -> list[Sequence]:
        return self._in_flight[plan.serial].rows

    def draft_of(self, plan: StepPlan) -> list[int]:
        """The draft tokens that its only row has behind its last one."""
        return self._in_flight[plan.serial].draft

    def plan_ahead(self, plan: StepPlan) -> StepPlan | None:
        """What follows `plan` before its tokens are known: the same rows. None if anything else may come first."""
        batch, rows = self._in_flight[plan.serial].batch, self._in_flight[plan.serial].rows
        others_come_first = (
            self._waiting or self._prefilling or any(b.size and not b.is_in_flight for b in self._batches)
        )
        rows_may_change = batch.joining or batch.size > min(other.size for other in self._batches) + 1
        if others_come_first or rows_may_change or (self._propose and len(rows) == 1):
            return None
        if any(row.is_ended or row.is_aborted or len(row.tokens) + 1 >= row.most_tokens for row in rows):
            return None
        return self._decode(batch)[0]

    def commit(self, plan: StepPlan, ended: list[Sequence]) -> None:
        """A step's tokens have been appended to its rows'; those that have `ended` leave behind their last step."""
        step = self._in_flight.pop(plan.serial)
        batch = step.batch
        batch.num_in_flight -= 1
        if step.draft:
            step.rows[0].position = len(step.rows[0].tokens) - 1
        for sequence in ended:
            sequence.is_ended = True
        if not batch.is_in_flight:
            gone = [row for row in batch.rows if row.is_ended]
            batch.rows = [row for row in batch.rows if not row.is_ended]
            for sequence in gone:
                self._release(sequence, in_company=len(step.rows) > 1)

    def note_step(self, plan: StepPlan, took_s: float) -> None:
        """Learn from how long a step took, if it was one of prompts."""
        if not plan.wants_logits:
            self._pace.note(len(plan.slots) * plan.num_tokens, took_s)

    # ---- how it decides

    def _admit(self) -> None:
        """Let requests in while there is room; they come in order, so that none waits for ever."""
        limit = self._limits.cache_tokens
        while self._waiting:
            candidates = [*self._prefilling, *self.running, self._waiting[0]]
            if len(candidates) > self._limits.max_batch_size:
                return
            needed = len(candidates) * max(sequence.most_tokens for sequence in candidates)
            if limit is not None and needed > limit and len(candidates) > 1:  # one alone fits by the plan
                return
            self._prefilling.append(self._waiting.popleft())

    def _prefill(self, room: int) -> tuple[StepPlan, list[list[int]]]:
        """The next chunk of a prompt, or the rest of several. Last tokens are decoded, as in mlx_lm.generate."""
        most_tokens = min(self._chunk_tokens(), room) if self.running else self._chunk_tokens()
        rows = self._prompts_together(self._whose_turn(), most_tokens)
        starts = [sequence.position for sequence in rows]
        counts = [min(_tokens_left(sequence), most_tokens) for sequence in rows]
        self._prompt_tokens += len(rows) * max(counts)
        for sequence, count in zip(rows, counts, strict=True):
            sequence.position += count
        self._join([sequence for sequence in rows if not _tokens_left(sequence)])
        tokens = [row.tokens[start : row.position] for row, start in zip(rows, starts, strict=True)]
        return self._plan(rows, starts, counts, wants_logits=False), tokens

    def _next_count(self) -> int:
        """Tokens of the first prompt that its next step should read: no less, as every step costs."""
        return min(_tokens_left(self._prefilling[0]), self._chunk_tokens())

    def _whose_turn(self) -> Sequence:
        """The oldest prompt and the shortest take turns: so a huge one keeps nobody waiting for long, and isn't kept."""
        oldest, *others = self._prefilling
        self._is_short_s_turn = not self._is_short_s_turn
        if self._is_short_s_turn:
            return oldest
        for sequence in sorted(others, key=_tokens_left):
            if sequence.slot < 0:
                if self._is_worth_waiting(sequence, oldest, self._num_cached(sequence)):
                    continue
                self._begin(sequence, *self._cached(sequence))
            if 0 < _tokens_left(sequence) < _tokens_left(oldest):
                return sequence
        return oldest

    def _prompts_together(self, first: Sequence, most_tokens: int) -> list[Sequence]:
        """A prompt, and others of much the same length if all can be read to their ends in one step."""
        rows = [first]
        most_padding = _MOST_PADDING if self._limits.can_pad else 1
        shortest = longest = _tokens_left(first)
        others = [sequence for sequence in self._prefilling if sequence is not first]
        for sequence in others if self._limits.can_batch and longest <= most_tokens else []:
            if sequence.slot < 0:
                cached = self._num_cached(sequence)
                if any(self._is_worth_waiting(sequence, row, cached) for row in rows):
                    continue
                self._begin(sequence, *self._cached(sequence))
            left = _tokens_left(sequence)
            low, high = min(shortest, left), max(longest, left)
            if 0 < high <= most_padding * low and high * (len(rows) + 1) <= most_tokens:
                rows.append(sequence)
                shortest, longest = low, high
        return rows

    def _begin_first_prompt(self) -> None:
        """Prompts that are cached but for their last token run at once."""
        while self._prefilling and self._prefilling[0].slot < 0:
            self._begin(self._prefilling[0], *self._cached(self._prefilling[0]))

    def _cached(self, sequence: Sequence) -> tuple[int, int]:
        """(slot, number of tokens) of what is cached of a prompt."""
        salt = sequence.request.cache_salt
        alike = (other for other in self.running if other.request.cache_salt == salt)
        others = ((other.slot, other.tokens[: other.position]) for other in alike)
        return self._prefixes.match(sequence.tokens, others, salt) or (-1, 0)

    def _is_worth_waiting(self, sequence: Sequence, other: Sequence, cached: int) -> bool:
        """Whether more of a prompt will be cached when another, which isn't read yet, is."""
        is_alike = sequence.request.cache_salt == other.request.cache_salt
        return is_alike and self._prefixes.is_worth_waiting(sequence.tokens, other.tokens, cached)

    def _num_cached(self, sequence: Sequence) -> int:
        """How many tokens of a prompt are cached, looked for only if others are kept or run than the last time: a prompt
        that waits is asked about before every step."""
        known = self._prefixes.version, tuple(other.slot for other in self.running)
        if sequence.searched is None or sequence.searched[0] != known:
            sequence.searched = known, self._cached(sequence)[1]
        return sequence.searched[1]

    def _begin(self, sequence: Sequence, cached_slot: int, count: int) -> None:
        """Give a prompt a slot that begins with `count` cached tokens."""
        if self._prefixes.take(cached_slot, count):
            sequence.slot = cached_slot
        else:
            sequence.slot = self._new_slot()
            self._forks += [(cached_slot, sequence.slot)] if count else []
        sequence.position = sequence.timings.cached_tokens = count
        if not _tokens_left(sequence):
            self._join([sequence])

    def _join(self, read: list[Sequence]) -> None:
        """Put prompts that have been read into the micro-batch with the fewest rows; their caches lie together."""
        for sequence in read:
            self._prefilling.remove(sequence)
        min(self._batches, key=lambda batch: batch.size).joining += read

    def _balance(self) -> None:
        """Rows leave by chance: move some, so that no stage waits for a fuller micro-batch than its own."""
        smallest = min(self._batches, key=lambda batch: batch.size)
        for batch in self._batches:
            while not batch.is_in_flight and batch.size > smallest.size + 1:
                smallest.joining.append((batch.joining or batch.rows).pop())

    def _decode(self, batch: _MicroBatch) -> tuple[StepPlan, list[list[int]]]:
        self._batches.remove(batch)
        self._batches.append(batch)  # the others come first next time
        self._prompt_tokens = 0
        batch.rows, batch.joining = [*batch.rows, *batch.joining], []
        starts = [sequence.position for sequence in batch.rows]
        draft = self._drafted(batch.rows[0]) if self._propose and len(batch.rows) == 1 else []
        for sequence in batch.rows:
            sequence.position += 1
        plan = self._plan(batch.rows, starts, [1 + len(draft)] * len(starts), wants_logits=True)
        batch.num_in_flight += 1
        self._in_flight[plan.serial] = _Step(batch, list(batch.rows), draft)
        return plan, [[sequence.tokens[-1], *draft] for sequence in batch.rows]

    def _drafted(self, sequence: Sequence) -> list[int]:
        assert self._propose is not None
        # The step itself brings one token, and the last one of an answer needs no cache.
        most = min(sequence.most_tokens - len(sequence.tokens) - 1, self._num_revocable(sequence.slot) - 1)
        return self._propose(sequence, most) if most > 0 else []

    def _plan(
        self,
        rows: list[Sequence] | None = None,
        starts: list[int] | None = None,
        counts: list[int] | None = None,
        wants_logits: bool = False,
    ) -> StepPlan:
        slots = tuple(sequence.slot for sequence in rows or [])
        for sequence in rows or []:
            if not sequence.is_begun:
                sequence.is_begun = True
                self._begun.append(sequence.request.id)
        forks, parts, drops = tuple(self._forks), tuple(self._parts), tuple(self._drops)
        self._forks, self._parts, self._drops = [], [], []
        self._free_slots += drops
        return StepPlan(
            next(self._serials), slots, tuple(starts or []), tuple(counts or []), wants_logits, forks, parts, drops
        )

    def _chunk_tokens(self) -> int:
        unread = sum(len(s.request.prompt) - s.timings.cached_tokens for s in self._prefilling)
        if self._limits.prefill_chunk is not None:
            return self._limits.prefill_chunk
        return self._pace.limit(chunk_tokens(unread, self._num_stages, self._limits.longest_chunk))

    # ---- slots

    def _release(self, sequence: Sequence, in_company: bool = False) -> None:
        """A sequence has ended: its cache is kept for others to begin with, or freed."""
        if sequence.slot >= 0:
            tokens, salt = sequence.tokens[: sequence.position], sequence.request.cache_salt
            gone = self._prefixes.keep(sequence.slot, tokens, salt)
            self._parts += [sequence.slot] if in_company and sequence.slot not in gone else []
            self._drop(gone)

    def _drop(self, slots: list[int]) -> None:
        self._drops += slots

    def _new_slot(self) -> int:
        if self._free_slots:
            return self._free_slots.pop()
        self._num_slots += 1
        return self._num_slots - 1


def chunk_tokens(unread_tokens: int, num_stages: int, longest: int) -> int:
    """Prompt tokens per step: few enough that the chunks keep all stages busy, enough to be efficient."""
    if num_stages == 1:
        return longest
    return max(64, min(512, longest, -(-unread_tokens // (_CHUNKS_PER_STAGE * num_stages))))


def _tokens_left(sequence: Sequence) -> int:
    """Prompt tokens that aren't cached yet, but for the last."""
    return len(sequence.tokens) - 1 - sequence.position
