"""The loop on rank 0: plan, step, draw, look ahead, emit, commit.

While a step is computed, the graph of the next one is built on its tokens, which nobody knows yet: Python takes
milliseconds for it (here 2.5 of 47 for 12 layers). mlx_lm does so, too, and begins it at once: on a CPU, MLX then can't
update the KV caches in place (59 % of the rate at 3,000 tokens of context), so ours waits until the first is done.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from dataclasses import replace
from itertools import count

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper

from hippo_mpi.engine.grammar import Compiling, GrammarMask, Grammars
from hippo_mpi.engine.loops import LoopWatch
from hippo_mpi.engine.prefix_cache import PrefixBudget, PrefixCache
from hippo_mpi.engine.request import (
    FinishReason,
    Propose,
    Request,
    RequestOutput,
    Resume,
    Sequence,
    Timings,
    TokenLogprobs,
    check_request,
)
from hippo_mpi.engine.row_check import check_drafting, check_rows
from hippo_mpi.engine.sampling import Chooser, Drawn, draw
from hippo_mpi.engine.scheduler import Limits, Scheduler
from hippo_mpi.engine.text import AnswerText, find_stop
from hippo_mpi.engine.thinking import Thinking
from hippo_mpi.errors import ForeignError, HippoError
from hippo_mpi.parallel.step_plan import StepPlan
from hippo_mpi.parallel.worker import Leader
from hippo_mpi.planning.machine import longest_chunk

_log = logging.getLogger(__name__)
_LOOK_S = 0.05  # at requests, while there is nothing to do but to wait for a grammar


class Engine:
    """Answers requests with a Leader's steps.

    Args:
        leader: begins and finishes steps.
        tokenizer: for end tokens and text.
        limits: what may be in flight at once.
        max_context: most tokens that a prompt and its answer may have together.
        vocab_size: width of the logits; MLX doesn't check that tokens are below it.
        prefix_budget: for the caches of ended requests that are kept for others that begin like them; None: none.
        propose: drafts what may come next; None: tokens are made one by one.

    Raises:
        UserError: `propose` is given, but tokens of this model can't be checked several at once.
    """

    def __init__(
        self,
        leader: Leader,
        tokenizer: TokenizerWrapper,
        limits: Limits,
        max_context: int,
        vocab_size: int,
        prefix_budget: PrefixBudget | None = None,
        propose: Propose | None = None,
    ) -> None:
        self._leader, self._tokenizer = leader, tokenizer
        self._max_context, self._vocab_size = max_context, vocab_size
        self._grammars = Grammars(tokenizer, vocab_size)
        serials = count()
        if limits.can_batch is None and limits.max_batch_size > 1:
            check = check_rows(leader, serials)
            limits = replace(limits, can_batch=check.can_batch, can_pad=check.can_pad)
        limits = replace(limits, longest_chunk=longest_chunk())
        if propose is not None:
            check_drafting(leader, serials)
        caches = leader.caches
        prefixes = PrefixCache(prefix_budget, caches.can_trim)
        self._scheduler = Scheduler(leader.max_in_flight, limits, prefixes, serials, propose, caches.num_revocable)
        self.limits = limits
        self._sequences: dict[int, Sequence] = {}
        self._compiling: dict[int, tuple[Request, Compiling]] = {}  # requests whose grammar isn't compiled yet
        self._ended_early: list[RequestOutput] = []  # to be told with the next step
        newline = list(tokenizer.encode("\n", add_special_tokens=False))
        self._special_tokens = newline + list(tokenizer.eos_token_ids)
        self.on_prefill: Callable[[int, int], None] = lambda done, total: None
        self.on_begin: Callable[[list[int]], None] = lambda request_ids: None
        """Told of requests before the first step of theirs, or their grammar, is computed."""

    @property
    def is_idle(self) -> bool:
        is_empty = self._scheduler.is_empty and self._scheduler.is_settled
        return is_empty and not self._compiling and not self._ended_early

    @property
    def num_waiting(self) -> int:
        return self._scheduler.num_waiting + len(self._compiling)

    def add(self, request: Request) -> None:
        """Queue a request. What it meets later is in its last output.

        Raises:
            UserError: it can never be answered; the message has the numbers.
        """
        check_request(request.prompt, request.sampling, self._max_context, self._vocab_size)
        allowed = min(request.sampling.max_tokens, self._max_context - len(request.prompt))
        request = replace(request, sampling=replace(request.sampling, max_tokens=allowed))
        if request.sampling.grammar is None:
            self._queue(request)
            return
        self.on_begin([request.id])
        self._compiling[request.id] = request, self._grammars.compile(request.sampling.grammar)

    def _queue(self, request: Request, grammar: GrammarMask | None = None) -> None:
        thinking = Thinking(self._tokenizer, request.prompt, request.sampling.max_thinking_tokens)
        end_tokens = sorted(self._tokenizer.eos_token_ids)
        chooser = Chooser(request.sampling, self._special_tokens, self._vocab_size, thinking, grammar, end_tokens)
        timings = Timings(prompt_tokens=len(request.prompt))
        text = AnswerText(self._tokenizer, request.prompt if request.sampling.keep_space else ())
        sequence = Sequence(request, list(request.prompt), chooser, text, timings)
        if request.sampling.max_repeats:
            sequence.loops = LoopWatch(request.sampling.max_repeats)
        if request.resume is not None:
            _resume(sequence, request.resume)
        self._sequences[request.id] = sequence
        self._scheduler.add(sequence)

    def _queue_compiled(self) -> None:
        for number, (request, compiling) in list(self._compiling.items()):
            if compiling.is_due:
                del self._compiling[number]
                try:
                    self._queue(request, compiling.mask())
                except Exception as error:
                    self._ended_early.append(_failed(number, Timings(prompt_tokens=len(request.prompt)), error))

    def _await_grammar(self) -> None:
        """Wait for the first of the grammars that are being compiled, but not for long."""
        wait([compiling.matcher for _, compiling in self._compiling.values()], _LOOK_S, "FIRST_COMPLETED")
        self._leader.note_progress("compiling grammars")

    def abort(self, request_id: int) -> None:
        """End a request early. Its last output comes with the next steps; unknown and ended ones are ignored."""
        sequence = self._sequences.get(request_id)
        if sequence is not None and self._scheduler.abort(sequence):
            self._ended_early.append(self._ended(sequence))
        if request_id in self._compiling:
            request, compiling = self._compiling.pop(request_id)
            if all(other is not compiling for _, other in self._compiling.values()):
                self._grammars.forget(compiling)
            timings = Timings(prompt_tokens=len(request.prompt))
            self._ended_early.append(RequestOutput(request_id, "", None, timings, finish_reason="abort"))

    def forget_prefixes(self) -> None:
        """Free the caches of ended requests, on every rank."""
        self._scheduler.forget_prefixes()
        self.step()

    def run(self) -> Iterator[RequestOutput]:
        """Step until every request has finished."""
        while not self.is_idle:
            yield from self.step()

    def step(self) -> list[RequestOutput]:
        """Begin a step, if any can be, and emit what an older one gave."""
        self._queue_compiled()
        outputs, self._ended_early = self._ended_early, []
        planned = None if self._leader.is_ahead else self._scheduler.next_plan()
        if planned is None and not self._leader.num_in_flight:
            if self._compiling and not outputs:
                self._await_grammar()
            return outputs
        if begun := self._scheduler.take_begun():
            self.on_begin(begun)
        began_s = time.monotonic()
        finished = self._leader.collect(*planned or (None, []))
        if first := self._scheduler.first_prompt:
            self.on_prefill(first.position, len(first.request.prompt))
        if finished is None:
            self._leader.go_on()
            if planned is not None and planned[0].has_rows:
                self._scheduler.note_step(planned[0], time.monotonic() - began_s)
            return outputs
        plan, logits = finished
        rows, logits = self._running(plan, logits)
        if not rows:
            self._leader.go_on()
            self._scheduler.commit(plan, [])
            return outputs
        drawn = _draw(rows, logits, 0)
        ahead = self._scheduler.plan_ahead(plan) if self._leader.can_look_ahead else None
        self._leader.go_on(ahead, drawn.ids[:, None])
        return outputs + self._take(plan, rows, logits, drawn)

    def _running(self, plan: StepPlan, logits: mx.array) -> tuple[list[Sequence], mx.array]:
        """The rows of a step without those that have ended since it was begun, and their logits."""
        rows = self._scheduler.rows_of(plan)
        places = [place for place, row in enumerate(rows) if not row.is_ended]
        if len(places) == len(rows):
            return rows, logits
        return [rows[place] for place in places], logits[mx.array(places, mx.int32)]

    def _take(self, plan: StepPlan, rows: list[Sequence], logits: mx.array, drawn: Drawn) -> list[RequestOutput]:
        """Emit the token of each row, and behind draft tokens one after the other, for as long as those are the same."""
        draft = self._scheduler.draft_of(plan)
        outputs: list[RequestOutput] = []
        for place in range(plan.num_tokens):
            sampled = (drawn if place == 0 else _draw(rows, logits, place)).read()
            emitted = [self._emit(row, *chosen) for row, chosen in zip(rows, sampled, strict=True)]
            for row, (token, _) in zip(rows, sampled, strict=True):
                row.tokens.append(token)
            outputs += emitted
            if emitted[-1].finish_reason or draft[place : place + 1] != rows[-1].tokens[-1:]:
                break
        if draft:
            rows[0].timings.num_draft_tokens += len(draft)
            rows[0].timings.num_accepted += len(outputs) - 1
        self._scheduler.commit(plan, [row for row, output in zip(rows, emitted, strict=True) if output.finish_reason])
        return outputs

    def _ended(self, sequence: Sequence) -> RequestOutput:
        del self._sequences[sequence.request.id]
        return RequestOutput(sequence.request.id, "", None, sequence.timings, finish_reason="abort")

    def _emit(self, sequence: Sequence, token: int, logprobs: TokenLogprobs | None) -> RequestOutput:
        """What this token adds to its answer; or the error that ends it."""
        if sequence.is_aborted:
            return self._ended(sequence)
        try:
            if sequence.chooser.error is not None:
                raise sequence.chooser.error
            return self._continued(sequence, token, logprobs)
        except Exception as error:  # others go on
            del self._sequences[sequence.request.id]
            return _failed(sequence.request.id, sequence.timings, error)

    def _continued(self, sequence: Sequence, token: int, logprobs: TokenLogprobs | None) -> RequestOutput:
        """Text that is safe to show, and whether the answer ends with this token."""
        timings, params = sequence.timings, sequence.request.sampling
        timings.note(token)
        reason: FinishReason | None = None
        is_forced = len(timings.token_ids) <= len(params.forced)
        if token in self._tokenizer.eos_token_ids and not (params.ignore_eos or is_forced):
            reason = "stop"
        else:
            sequence.detokenizer.add_token(token)
            if len(timings.token_ids) >= params.max_tokens:
                reason = "length"
        if reason is None and sequence.loops and sequence.loops.take(token, sequence.detokenizer.text):
            reason = "repetition"
        if reason:
            sequence.detokenizer.finalize()
        text = sequence.detokenizer.text
        cut, safe = find_stop(text, params.stop_words)
        if cut is not None:
            reason, text = "stop", text[:cut]
        end = len(text) if reason else safe
        shown, sequence.emitted_chars = text[sequence.emitted_chars : end], max(end, sequence.emitted_chars)
        if reason:
            del self._sequences[sequence.request.id]
        state = sequence.chooser.random_state
        return RequestOutput(sequence.request.id, shown, token, timings, logprobs, reason, random_state=state)


def _failed(request_id: int, timings: Timings, error: Exception) -> RequestOutput:
    """The last output of a request that has met an error."""
    if not isinstance(error, HippoError):
        error = unexpected(request_id, error)
    return RequestOutput(request_id, "", None, timings, finish_reason="error", error=error)


def unexpected(request_id: int, error: Exception) -> HippoError:
    """Log what nobody expected of a request, and return what its client is told."""
    _log.error("request %d has met a mistake of ours", request_id, exc_info=error)
    return ForeignError(
        f"a mistake of the server's ({type(error).__name__}): please report it, with the traceback in its log"
    )


def _draw(rows: list[Sequence], logits: mx.array, place: int) -> Drawn:
    """What follows the tokens of each row; `logits` (B, L, V) at `place` are behind these."""
    return draw([row.chooser for row in rows], [row.tokens for row in rows], logits[:, place, :])


def _resume(sequence: Sequence, resume: Resume) -> None:
    """Put a new sequence where an answer was."""
    sequence.tokens += resume.tokens
    sequence.emitted_chars = resume.emitted_chars
    if resume.random_state is not None:
        sequence.chooser.random_state = resume.random_state
    for token in resume.tokens:
        sequence.detokenizer.add_token(token)
        text = (
            sequence.detokenizer.text
        )  # read as it was then: mlx-lm's naive detokenizer settles lines when it is read
        if sequence.loops:
            sequence.loops.take(token, text)
        sequence.timings.note(token)
        sequence.chooser.accept(token)
