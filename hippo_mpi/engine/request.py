"""The nouns: what is asked (Request), what is running (Sequence), what comes out (RequestOutput)."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from hippo_mpi.engine.loops import LoopWatch
from hippo_mpi.errors import ContextError, HippoError, UserError

FinishReason = Literal["stop", "length", "repetition", "abort", "error"]


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen; names and defaults are mlx_lm.generate's, or else OpenAI's."""

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
    seed: int | None = None  # None: MLX's own random state goes on
    logprobs: int | None = None  # how many likeliest tokens to tell of beside the chosen one; None: tell nothing
    stop_words: tuple[str, ...] = ()
    grammar: str | None = None  # that the answer must follow (engine/grammar.py)
    max_thinking_tokens: int | None = None  # after so many of a thought it is ended; None: never
    max_repeats: int = 0  # times in a row that the same tokens, or line, may come; then the answer ends; 0: any number
    ignore_eos: bool = False  # go on to max_tokens, for measuring
    min_tokens: int = 0  # before so many no end token is chosen
    forced: tuple[int, ...] = ()  # with which the answer begins, to learn how likely they are
    keep_space: bool = False  # with which an answer begins; mlx-lm drops it, but prompt and answer may be one text

    @classmethod
    def from_options(cls, options: argparse.Namespace) -> SamplingParams:
        """What the command line says. Not its seed: whether that is one for all requests or for each, commands decide."""
        names = (
            "max_tokens", "temp", "top_p", "min_p", "top_k", "min_tokens_to_keep", "xtc_probability", "xtc_threshold",
            "repetition_penalty", "repetition_context_size", "max_repeats",
        )  # fmt: skip
        return cls(**{name: getattr(options, name) for name in names}, stop_words=tuple(options.stop_words))


@dataclass(frozen=True)
class Resume:
    """Where an answer is that other ranks have begun: its tokens, how much of its text is out, its random numbers."""

    tokens: list[int]
    emitted_chars: int
    random_state: list[int] | None = None


@dataclass(frozen=True)
class Request:
    """A prompt (tokens) and how to answer it; with `resume`, from where that is. It may begin with what is cached of
    requests with the same `cache_salt` only."""

    id: int
    prompt: list[int]
    sampling: SamplingParams
    resume: Resume | None = None
    cache_salt: str = ""


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural logarithms of probabilities: of the chosen token, and of the likeliest ones (token, logprob)."""

    chosen: float
    top: list[tuple[int, float]]


@dataclass
class Timings:
    """When a request's tokens were made, in seconds of the same clock."""

    started_s: float = field(default_factory=time.perf_counter)
    first_token_s: float = 0.0
    finished_s: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    num_draft_tokens: int = 0  # that a draft model has proposed
    num_accepted: int = 0  # of them
    token_ids: list[int] = field(default_factory=list)

    def note(self, token: int) -> None:
        self.finished_s = time.perf_counter()
        if not self.token_ids:
            self.first_token_s = self.finished_s
        self.token_ids.append(token)

    @property
    def prompt_tps(self) -> float:
        return (self.prompt_tokens - self.cached_tokens) / max(self.first_token_s - self.started_s, 1e-9)

    @property
    def generation_tps(self) -> float:
        made = len(self.token_ids) - 1  # the first token is the prompt's
        return made / max(self.finished_s - self.first_token_s, 1e-9) if made > 0 else 0.0


@dataclass(eq=False)
class Sequence:
    """A request under way. `tokens` is the prompt and what was generated; `position` is how many are in the cache."""

    request: Request
    tokens: list[int]
    chooser: Any  # engine.sampling.Chooser
    detokenizer: Any
    timings: Timings
    slot: int = -1  # given when the request is admitted
    position: int = 0
    emitted_chars: int = 0
    is_begun: bool = False  # a step of it has been planned
    is_aborted: bool = False
    is_ended: bool = False  # its last output has been made, but a step may still be on its way
    loops: LoopWatch | None = None
    searched: tuple[Any, int] | None = None  # among which prefixes, and how many of its tokens were in one

    @property
    def most_tokens(self) -> int:
        """How long it can become."""
        return len(self.request.prompt) + self.request.sampling.max_tokens


Propose = Callable[[Sequence, int], list[int]]
"""Drafts at most so many tokens behind those of a sequence."""


@dataclass(frozen=True)
class RequestOutput:
    """What a step added to an answer. The last one of a request has a finish reason."""

    request_id: int
    text: str
    token: int | None  # None when the request was aborted
    timings: Timings
    logprobs: TokenLogprobs | None = None
    finish_reason: FinishReason | None = None
    error: HippoError | None = None  # that has ended this request, and no other
    random_state: list[int] | None = None  # after this token, of a request that draws numbers of its own


def check_request(prompt: list[int], sampling: SamplingParams, max_context: int, vocab_size: int) -> None:
    """Raise a UserError for what can never be answered."""
    if not prompt:
        raise UserError("the prompt has no tokens: nothing can follow it")
    check_context(len(prompt) + len(sampling.forced), max_context)
    for token in (*prompt, *sampling.forced, *(token for token, _ in sampling.logit_bias)):
        if not 0 <= token < vocab_size:
            raise UserError(f"token {token} is not in the vocabulary of {vocab_size:,} tokens")


def check_context(prompt_tokens: int, max_context: int) -> None:
    """Raise a ContextError if a prompt leaves no room for an answer."""
    if prompt_tokens >= max_context:
        raise ContextError(prompt_tokens, max_context)
