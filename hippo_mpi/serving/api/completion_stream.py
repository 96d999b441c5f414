"""Streams of OpenAI's completions: chunks as tokens come, of whichever choice."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from hippo_mpi.engine.request import RequestOutput
from hippo_mpi.errors import FieldError, HippoError
from hippo_mpi.serving.api.http_errors import error_of
from hippo_mpi.serving.protocols.openai_answers import (
    AnswerHead,
    Choice,
    chunk_object,
    first_fields,
    says_something,
    usage_chunk,
    usage_so_far,
)
from hippo_mpi.serving.protocols.openai_sampling import boolean

_Told = asyncio.Queue[tuple[int, RequestOutput | HippoError]]


@dataclass(frozen=True)
class StreamOptions:
    """What a stream tells beside its choices.

    Args:
        include_usage: tokens of all choices, in a chunk at the end.
        continuous_usage_stats: tokens of a choice in each of its chunks, too, as vLLM has it.
    """

    include_usage: bool = False
    continuous_usage_stats: bool = False

    @classmethod
    def read(cls, given: Any, is_stream: bool) -> StreamOptions:
        """Read a body's `stream_options`.

        Raises:
            FieldError: they are something else, or nothing is to be streamed.
        """
        if given is None:
            return cls()
        names = ("include_usage", "continuous_usage_stats", "include_obfuscation")
        if not is_stream or not isinstance(given, dict) or set(given) - set(names):
            raise FieldError(
                "stream_options", f"stream_options must be an object of {', '.join(names)}, with stream: true"
            )
        wanted = {name: value is not None and boolean(name, value) for name, value in given.items()}
        return cls(wanted.get(names[0], False), wanted.get(names[0], False) and wanted.get(names[1], False))


async def completion_chunks(
    head: AnswerHead, outputs: Sequence[AsyncIterator[RequestOutput]], choices: Sequence[Choice], options: StreamOptions
) -> AsyncIterator[bytes]:
    """Server-sent events: every output as it comes, whichever choice it is of."""
    told: _Told = asyncio.Queue()
    tasks = [asyncio.ensure_future(_pass_on(index, one, told)) for index, one in enumerate(outputs)]
    no_usage: dict[str, Any] = {"usage": None} if options.include_usage else {}
    try:
        for index in range(len(choices)):
            yield _event(chunk_object(head, index, first_fields(head)) | no_usage)
        running = len(choices)
        while running:
            index, output = await told.get()
            if isinstance(output, Exception):
                yield _event(error_of(output))
                return
            fields = choices[index].take(output)
            usage = {"usage": usage_so_far(choices[index])} if options.continuous_usage_stats else no_usage
            if says_something(fields) or options.continuous_usage_stats:
                yield _event(chunk_object(head, index, fields) | usage)
            running -= output.finish_reason is not None
        if options.include_usage:
            yield _event(usage_chunk(head, choices))
        yield b"data: [DONE]\n\n"
    finally:  # also when the client has gone away
        for task in tasks:
            task.cancel()


async def _pass_on(index: int, outputs: AsyncIterator[RequestOutput], told: _Told) -> None:
    try:
        async for output in outputs:
            told.put_nowait((index, output))
    except HippoError as error:
        told.put_nowait((index, error))


def _event(found: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(found)}\n\n".encode()
