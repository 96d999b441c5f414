"""The text that a journal keeps: of a request, and line by line of its answers' outputs and errors."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from hippo_mpi.engine.messages import ErrorMessage, OutputMessage
from hippo_mpi.engine.request import Request
from hippo_mpi.errors import HippoError
from hippo_mpi.serving.supervision.answer import Told

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


_Stored = tuple[int, Request]
"""The number of a request's prompt among those of its record, and the request without it."""


class _StoredRecord(msgspec.Struct):
    """A record without its body and requests, and these; each prompt once.

    The body is JSON of its own, since msgspec refuses numbers of more than 64 bits.
    """

    record: Record
    body: str
    requests: list[_Stored]
    prompts: list[list[int]]


_read_stored = msgspec.json.Decoder(_StoredRecord).decode
_read_line = msgspec.json.Decoder(tuple[int, OutputMessage | ErrorMessage]).decode


def record_text(record: Record) -> str:
    """Return what `read_record` reads."""
    places = {id(prompt): place for place, prompt in enumerate(record.prompts)}
    requests = [(places[id(one.prompt)], replace(one, prompt=[])) for one in record.requests]
    rest, body = replace(record, body={}, requests=[]), json.dumps(record.body)
    return msgspec.json.encode(_StoredRecord(rest, body, requests, record.prompts)).decode()


def read_record(text: str) -> Record:
    """Return the record that `record_text` has written.

    Raises:
        msgspec.DecodeError: it hasn't.
    """
    stored = _read_stored(text)
    requests = [replace(request, prompt=stored.prompts[place]) for place, request in stored.requests]
    return replace(stored.record, body=json.loads(stored.body), requests=requests)


def line_text(line: Line) -> str:
    """Return what `read_line` reads."""
    index, told = line
    message = ErrorMessage.of(told) if isinstance(told, HippoError) else told
    return msgspec.json.encode((index, message)).decode()


def read_line(text: str) -> Line:
    """Return the line that `line_text` has written.

    Raises:
        msgspec.DecodeError: it hasn't.
    """
    index, message = _read_line(text)
    return index, message.error() if isinstance(message, ErrorMessage) else message
