"""The engine's data types: what is asked (Request), what is running (Sequence), what comes out (RequestOutput)."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Literal

from hippo_mpi.config import checks
from hippo_mpi.config.options import SamplingOptions
from hippo_mpi.config.parser import checks_of
from hippo_mpi.engine.loops import RepetitionDetector
from hippo_mpi.errors import ContextError, HippoError, UserError

FinishReason = Literal["stop", "length", "repetition", "abort", "error"]


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of an answer are sampled; names and defaults are mlx_lm.generate's, or else OpenAI's."""

    max_tokens: int = 100
    temp: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    top_k: int = 0
    min_tokens_to_keep: int = 1
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    repetition_penalty: float | None = None
    repetition_context_size: int = 20
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None  # None: sample from MLX's global random state
    logprobs: int | None = None  # how many likeliest tokens to report besides the chosen one; None: no logprobs at all
    stop_words: tuple[str, ...] = ()
    grammar: str | None = None  # that the answer must follow (engine/grammar.py)
    max_thinking_tokens: int | None = None  # a longer thought is ended; None: never
    max_repeats: int = 0  # times in a row that the same tokens or line may come before the answer ends; 0: unlimited
    ignore_eos: bool = False  # go on to max_tokens, for measuring
    min_tokens: int = 0  # no end token is chosen before the answer has this many tokens
    forced: tuple[int, ...] = ()  # the answer's first tokens, given to learn how likely they are
    keep_space: bool = False  # keep an answer's leading space; mlx-lm drops it, but prompt and answer may be one text

    @classmethod
    def from_options(cls, options: SamplingOptions) -> SamplingParams:
        """Return the parameters that the command line sets, except the seed.

        Each command decides by itself whether the seed is shared by all requests or one per request.
        """
        names = (
            "max_tokens", "temp", "top_p", "min_p", "top_k", "min_tokens_to_keep", "xtc_probability", "xtc_threshold",
            "repetition_penalty", "repetition_context_size", "max_repeats",
        )  # fmt: skip
        return cls(**{name: getattr(options, name) for name in names}, stop_words=tuple(options.stop_words))


@dataclass(frozen=True)
class Resume:
    """Progress of an answer that a previous set of ranks started.

    Its tokens, how many characters of its text have been sent, and the state of its random numbers.
    """

    tokens: list[int]
    emitted_chars: int
    random_state: list[int] | None = None


@dataclass(frozen=True)
class Request:
    """A prompt (tokens) and how to answer it.

    With `resume`, the answer goes on from there. Cached prefixes are shared only among requests with the same
    `cache_salt`.
    """

    id: int
    prompt: list[int]
    sampling: SamplingParams
    resume: Resume | None = None
    cache_salt: str = ""


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural logarithms of probabilities: of the chosen token, and (token, logprob) of the likeliest ones."""

    chosen: float
    top: list[tuple[int, float]]


@dataclass
class Timings:
    """When a request's tokens were made (seconds of `time.perf_counter`), and how many."""

    started_s: float = field(default_factory=time.perf_counter)
    first_token_s: float = 0.0
    finished_s: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    num_draft_tokens: int = 0  # proposed by a draft model
    num_accepted: int = 0  # of the draft tokens
    token_ids: list[int] = field(default_factory=list)

    def note(self, token: int) -> None:
        """Record a generated token and the time."""
        self.finished_s = time.perf_counter()
        if not self.token_ids:
            self.first_token_s = self.finished_s
        self.token_ids.append(token)

    @property
    def prompt_tps(self) -> float:
        """Prompt tokens read per second, without the cached ones."""
        return (self.prompt_tokens - self.cached_tokens) / max(self.first_token_s - self.started_s, 1e-9)

    @property
    def generation_tps(self) -> float:
        """Tokens generated per second after the first one; 0.0 if there are none."""
        made = len(self.token_ids) - 1  # the time of the first token counts for the prompt
        return made / max(self.finished_s - self.first_token_s, 1e-9) if made > 0 else 0.0


@dataclass(eq=False)
class Sequence:
    """A request in progress: `tokens` holds prompt and answer so far, of which `position` are in the cache."""

    request: Request
    tokens: list[int]
    sampler: Any  # engine.sampling.TokenSampler
    detokenizer: Any
    timings: Timings
    arrival: int = 0  # how many requests came before
    slot: int = -1  # given when the request is admitted
    position: int = 0
    emitted_chars: int = 0
    is_begun: bool = False  # its first step has been planned
    is_aborted: bool = False
    is_ended: bool = False  # its last output has been made, though a step of it may still be in flight
    repetition: RepetitionDetector | None = None
    searched: tuple[Any, int] | None = None  # the state of the prefix cache at the last search, and tokens it found

    @property
    def max_total_tokens(self) -> int:
        """Most tokens that prompt and answer can have together."""
        return len(self.request.prompt) + self.request.sampling.max_tokens


Propose = Callable[[Sequence, int], list[int]]
"""Proposes up to the given number of next tokens of a sequence."""


@dataclass(frozen=True)
class RequestOutput:
    """What a step added to an answer; the last output of a request has a finish reason."""

    request_id: int
    text: str
    token: int | None  # None when the request was aborted or failed
    timings: Timings
    logprobs: TokenLogprobs | None = None
    finish_reason: FinishReason | None = None
    error: HippoError | None = None  # that ended this request, and no other
    random_state: list[int] | None = None  # after this token, of a request with a seed of its own


def check_request(prompt: list[int], sampling: SamplingParams, max_context: int, vocab_size: int) -> None:
    """Check that a request can be answered.

    Raises:
        UserError: the prompt is empty or too long, or a token is outside the vocabulary.
    """
    if not prompt:
        raise UserError("the prompt has no tokens")
    check_context(len(prompt) + len(sampling.forced), max_context)
    for token in (*prompt, *sampling.forced, *(token for token, _ in sampling.logit_bias)):
        if not 0 <= token < vocab_size:
            raise UserError(f"token {token} is not in the vocabulary of {vocab_size:,} tokens")


_COUNTS = ("logprobs", "min_tokens", "max_thinking_tokens")
_CHECKS = checks_of(SamplingOptions) | dict.fromkeys(_COUNTS, checks.whole)
_OPTIONAL = {name for name, default in vars(SamplingParams()).items() if default is None}


def check_sampling(sampling: SamplingParams) -> None:
    """Check parameters that a script has given, with the words of the command line, which checks its own.

    Raises:
        UserError: a parameter has an invalid value.
    """
    for name, check in _CHECKS.items():
        value = getattr(sampling, name)
        if value is None and name in _OPTIONAL:
            continue
        try:
            check(repr(value) if isinstance(value, str) else str(value))
        except argparse.ArgumentTypeError as error:
            raise UserError(f"{name}: {error}") from None
    words, biases = sampling.stop_words, sampling.logit_bias
    if not isinstance(words, tuple | list) or not all(isinstance(word, str) for word in words):
        raise UserError(f"stop_words: {words!r} is not a list of strings")
    if not isinstance(biases, tuple | list) or not all(_is_bias(pair) for pair in biases):
        raise UserError(f"logit_bias: {biases!r} is not a list of pairs (token, number)")
    for name in ("presence_penalty", "frequency_penalty"):
        value = getattr(sampling, name)
        if value is not None and not _is_number(value):
            raise UserError(f"{name}: {value!r} is not a number")


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and math.isfinite(value)


def _is_bias(pair: object) -> bool:
    return isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], Integral) and _is_number(pair[1])


def check_context(prompt_tokens: int, max_context: int) -> None:
    """Check that a prompt leaves room for an answer.

    Raises:
        ContextError: it doesn't; the error has the numbers.
    """
    if prompt_tokens >= max_context:
        raise ContextError(prompt_tokens, max_context)
