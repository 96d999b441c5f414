"""The loop on rank 0: plan, step, sample, commit, emit."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import mlx.core as mx
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from hippo_mpi.engine.request import FinishReason, Request, RequestOutput, Sequence, Timings
from hippo_mpi.engine.scheduler import Scheduler
from hippo_mpi.engine.text import find_stop
from hippo_mpi.parallel.worker import Leader


class Engine:
    """Answers requests with a Leader's steps.

    Args:
        leader: begins and finishes steps.
        tokenizer: for end tokens and text.
        prefill_step_size: how many tokens of a prompt one step takes; None: as suits the number of stages.
    """

    def __init__(self, leader: Leader, tokenizer: TokenizerWrapper, prefill_step_size: int | None = None) -> None:
        self._leader, self._tokenizer = leader, tokenizer
        self._scheduler = Scheduler(leader.max_in_flight, prefill_step_size)
        self.timings: dict[int, Timings] = {}
        self.on_prefill: Callable[[int, int], None] = lambda done, total: None

    def can_cut(self, slot: int) -> bool:
        """Whether a slot's cache may lose tokens at its end."""
        return self._leader.caches.can_trim(slot)

    def add(self, request: Request) -> None:
        params = request.sampling
        special = list(self._tokenizer.encode("\n", add_special_tokens=False)) + list(self._tokenizer.eos_token_ids)
        sampler = make_sampler(
            params.temp, params.top_p, params.min_p, params.min_tokens_to_keep, params.top_k,
            xtc_probability=params.xtc_probability, xtc_threshold=params.xtc_threshold, xtc_special_tokens=special,
        )  # fmt: skip
        processors = make_logits_processors(
            repetition_penalty=params.repetition_penalty, repetition_context_size=params.repetition_context_size
        )
        sequence = Sequence(
            request, list(request.prompt), request.cached_tokens, sampler, processors, self._tokenizer.detokenizer
        )
        self._scheduler.add(sequence)
        self.timings[request.id] = Timings(
            time.perf_counter(), prompt_tokens=len(request.prompt), cached_tokens=request.cached_tokens
        )

    def release(self, slot: int) -> None:
        self._leader.step(self._scheduler.release(slot), [])

    def run(self) -> Iterator[RequestOutput]:
        """Step until every request has finished."""
        while not self._scheduler.is_empty:
            planned = self._scheduler.next_plan()
            finished = self._leader.step(*planned) if planned else self._leader.step(None, [])
            if planned:
                self._report_prefill(planned[0].position + planned[0].num_tokens)
            if finished is None:
                continue
            plan, logits = finished
            sequence = self._scheduler.sequence_of(plan)
            token = _sample(sequence, logits)
            output = self._emit(sequence, token)
            self._scheduler.commit(plan, token, output.finish_reason)
            yield output

    def _report_prefill(self, position: int) -> None:
        for sequence in self._scheduler.running:
            if sequence.position == position <= len(sequence.request.prompt):
                self.on_prefill(position, len(sequence.request.prompt))

    def _emit(self, sequence: Sequence, token: int) -> RequestOutput:
        """Text that is safe to show, and whether the answer ends with this token."""
        timings = self.timings[sequence.request.id]
        timings.finished_s = time.perf_counter()
        if not timings.token_ids:
            timings.first_token_s = timings.finished_s
        timings.token_ids.append(token)
        params = sequence.request.sampling
        reason: FinishReason | None = None
        if token in self._tokenizer.eos_token_ids:
            reason = "stop"
        else:
            sequence.detokenizer.add_token(token)
            if len(timings.token_ids) == params.max_tokens:
                reason = "length"
        if reason:
            sequence.detokenizer.finalize()
        text = sequence.detokenizer.text
        cut, safe = find_stop(text, params.stop_words)
        if cut is not None:
            reason, text = "stop", text[:cut]
        end = len(text) if reason else safe
        shown, sequence.emitted_chars = text[sequence.emitted_chars : end], max(end, sequence.emitted_chars)
        return RequestOutput(sequence.request.id, shown, token, reason)


def _sample(sequence: Sequence, logits: mx.array) -> int:
    """The next token, in the order of operations of mlx_lm.generate."""
    last = logits[:, -1, :]
    for processor in sequence.logits_processors:
        last = processor(mx.array(sequence.tokens), last)
    logprobs = last - mx.logsumexp(last, keepdims=True)
    return int(sequence.sampler(logprobs).item())
