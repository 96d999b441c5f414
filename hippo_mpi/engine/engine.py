"""The loop on rank 0: schedule, exchange, draw, advance, emit, commit.

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
from hippo_mpi.engine.prefill import Limits
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
from hippo_mpi.engine.scheduler import Scheduler
from hippo_mpi.engine.text import AnswerText, find_stop
from hippo_mpi.engine.thinking import Thinking
from hippo_mpi.errors import ForeignError, HippoError
from hippo_mpi.parallel.step import Step, StepResult, StepRunner
from hippo_mpi.planning.machine import longest_chunk

_log = logging.getLogger(__name__)
_LOOK_S = 0.05  # at requests, while there is nothing to do but to wait for a grammar


class Engine:
    """Answers requests with a runner's steps.

    Args:
        runner: begins and finishes steps.
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
        runner: StepRunner,
        tokenizer: TokenizerWrapper,
        limits: Limits,
        max_context: int,
        vocab_size: int,
        prefix_budget: PrefixBudget | None = None,
        propose: Propose | None = None,
    ) -> None:
        self._runner, self._propose, self._tokenizer = runner, propose, tokenizer
        self._max_context, self._vocab_size = max_context, vocab_size
        self._grammars = Grammars(tokenizer, vocab_size)
        serials = count()
        if limits.can_batch is None and limits.max_batch_size > 1:
            check = check_rows(runner, serials)
            limits = replace(limits, can_batch=check.can_batch, can_pad=check.can_pad)
        limits = replace(limits, longest_chunk=longest_chunk())
        if propose is not None:
            check_drafting(runner, serials)
        prefixes = PrefixCache(prefix_budget, lambda slot: runner.slot_limits(slot).can_trim)
        self._scheduler = Scheduler(runner.depth, limits, prefixes, serials)
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
        self._runner.note_progress("compiling grammars")

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
        step = None if self._runner.is_ahead else self._scheduler.next_step(self._draft())
        if step is not None or self._runner.num_in_flight:
            outputs += self._exchange(step)
        elif self._compiling and not outputs:
            self._await_grammar()
        return outputs

    def _exchange(self, step: Step | None) -> list[RequestOutput]:
        """Hand the ranks a step, take what an older one gave, and have the one after it computed meanwhile."""
        if begun := self._scheduler.take_begun():
            self.on_begin(begun)
        began_s = time.monotonic()
        result = self._runner.exchange(step)
        if first := self._scheduler.first_prompt:
            self.on_prefill(first.position, len(first.request.prompt))
        if result is None:
            self._runner.advance()
            if step is not None and step.plan.has_rows:
                self._scheduler.note_step(step.plan, time.monotonic() - began_s)
            return []
        places = [place for place, row in enumerate(result.step.rows) if not row.is_ended]  # since it was begun
        drawn = _draw(result, places, 0) if places else None
        if drawn is None:
            self._runner.advance()
        else:
            self._runner.advance(self._ahead(result.step), drawn.ids[:, None])
        return self._take(result, places, drawn)

    def _draft(self) -> list[int]:
        """Draft tokens for the sequence that the next step decodes by itself; fuller micro-batches have rows enough."""
        sequence = None if self._propose is None else self._scheduler.next_alone()
        if self._propose is None or sequence is None:
            return []
        # The step itself brings one token, and the last one of an answer needs no cache.
        revocable = self._runner.slot_limits(sequence.slot).num_revocable
        most = min(sequence.most_tokens - len(sequence.tokens) - 1, revocable - 1)
        return self._propose(sequence, most) if most > 0 else []

    def _ahead(self, step: Step) -> Step | None:
        """The step that follows, if its tokens needn't be known: drafts come behind them."""
        if not self._runner.can_look_ahead or (self._propose is not None and len(step.rows) == 1):
            return None
        return self._scheduler.step_ahead(step)

    def _take(self, result: StepResult, places: list[int], drawn: Drawn | None) -> list[RequestOutput]:
        """Emit the token of each row, and behind its draft tokens one after the other, for as long as those are the same.

        Args:
            places: of the rows that haven't ended.
            drawn: what follows their first tokens.
        """
        step, outputs, ended = result.step, list[RequestOutput](), list[Sequence]()
        for place in places:
            step.rows[place].timings.num_draft_tokens += len(step.drafts[place])
        for offset in range(step.plan.num_tokens):
            accepted = []
            for place, (token, logprobs) in zip(places, drawn.read() if drawn else [], strict=True):
                row = step.rows[place]
                outputs.append(self._emit(row, token, logprobs))
                row.tokens.append(token)
                if outputs[-1].finish_reason:
                    ended.append(row)
                elif step.drafts[place][offset : offset + 1] == [token]:
                    row.timings.num_accepted += 1
                    accepted.append(place)
            if not accepted:
                break
            places, drawn = accepted, _draw(result, accepted, offset + 1)
        self._scheduler.commit(step, ended)
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


def _draw(result: StepResult, places: list[int], offset: int) -> Drawn:
    """What follows the tokens of these rows, by the logits at `offset` tokens behind their first."""
    rows, logits = [result.step.rows[place] for place in places], result.logits
    if len(places) < len(result.step.rows):
        logits = logits[mx.array(places, mx.int32)]
    return draw([row.chooser for row in rows], [row.tokens for row in rows], logits[:, offset, :])


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
