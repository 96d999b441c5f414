"""From logits to tokens, row by row, in the order of operations of mlx_lm.generate. Samplers are mlx-lm's.

Legend: B rows, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import mlx.core as mx
import numpy as np
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from hippo_mpi.engine.grammar import GrammarMask
from hippo_mpi.engine.request import SamplingParams, TokenLogprobs
from hippo_mpi.engine.thinking import Thinking

_MIN_LOGPROB = -9999.0  # OpenAI's value for "impossible"
_MIN_TEMP = 1e-6  # float32 can't hold the reciprocal of much less: all tokens would become equally likely


class TokenSampler:
    """Samples the tokens of one request, with its own logits processors and random numbers.

    Args:
        params: how to sample.
        special_tokens: tokens that XTC sampling never excludes.
        vocab_size: width of the logits.
        thinking: follows whether the answer is inside a thought.
        grammar: the grammar that the answer must follow outside thoughts.
        end_tokens: tokens that end an answer; made all but impossible before `params.min_tokens`.
    """

    def __init__(
        self,
        params: SamplingParams,
        special_tokens: list[int],
        vocab_size: int,
        thinking: Thinking,
        grammar: GrammarMask | None = None,
        end_tokens: Sequence[int] = (),
    ) -> None:
        self.num_logprobs, self._thinking, self._grammar = params.logprobs, thinking, grammar
        self.error: Exception | None = None  # raised while a token was chosen
        temp = params.temp if params.temp >= _MIN_TEMP else 0.0
        self._sampler = make_sampler(
            temp, params.top_p, params.min_p, params.min_tokens_to_keep,
            params.top_k if params.top_k < vocab_size else 0,
            xtc_probability=params.xtc_probability, xtc_threshold=params.xtc_threshold,
            xtc_special_tokens=special_tokens,
        )  # fmt: skip
        self._processors = make_logits_processors(
            logit_bias=dict(params.logit_bias) or None,
            repetition_penalty=params.repetition_penalty,
            repetition_context_size=params.repetition_context_size,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
        )
        self._key = None if params.seed is None or temp == 0 else mx.random.key(params.seed % 2**64)
        self._num_to_go, self._forced = params.min_tokens, deque(params.forced)
        ends = np.isin(np.arange(vocab_size), end_tokens)
        self._against_end = mx.array(np.where(ends, _MIN_LOGPROB, 0.0)) if params.min_tokens else None
        is_changed = self._processors or grammar or thinking.is_limited or params.min_tokens or params.forced
        self.is_greedy = temp == 0 and not is_changed

    @property
    def random_state(self) -> list[int] | None:
        """State of this request's own random numbers; None if it has none (no seed, or greedy)."""
        return None if self._key is None else cast(list[int], self._key.tolist())

    @random_state.setter
    def random_state(self, state: list[int] | None) -> None:
        self._key = None if state is None else mx.array(state, mx.uint32)

    def choose(self, tokens: list[int], logits: mx.array) -> tuple[mx.array, mx.array]:
        """Choose what follows `tokens` from logits (1, V); return log-probabilities (1, V) and a token (1,).

        An exception is stored in `error` instead of raised, and the token then means nothing, so that other rows go on.
        """
        try:
            logprobs = self.logprobs(tokens, logits)
            return logprobs, self.sample(logprobs)
        except Exception as error:
            self.error = error
            return logits, mx.argmax(logits, axis=-1)

    def logprobs(self, tokens: list[int], logits: mx.array) -> mx.array:
        """Return the log-probabilities (1, V) of what follows `tokens`, from logits (1, V)."""
        for processor in self._processors:
            logits = processor(mx.array(tokens), logits)
        if self._against_end is not None and self._num_to_go > 0:
            logits = logits + self._against_end.astype(logits.dtype)
        if (forced := self._thinking.forced(logits)) is not None:
            logits = forced
        elif self._grammar is not None and not self._thinking.is_open:
            logits = self._grammar(logits, self._thinking.first)
        return logits - mx.logsumexp(logits, axis=-1, keepdims=True)

    def accept(self, token: int) -> None:
        """Advance by one token of the answer.

        Raises:
            FieldError: the grammar doesn't allow it.
        """
        self._num_to_go -= 1
        if self._forced:
            self._forced.popleft()
        is_thought = self._thinking.is_open or token == self._thinking.first
        self._thinking.accept(token)
        if self._grammar is not None and not is_thought:
            self._grammar.accept(token)

    def sample(self, logprobs: mx.array) -> mx.array:
        """Sample a token (1,) from log-probabilities (1, V); with a seed, using the same numbers as mlx_lm.generate."""
        if self._forced:
            return mx.array([self._forced[0]], mx.uint32)
        if self._key is None:
            return cast(mx.array, self._sampler(logprobs))
        # mlx-lm's samplers use MLX's global random state: put this request's there meanwhile.
        state = cast(list[mx.array], mx.random.state)
        others = mx.array(state[0])
        state[0][:] = self._key
        try:
            token = cast(mx.array, self._sampler(logprobs))
            self._key = mx.array(state[0])
        finally:
            state[0][:] = others
        return token


@dataclass
class SampledTokens:
    """The next token of each row, unevaluated: `ids` (B,), with the log-probabilities (B, V) of all tokens."""

    samplers: Sequence[TokenSampler]
    ids: mx.array
    _logprobs: mx.array

    def evaluate(self) -> list[tuple[int, TokenLogprobs | None]]:
        """Evaluate the tokens, have each row's sampler accept its own, and return them with the logprobs asked for.

        A sampler that has an error accepts nothing; one that raises keeps the error for its own request.
        """
        ids = cast(list[int], self.ids.tolist())
        return [(token, self._accept(row, token)) for row, token in enumerate(ids)]

    def _accept(self, row: int, token: int) -> TokenLogprobs | None:
        sampler = self.samplers[row]
        if sampler.error is not None:
            return None
        try:
            sampler.accept(token)
            return None if sampler.num_logprobs is None else _tell(self._logprobs[row], token, sampler.num_logprobs)
        except Exception as error:  # concerns this row only
            sampler.error = error
            return None


def sample_tokens(samplers: Sequence[TokenSampler], tokens: Sequence[list[int]], logits: mx.array) -> SampledTokens:
    """Sample the next token of each row, without evaluating it.

    Args:
        samplers: one per row.
        tokens: each row's tokens so far.
        logits: (B, V).
    """
    if all(sampler.is_greedy for sampler in samplers):
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        return SampledTokens(samplers, mx.argmax(logprobs, axis=-1), logprobs)
    rows = [c.choose(t, logits[row : row + 1]) for row, (c, t) in enumerate(zip(samplers, tokens, strict=True))]
    return SampledTokens(
        samplers, mx.concatenate([token for _, token in rows]), mx.concatenate([logprobs for logprobs, _ in rows])
    )


def _tell(logprobs: mx.array, token: int, count: int) -> TokenLogprobs:
    count = min(count, logprobs.size)
    top = mx.argsort(-logprobs)[:count] if count else mx.zeros((0,), mx.uint32)
    ids, values = cast(list[int], top.tolist()), cast(list[float], logprobs[top].tolist())
    (chosen,) = cast(list[float], logprobs[token : token + 1].tolist())
    return TokenLogprobs(_finite(chosen), [(i, _finite(v)) for i, v in zip(ids, values, strict=True)])


def _finite(logprob: float) -> float:
    """Return what JSON can express, unlike -inf (of a token that a grammar or a bias rules out) and NaN (of an overflow)."""
    return logprob if logprob >= _MIN_LOGPROB else _MIN_LOGPROB
