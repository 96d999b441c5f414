"""Streams of OpenAI's completions: chunks of all choices, as their tokens come."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from hippo_mpi.engine.request import RequestOutput
from hippo_mpi.errors import FieldError, HippoError
from hippo_mpi.protocols.openai_answers import (
    AnswerHead,
    Choice,
    answer_object,
    chunk_object,
    first_fields,
    says_something,
    usage_chunk,
    usage_so_far,
)
from hippo_mpi.protocols.openai_sampling import boolean
from hippo_mpi.serving.api.event_stream import DONE
from hippo_mpi.serving.api.http_errors import error_of


@dataclass(frozen=True)
class StreamOptions:
    """What a stream includes beside its choices.

    Args:
        include_usage: the numbers of tokens of all choices, in a chunk at the end.
        continuous_usage_stats: the numbers of tokens of a choice in each of its chunks, too, as in vLLM.
    """

    include_usage: bool = False
    continuous_usage_stats: bool = False

    @classmethod
    def read(cls, given: Any, is_stream: bool) -> StreamOptions:
        """Read a body's `stream_options`.

        Raises:
            FieldError: they are invalid, or the body doesn't ask for a stream.
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


class CompletionAnswer:
    """The answer to one request, with all its choices.

    Args:
        head: the fields that each of its objects begins with.
        choices: one for each answer, in the order of their indices.
        options: of its stream.
    """

    def __init__(self, head: AnswerHead, choices: Sequence[Choice], options: StreamOptions) -> None:
        self._head, self._choices, self._options = head, choices, options

    def whole(self, outputs: Sequence[tuple[int, RequestOutput]]) -> dict[str, Any]:
        """Return the complete answer as one object, from (index of the choice, output)."""
        for index, output in outputs:
            self._choices[index].take(output)
        return answer_object(self._head, self._choices)

    async def events(self, outputs: AsyncIterator[tuple[int, RequestOutput]]) -> AsyncIterator[bytes]:
        """Yield the answer as server-sent events; an error of the outputs becomes the last event."""
        head, choices, options = self._head, self._choices, self._options
        no_usage: dict[str, Any] = {"usage": None} if options.include_usage else {}
        for index in range(len(choices)):
            yield _event(chunk_object(head, index, first_fields(head)) | no_usage)
        try:
            async for index, output in outputs:
                fields = choices[index].take(output)
                usage = {"usage": usage_so_far(choices[index])} if options.continuous_usage_stats else no_usage
                if says_something(fields) or options.continuous_usage_stats:
                    yield _event(chunk_object(head, index, fields) | usage)
        except HippoError as error:
            yield _event(error_of(error))
            return
        if options.include_usage:
            yield _event(usage_chunk(head, choices))
        yield DONE


def _event(data: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(data)}\n\n".encode()
