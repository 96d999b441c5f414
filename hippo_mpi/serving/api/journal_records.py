"""What a journal keeps, as text: a request, and line by line what was told of its answers."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from hippo_mpi.engine.request import Request
from hippo_mpi.serving.supervision.answer import Told
from hippo_mpi.serving.supervision.rank_link import (
    ToldOutput,
    error_object,
    read_error,
    read_output,
    read_request,
    request_object,
)

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
        requests: one for each answer, numbered; those of one prompt share its list of tokens.
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
    requests: list[Request]
    is_stream: bool
    is_stored: bool
    is_background: bool

    @property
    def prompts(self) -> list[list[int]]:
        """The tokens of each prompt."""
        return list({id(request.prompt): request.prompt for request in self.requests}.values())


def record_text(record: Record) -> str:
    places = {id(prompt): place for place, prompt in enumerate(record.prompts)}
    requests = [(places[id(one.prompt)], request_object(replace(one, prompt=[]))) for one in record.requests]
    return json.dumps({**vars(record), "requests": requests, "prompts": record.prompts})


def read_record(text: str) -> Record:
    found = json.loads(text)
    prompts = found.pop("prompts")
    requests = [replace(read_request(one), prompt=prompts[place]) for place, one in found["requests"]]
    return Record(**found | {"requests": requests})


def line_text(line: Line) -> str:
    index, told = line
    found = _output_object(told) if isinstance(told, ToldOutput) else error_object(told)
    return json.dumps([index, found], separators=(",", ":"))


def read_line(text: str) -> Line:
    index, found = json.loads(text)
    return index, read_output({"id": index, **found}) if "text" in found else read_error(found)


def _output_object(told: ToldOutput) -> dict[str, Any]:
    """What `read_output` reads, but for the id, which is of one life of a server."""
    logprobs = told.logprobs
    return {
        "text": told.text,
        "token": told.token,
        "cached": told.cached_tokens,
        "draft": [told.num_draft_tokens, told.num_accepted],
        "logprobs": None if logprobs is None else logprobs.as_object(),
        "finish": told.finish_reason,
        "state": told.random_state,
    }
