"""What a journal keeps, as text: a request, and line by line what was told of its answers."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from hippo_mpi.engine.request import Request, SamplingParams
from hippo_mpi.errors import ContextError, RankError, UserError
from hippo_mpi.serving.supervision.front import Told
from hippo_mpi.serving.supervision.rank_link import ToldOutput, read_output, read_request, request_object

Line = tuple[int, Told]
"""Which answer of a request, and what came for it."""


@dataclass(frozen=True)
class Record:
    """A request.

    Args:
        id: that its client holds.
        owner: who may see it.
        key: a name for the API key that came with it.
        url: of the endpoint.
        created: seconds since 1970.
        body: as it came.
        prompts: tokens of each; each has as many of the samplings, one prompt's behind the other's.
        is_stream: whether its client learns its id before its end.
        is_stored: whether it is kept after its end until it expires, and not only until its client has it.
        is_background: whether it is made to its end without a client.
    """

    id: str
    owner: str
    key: str | None
    url: str
    model: str
    created: int
    body: dict[str, Any]
    prompts: list[list[int]]
    samplings: list[SamplingParams]
    is_stream: bool
    is_stored: bool
    is_background: bool

    def prompt_of(self, index: int) -> list[int]:
        """Return the prompt that an answer is to."""
        return self.prompts[index * len(self.prompts) // len(self.samplings)]


def record_text(record: Record) -> str:
    samplings = [request_object(Request(0, [], sampling)) for sampling in record.samplings]
    return json.dumps(asdict(record) | {"samplings": samplings})


def read_record(text: str) -> Record:
    found = json.loads(text)
    return Record(**found | {"samplings": [read_request(one).sampling for one in found["samplings"]]})


def line_text(line: Line) -> str:
    index, told = line
    if isinstance(told, ToldOutput):
        return json.dumps([index, _output_object(told)], separators=(",", ":"))
    context = [told.prompt_tokens, told.max_context] if isinstance(told, ContextError) else None
    error = {"error": str(told), "is_users": isinstance(told, UserError), "context": context}
    return json.dumps([index, error])


def read_line(text: str) -> Line:
    index, found = json.loads(text)
    if "error" not in found:
        return index, read_output({"id": index, **found})
    if found["context"]:
        return index, ContextError(*found["context"])
    return index, (UserError if found["is_users"] else RankError)(found["error"])


def _output_object(told: ToldOutput) -> dict[str, Any]:
    """What `read_output` reads, but for the id, which is of one life of a server."""
    logprobs = told.logprobs
    return {
        "text": told.text,
        "token": told.token,
        "cached": told.cached_tokens,
        "draft": [told.num_draft_tokens, told.num_accepted],
        "logprobs": None if logprobs is None else [logprobs.chosen, logprobs.top],
        "finish": told.finish_reason,
        "state": told.random_state,
    }
