"""The text that a journal keeps: of a request, and line by line of its answers' outputs and errors."""

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
"""The number of an answer of a request, and an output or error of it."""


@dataclass(frozen=True)
class Record:
    """A request to one of the endpoints that answer.

    Args:
        id: by which its client knows it.
        owner: key id of those who may see it; empty: anybody.
        key: key id of the API key that came with it; None: none came.
        url: path of the endpoint.
        model: name of the model.
        created: seconds since 1970.
        body: as it came.
        requests: one for each answer, numbered; those of one prompt share one list of its tokens.
        is_stream: whether its client learns its id before the end.
        is_stored: whether it is kept after its end until it expires, and not only until its client has it.
        is_background: whether it goes on to its end without a client.
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
    """Return a record as JSON text, with each prompt once."""
    places = {id(prompt): place for place, prompt in enumerate(record.prompts)}
    requests = [(places[id(one.prompt)], request_object(replace(one, prompt=[]))) for one in record.requests]
    return json.dumps({**vars(record), "requests": requests, "prompts": record.prompts})


def read_record(text: str) -> Record:
    """Read what `record_text` returned.

    Raises:
        ValueError: it isn't JSON.
        KeyError: it has other fields, as of another version; likewise TypeError.
    """
    fields = json.loads(text)
    prompts = fields.pop("prompts")
    requests = [replace(read_request(one), prompt=prompts[place]) for place, one in fields["requests"]]
    return Record(**fields | {"requests": requests})


def line_text(line: Line) -> str:
    """Return a line as JSON text."""
    index, told = line
    fields = _output_object(told) if isinstance(told, ToldOutput) else error_object(told)
    return json.dumps([index, fields], separators=(",", ":"))


def read_line(text: str) -> Line:
    """Read what `line_text` returned; raises as `read_record`."""
    index, fields = json.loads(text)
    return index, read_output({"id": index, **fields}) if "text" in fields else read_error(fields)


def _output_object(told: ToldOutput) -> dict[str, Any]:
    """Return the object that `read_output` reads, without the id, which is valid for one run of a server only."""
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
