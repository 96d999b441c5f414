"""The loop on rank 0: schedule, exchange, sample, advance, emit, commit.

While a step is computed, the graph of the next one is built on its still unevaluated tokens, because building takes
Python milliseconds (here 2.5 of 47 for 12 layers). mlx_lm does the same but starts the next step at once; on a CPU, MLX
then can't update the KV caches in place (59 % of the rate at 3,000 tokens of context), so this loop waits until the
first step is done.
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
from hippo_mpi.engine.loops import RepetitionDetector
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
from hippo_mpi.engine.sampling import SampledTokens, TokenSampler, sample_tokens
from hippo_mpi.engine.scheduler import Scheduler
from hippo_mpi.engine.text import AnswerText, find_stop
from hippo_mpi.engine.thinking import Thinking
from hippo_mpi.errors import ForeignError, HippoError
from hippo_mpi.parallel.step import Step, StepResult, StepRunner
from hippo_mpi.planning.machine import longest_chunk

_log = logging.getLogger(__name__)
_POLL_INTERVAL_S = 0.05  # between looks for new requests while every request waits for its grammar


class Engine:
    """Answers requests with a runner's steps.

    Args:
        runner: begins and finishes steps.
        tokenizer: for end tokens and text.
        limits: what may be in flight at once.
        max_context: most tokens that a prompt and its answer may have together.
        vocab_size: width of the logits; MLX doesn't check that tokens are below it.
        prefix_budget: room for the caches of ended requests, kept for requests with the same prefix; None: keep none.
        propose: proposes draft tokens; None: decode one token per step.

    Raises:
        UserError: `propose` is given, but this model can't verify several tokens in one step.
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
            check = check_rows(runner, serials, limits.deadline_s)
            limits = replace(limits, can_batch=check.can_batch, can_pad=check.can_pad)
        limits = replace(limits, longest_chunk=longest_chunk())
        if propose is not None:
            check_drafting(runner, serials)
        prefixes = PrefixCache(prefix_budget, lambda slot: runner.slot_limits(slot).can_trim)
        self._scheduler = Scheduler(runner.depth, limits, prefixes, serials)
        self.limits = limits
        self._sequences: dict[int, Sequence] = {}
        self._arrivals = count()
        self._compiling: dict[int, tuple[Request, int, Compiling]] = {}  # whose grammar isn't compiled yet, by arrival
        self._ended_early: list[RequestOutput] = []  # to be returned by the next step
        newline = list(tokenizer.encode("\n", add_special_tokens=False))
        self._special_tokens = newline + list(tokenizer.eos_token_ids)
        self.on_prefill: Callable[[int, int], None] = lambda done, total: None
        self.on_begin: Callable[[list[int]], None] = lambda request_ids: None
        """Called with the ids of requests just before their first step, or their grammar, is computed."""
        self.on_wait: Callable[[int], None] = lambda request_id: None
        """Called with the id of a request whose grammar has been compiled, and which waits for its first step."""

    @property
    def is_idle(self) -> bool:
        """True if no step, request or output is pending."""
        is_empty = self._scheduler.is_empty and self._scheduler.is_settled
        return is_empty and not self._compiling and not self._ended_early

    @property
    def num_waiting(self) -> int:
        """Requests that aren't admitted yet, including those whose grammar is being compiled."""
        return self._scheduler.num_waiting + len(self._compiling)

    def add(self, request: Request) -> None:
        """Queue a request; errors that it meets later are reported in its last output.

        Raises:
            UserError: it can never be answered; the message has the numbers.
        """
        check_request(request.prompt, request.sampling, self._max_context, self._vocab_size)
        allowed = min(request.sampling.max_tokens, self._max_context - len(request.prompt))
        request = replace(request, sampling=replace(request.sampling, max_tokens=allowed))
        arrival = next(self._arrivals)
        if request.sampling.grammar is None:
            self._queue(request, arrival)
            return
        self.on_begin([request.id])
        self._compiling[request.id] = request, arrival, self._grammars.compile(request.sampling.grammar)

    def _queue(self, request: Request, arrival: int, grammar: GrammarMask | None = None) -> None:
        thinking = Thinking(self._tokenizer, request.prompt, request.sampling.max_thinking_tokens)
        end_tokens = sorted(self._tokenizer.eos_token_ids)
        sampler = TokenSampler(request.sampling, self._special_tokens, self._vocab_size, thinking, grammar, end_tokens)
        timings = Timings(prompt_tokens=len(request.prompt))
        text = AnswerText(self._tokenizer, request.prompt if request.sampling.keep_space else ())
        sequence = Sequence(request, list(request.prompt), sampler, text, timings, arrival)
        if request.sampling.max_repeats:
            sequence.repetition = RepetitionDetector(request.sampling.max_repeats)
        if request.resume is not None:
            _resume(sequence, request.resume)
        self._sequences[request.id] = sequence
        self._scheduler.add(sequence)

    def _queue_compiled(self) -> None:
        for number, (request, arrival, compiling) in list(self._compiling.items()):
            if compiling.is_due:
                del self._compiling[number]
                try:
                    self._queue(request, arrival, compiling.mask())
                    self.on_wait(number)
                except Exception as error:
                    self._ended_early.append(_failed(number, Timings(prompt_tokens=len(request.prompt)), error))

    def _await_grammar(self) -> None:
        """Wait until one of the grammars is compiled, but no longer than one poll interval."""
        wait([compiling.matcher for _, _, compiling in self._compiling.values()], _POLL_INTERVAL_S, "FIRST_COMPLETED")
        self._runner.note_progress("compiling grammars")

    def abort(self, request_id: int) -> None:
        """End a request early; its last output comes with one of the next steps. Unknown and ended ids are ignored."""
        sequence = self._sequences.get(request_id)
        if sequence is not None and self._scheduler.abort(sequence):
            self._ended_early.append(self._ended(sequence))
        if request_id in self._compiling:
            request, _, compiling = self._compiling.pop(request_id)
            if all(other is not compiling for _, _, other in self._compiling.values()):
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
        """Begin a step if there is one, and return the outputs of an earlier one."""
        self._queue_compiled()
        outputs, self._ended_early = self._ended_early, []
        step = None if self._runner.is_ahead else self._scheduler.next_step(self._draft())
        if step is not None or self._runner.num_in_flight:
            outputs += self._exchange(step)
        elif self._compiling and not outputs:
            self._await_grammar()
        return outputs

    def _exchange(self, step: Step | None) -> list[RequestOutput]:
        """Hand the ranks a step, take an earlier one's result, and have the step after that computed meanwhile."""
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
        places = [place for place, row in enumerate(result.step.rows) if not row.is_ended]  # a row may end in between
        sampled = _sample(result, places, 0) if places else None
        if sampled is None:
            self._runner.advance()
        else:
            self._runner.advance(self._ahead(result.step), sampled.ids[:, None])
        return self._take(result, places, sampled)

    def _draft(self) -> list[int]:
        """Return draft tokens if the next step decodes a single sequence; larger micro-batches are efficient as is."""
        sequence = None if self._propose is None else self._scheduler.next_alone()
        if self._propose is None or sequence is None:
            return []
        # A step yields one token besides the drafts, and the last token of an answer needs no room in the cache.
        revocable = self._runner.slot_limits(sequence.slot).num_revocable
        max_tokens = min(sequence.max_total_tokens - len(sequence.tokens) - 1, revocable - 1)
        return self._propose(sequence, max_tokens) if max_tokens > 0 else []

    def _ahead(self, step: Step) -> Step | None:
        """Return the step that follows, if it can be built before its tokens are known; one with drafts can't."""
        if not self._runner.can_look_ahead or (self._propose is not None and len(step.rows) == 1):
            return None
        return self._scheduler.step_ahead(step)

    def _take(self, result: StepResult, places: list[int], sampled: SampledTokens | None) -> list[RequestOutput]:
        """Emit each row's sampled token, then one more after each draft token, for as long as the draft matches.

        Args:
            result: the step and its logits (B, L, V).
            places: indices of the rows that haven't ended.
            sampled: the tokens that follow these rows' first ones; None if there are no rows.
        """
        step, outputs, ended = result.step, list[RequestOutput](), list[Sequence]()
        for place in places:
            step.rows[place].timings.num_draft_tokens += len(step.drafts[place])
        for offset in range(step.plan.num_tokens):
            accepted = []
            for place, (token, logprobs) in zip(places, sampled.evaluate() if sampled else [], strict=True):
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
            places, sampled = accepted, _sample(result, accepted, offset + 1)
        self._scheduler.commit(step, ended)
        return outputs

    def _ended(self, sequence: Sequence) -> RequestOutput:
        del self._sequences[sequence.request.id]
        return RequestOutput(sequence.request.id, "", None, sequence.timings, finish_reason="abort")

    def _emit(self, sequence: Sequence, token: int, logprobs: TokenLogprobs | None) -> RequestOutput:
        """Return what this token adds to its answer, or the error that ends the request."""
        if sequence.is_aborted:
            return self._ended(sequence)
        try:
            if sequence.sampler.error is not None:
                raise sequence.sampler.error
            return self._continued(sequence, token, logprobs)
        except Exception as error:  # ends this request; others go on
            del self._sequences[sequence.request.id]
            return _failed(sequence.request.id, sequence.timings, error)

    def _continued(self, sequence: Sequence, token: int, logprobs: TokenLogprobs | None) -> RequestOutput:
        """Return the text that is safe to show now, with a finish reason if the answer ends with this token."""
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
        if reason is None and sequence.repetition and sequence.repetition.take(token, sequence.detokenizer.text):
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
        state = sequence.sampler.random_state
        return RequestOutput(sequence.request.id, shown, token, timings, logprobs, reason, random_state=state)


def _failed(request_id: int, timings: Timings, error: Exception) -> RequestOutput:
    """Return the last output of a request that failed."""
    if not isinstance(error, HippoError):
        error = unexpected(request_id, error)
    return RequestOutput(request_id, "", None, timings, finish_reason="error", error=error)


def unexpected(request_id: int, error: Exception) -> HippoError:
    """Log an unexpected error of a request with its traceback, and return the error to show its client."""
    _log.error("internal error in request %d", request_id, exc_info=error)
    return ForeignError(f"internal error ({type(error).__name__}): please report it with the traceback in the log")


def _sample(result: StepResult, places: list[int], offset: int) -> SampledTokens:
    """Sample a token for each row in `places` from the logits at position `offset` of the step."""
    rows, logits = [result.step.rows[place] for place in places], result.logits
    if len(places) < len(result.step.rows):
        logits = logits[mx.array(places, mx.int32)]
    return sample_tokens([row.sampler for row in rows], [row.tokens for row in rows], logits[:, offset, :])


def _resume(sequence: Sequence, resume: Resume) -> None:
    """Bring a new sequence to the point that an earlier set of ranks had reached."""
    sequence.tokens += resume.tokens
    sequence.emitted_chars = resume.emitted_chars
    if resume.random_state is not None:
        sequence.sampler.random_state = resume.random_state
    for token in resume.tokens:
        sequence.detokenizer.add_token(token)
        # Read after every token, as the first time: reading makes mlx-lm's naive detokenizer settle lines.
        text = sequence.detokenizer.text
        if sequence.repetition:
            sequence.repetition.take(token, text)
        sequence.timings.note(token)
        sequence.sampler.accept(token)
