"""What the front and rank 0 say to each other: JSON, a line each, over a local socket.

    front -> rank 0   {"add": Request}  {"abort": id}
    rank 0 -> front   {"ready": About}  {"output": RequestOutput}
                      {"refused": id, "why": text, "kind": "user", "field", "rank" or "fault"}, of which a field has its name, or
                      {"refused": id, "context": [prompt's tokens, most tokens]}
                      {"taking": id or null}: the request that is being read, so that it is known what ended a rank
                      {"begun": [id]}: the next step is the first of theirs
                      {"beat": {"ranks": [status of each], "waiting": requests that no step has begun,
                                "stalled_s": for how long no rank has got on, or 0}}

Each object is a dataclass's fields. Nothing here is ever executed or unpickled.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from hippo_mpi.engine.request import (
    FinishReason,
    Request,
    RequestOutput,
    Resume,
    SamplingParams,
    TokenLogprobs,
)
from hippo_mpi.errors import ContextError, FieldError, ForeignError, HippoError, RankError, UserError
from hippo_mpi.planning.layer_split import Machine

MAX_LINE_BYTES = 64 << 20  # a prompt of some million tokens
FRONT = "HIPPO_FRONT"
"""Environment variable with the path of the front's socket: who has it is a rank that the front has started."""


@dataclass(frozen=True)
class About:
    """What the ranks can do, once they are ready."""

    max_context: int
    vocab_size: int
    ranks: list[dict[str, Any]] = field(default_factory=list)  # statistics of each
    machines: list[Machine] = field(default_factory=list)  # the budget of each before it loaded anything


def read_about(found: dict[str, Any]) -> About:
    return About(**{**found, "machines": [Machine(**machine) for machine in found["machines"]]})


def line_of(**message: Any) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def request_object(request: Request) -> dict[str, Any]:
    return asdict(request)


def read_request(found: dict[str, Any]) -> Request:
    sampling, resume = dict(found["sampling"]), found["resume"]
    sampling["logit_bias"] = tuple((token, amount) for token, amount in sampling["logit_bias"])
    sampling["stop_words"], sampling["forced"] = tuple(sampling["stop_words"]), tuple(sampling["forced"])
    resumed = None if resume is None else Resume(**resume)
    return Request(found["id"], found["prompt"], SamplingParams(**sampling), resumed, found["cache_salt"])


_KINDS: tuple[tuple[str, type[HippoError]], ...] = (
    ("user", UserError),
    ("rank", RankError),
    ("fault", HippoError),
)
"""Errors by what statuses and words depend on; the first that fits."""


def error_object(error: HippoError) -> dict[str, Any]:
    """Return what `read_error` makes an error of again, of its kind."""
    if isinstance(error, ContextError):
        return {"context": [error.prompt_tokens, error.max_context]}
    if isinstance(error, FieldError):
        return {"why": str(error), "kind": "field", "field": error.field}
    return {"why": str(error), "kind": next(name for name, kind in _KINDS if isinstance(error, kind))}


def read_error(found: dict[str, Any]) -> HippoError:
    """Return the error of an object that `error_object` has made; a fault is a ForeignError."""
    if "context" in found:
        return ContextError(*found["context"])
    if found["kind"] == "field":
        return FieldError(found["field"], found["why"])
    kinds: dict[str, type[HippoError]] = {**dict(_KINDS), "fault": ForeignError}
    return kinds[found["kind"]](found["why"])


def output_object(output: RequestOutput) -> dict[str, Any]:
    """All of an output but its times, which are of this process's clock."""
    logprobs = output.logprobs
    return {
        "id": output.request_id,
        "text": output.text,
        "token": output.token,
        "cached": output.timings.cached_tokens,
        "draft": [output.timings.num_draft_tokens, output.timings.num_accepted],
        "logprobs": None if logprobs is None else logprobs.as_object(),
        "finish": output.finish_reason,
        "state": output.random_state,
    }


@dataclass(frozen=True)
class ToldOutput:
    """An output as the front hears of it."""

    request_id: int
    text: str
    token: int | None
    cached_tokens: int
    num_draft_tokens: int
    num_accepted: int
    logprobs: TokenLogprobs | None
    finish_reason: FinishReason | None
    random_state: list[int] | None


def read_output(found: dict[str, Any]) -> ToldOutput:
    logprobs = found["logprobs"]
    return ToldOutput(
        request_id=found["id"],
        text=found["text"],
        token=found["token"],
        cached_tokens=found["cached"],
        num_draft_tokens=found["draft"][0],
        num_accepted=found["draft"][1],
        logprobs=None if logprobs is None else TokenLogprobs.from_object(logprobs),
        finish_reason=found["finish"],
        random_state=found["state"],
    )
