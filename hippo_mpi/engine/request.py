"""The nouns: what is asked (Request), what is running (Sequence), what comes out (RequestOutput)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen; names and defaults are mlx_lm.generate's."""

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
    stop_words: tuple[str, ...] = ()


@dataclass(frozen=True)
class Request:
    """A prompt and how to answer it. Tokens [0, cached_tokens) are in the slot's cache already."""

    id: int
    prompt: list[int]
    sampling: SamplingParams
    slot: int
    cached_tokens: int = 0


@dataclass
class Sequence:
    """A request under way. `tokens` is the prompt and what was generated; `position` is how many are in the cache."""

    request: Request
    tokens: list[int]
    position: int
    sampler: Any  # mlx_lm.sample_utils.Sampler
    logits_processors: list[Any]
    detokenizer: Any
    emitted_chars: int = 0
    finish_reason: FinishReason | None = None
    awaits_logits: bool = False


@dataclass(frozen=True)
class RequestOutput:
    """What a step added to an answer. The last one of a request has a finish reason."""

    request_id: int
    text: str
    token: int
    finish_reason: FinishReason | None = None


@dataclass
class Timings:
    """When a request's tokens were made, in seconds of the same clock."""

    started_s: float = 0.0
    first_token_s: float = 0.0
    finished_s: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    token_ids: list[int] = field(default_factory=list)

    @property
    def prompt_tps(self) -> float:
        return (self.prompt_tokens - self.cached_tokens) / max(self.first_token_s - self.started_s, 1e-9)

    @property
    def generation_tps(self) -> float:
        made = len(self.token_ids) - 1  # the first token is the prompt's
        return made / max(self.finished_s - self.first_token_s, 1e-9) if made > 0 else 0.0
