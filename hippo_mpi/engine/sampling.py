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

_LEAST = -9999.0  # OpenAI's for "impossible"
_LEAST_TEMP = 1e-6  # float32 can't hold the reciprocals of much less, and then all tokens are alike


class Chooser:
    """Chooses the tokens of one request: its sampler, its logits processors, its random numbers.

    Args:
        special_tokens: tokens that XTC sampling never excludes.
        vocab_size: width of the logits.
        thinking: whether the answer is thinking.
        grammar: that the answer must follow when it isn't.
        end_tokens: which end an answer; unlikely beyond measure before its `min_tokens`.
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
        self.error: Exception | None = None  # met when a token was chosen
        temp = params.temp if params.temp >= _LEAST_TEMP else 0.0
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
        self._against_end = mx.array(np.where(ends, _LEAST, 0.0)) if params.min_tokens else None
        is_changed = self._processors or grammar or thinking.is_limited or params.min_tokens or params.forced
        self.is_greedy = temp == 0 and not is_changed

    @property
    def random_state(self) -> list[int] | None:
        """This request's random numbers to come; None if it draws none of its own."""
        return None if self._key is None else cast(list[int], self._key.tolist())

    @random_state.setter
    def random_state(self, state: list[int] | None) -> None:
        self._key = None if state is None else mx.array(state, mx.uint32)

    def choose(self, tokens: list[int], logits: mx.array) -> tuple[mx.array, mx.array]:
        """What follows `tokens`, from logits (1, V): its log-probabilities (1, V), and a token (1,).

        Whatever is raised is noted as `error`, and the token means nothing: other rows go on.
        """
        try:
            logprobs = self.logprobs(tokens, logits)
            return logprobs, self.sample(logprobs)
        except Exception as error:
            self.error = error
            return logits, mx.argmax(logits, axis=-1)

    def logprobs(self, tokens: list[int], logits: mx.array) -> mx.array:
        """Log-probabilities (1, V) of what follows `tokens`, from logits (1, V)."""
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
        """The answer goes on with this token."""
        self._num_to_go -= 1
        if self._forced:
            self._forced.popleft()
        is_thought = self._thinking.is_open or token == self._thinking.first
        self._thinking.accept(token)
        if self._grammar is not None and not is_thought:
            self._grammar.accept(token)

    def sample(self, logprobs: mx.array) -> mx.array:
        """A token from log-probabilities (1, V): (1,). With a seed, the numbers that mlx_lm.generate draws with it."""
        if self._forced:
            return mx.array([self._forced[0]], mx.uint32)
        if self._key is None:
            return cast(mx.array, self._sampler(logprobs))
        # The samplers draw from MLX's one random state: lend it this request's.
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
class Drawn:
    """The next token of each row, unevaluated.

    Legend: ids (B,), logprobs (B, V).
    """

    choosers: Sequence[Chooser]
    ids: mx.array
    _logprobs: mx.array

    def read(self) -> list[tuple[int, TokenLogprobs | None]]:
        """Evaluated, and accepted by each chooser, unless it has met an error; with log-probabilities where wanted."""
        ids = cast(list[int], self.ids.tolist())
        return [(token, self._accept(row, token)) for row, token in enumerate(ids)]

    def _accept(self, row: int, token: int) -> TokenLogprobs | None:
        chooser = self.choosers[row]
        if chooser.error is not None:
            return None
        try:
            chooser.accept(token)
            return None if chooser.num_logprobs is None else _tell(self._logprobs[row], token, chooser.num_logprobs)
        except Exception as error:  # this row's, and no other's
            chooser.error = error
            return None


def draw(choosers: Sequence[Chooser], tokens: Sequence[list[int]], logits: mx.array) -> Drawn:
    """The next token of each row.

    Args:
        choosers, tokens: of each row; the tokens so far.
        logits: (B, V).
    """
    if all(chooser.is_greedy for chooser in choosers):
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        return Drawn(choosers, mx.argmax(logprobs, axis=-1), logprobs)
    rows = [c.choose(t, logits[row : row + 1]) for row, (c, t) in enumerate(zip(choosers, tokens, strict=True))]
    return Drawn(choosers, mx.concatenate([token for _, token in rows]), mx.concatenate([told for told, _ in rows]))


def _tell(logprobs: mx.array, token: int, count: int) -> TokenLogprobs:
    count = min(count, logprobs.size)
    top = mx.argsort(-logprobs)[:count] if count else mx.zeros((0,), mx.uint32)
    ids, values = cast(list[int], top.tolist()), cast(list[float], logprobs[top].tolist())
    (chosen,) = cast(list[float], logprobs[token : token + 1].tolist())
    # What a grammar or a bias rules out has no logarithm, and JSON no infinity.
    return TokenLogprobs(max(chosen, _LEAST), [(i, max(v, _LEAST)) for i, v in zip(ids, values, strict=True)])
