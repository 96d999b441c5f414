"""The requests of each endpoint, and the writers of their answers in the endpoint's format.

A question can be read again from a body that was kept, and its answer written again from outputs that were kept: the
result is the same, event for event.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from mlx_lm.tokenizer_utils import TokenizerWrapper

from hippo_mpi.engine.request import RequestOutput, SamplingParams
from hippo_mpi.errors import FieldError
from hippo_mpi.protocols.anthropic_messages import MESSAGES, MessageAnswer, read_messages_body
from hippo_mpi.protocols.openai_answers import AnswerHead, Choice
from hippo_mpi.protocols.openai_requests import CHAT, COMPLETION, GenerationRequest, read_prompts
from hippo_mpi.protocols.openai_responses import RESPONSES, ResponseAnswer, read_responses_body
from hippo_mpi.protocols.openai_sampling import boolean
from hippo_mpi.serving.api.completion_stream import CompletionAnswer, StreamOptions
from hippo_mpi.serving.api.journal_records import Record

ID_PREFIXES = {CHAT: "chatcmpl-", COMPLETION: "cmpl-", RESPONSES: "resp_", MESSAGES: "msg_"}
"""The prefixes of the ids of each endpoint's answers."""
_MAX_CHOICES = 16  # to one prompt


class AnswerWriter(Protocol):
    """A writer of one answer from its beginning, to be used once."""

    def events(self, outputs: AsyncIterator[tuple[int, RequestOutput]]) -> AsyncIterator[bytes]:
        """Yield the answer as server-sent events, from (number of the answer, output)."""

    def whole(self, outputs: Sequence[tuple[int, RequestOutput]]) -> dict[str, Any]:
        """Return the complete answer as a JSON object, from (number of the answer, output)."""


@dataclass(frozen=True)
class Question:
    """A checked body of a request to one of the endpoints that answer.

    Args:
        url: path of the endpoint.
        every: a request for each of its prompts.
        num_choices: answers to each prompt.
        is_stream: whether the answer is to be streamed.
        options: of its stream.
        is_stored: as in `Record`.
        is_background: as in `Record`.
    """

    url: str
    every: list[GenerationRequest]
    num_choices: int = 1
    is_stream: bool = False
    options: StreamOptions = field(default_factory=StreamOptions)
    is_stored: bool = False
    is_background: bool = False

    def writer(self, record: Record, tokenizer: TokenizerWrapper) -> AnswerWriter:
        """Return a new writer of its answer."""
        asked, prompt = self.every[0], record.prompts[0]
        if self.url == MESSAGES:
            return _OneAnswer(MessageAnswer(asked, record.model, record.id, prompt, tokenizer))
        if self.url == RESPONSES:
            return _OneAnswer(response_of(self, record, tokenizer))
        choices = [
            Choice(
                self.every[index // self.num_choices],
                request.prompt,
                tokenizer,
                len(request.sampling.forced),
                f"{record.id}/{index}",
            )
            for index, request in enumerate(record.requests)
        ]
        return CompletionAnswer(AnswerHead(self.url, record.model, record.id, record.created), choices, self.options)


class _OneAnswer:
    """The writer for an API that has one answer to a request."""

    def __init__(self, answer: MessageAnswer | ResponseAnswer) -> None:
        self._answer = answer

    def events(self, outputs: AsyncIterator[tuple[int, RequestOutput]]) -> AsyncIterator[bytes]:
        return self._answer.events(output async for _, output in outputs)

    def whole(self, outputs: Sequence[tuple[int, RequestOutput]]) -> dict[str, Any]:
        return self._answer.whole([output for _, output in outputs])


def response_of(question: Question, record: Record, tokenizer: TokenizerWrapper) -> ResponseAnswer:
    """Return the writer of a response, which can also write one that isn't complete."""
    return ResponseAnswer(
        question.every[0],
        record.model,
        record.id,
        record.prompts[0],
        tokenizer,
        record.created,
        record.is_stored,
        record.is_background,
    )


def read_question(url: str, given: dict[str, Any], defaults: SamplingParams, can_keep: bool) -> Question:
    """Read and check the body of a request to one of the endpoints that answer.

    Args:
        url: path of the endpoint.
        given: the body, which isn't changed.
        defaults: of the model, for fields that the body doesn't have.
        can_keep: whether this server can keep answers.

    Raises:
        UserError: it is invalid; the message names the field.
    """
    body = dict(given)
    is_stream = _flag(body, "stream")
    if url == MESSAGES:
        return Question(url, [read_messages_body(body, defaults)], is_stream=is_stream)
    wants_store = boolean("store", body["store"]) if body.get("store") is not None else url == RESPONSES
    is_stored = can_keep and wants_store
    if url == RESPONSES:
        is_background = _flag(body, "background")
        if is_background and not (can_keep and wants_store):
            why = ", so store can't be false" if can_keep else ", and this server has no --journal"
            raise FieldError("background", f"background responses must be stored{why}")
        asked = read_responses_body(body, defaults)
        return Question(url, [asked], 1, is_stream, StreamOptions(), is_stored, is_background)
    options = StreamOptions.read(body.get("stream_options"), is_stream)
    count = _num_choices(body)
    every = read_prompts(url, body, defaults)
    if is_stream and every[0].echo:
        raise FieldError("echo", "echo can't be combined with stream: true")
    return Question(url, every, count, is_stream, options, is_stored)


def _flag(body: dict[str, Any], name: str) -> bool:
    """Return whether a field of the body is true; removes it."""
    value = body.pop(name, None)
    return value is not None and boolean(name, value)


def _num_choices(body: dict[str, Any]) -> int:
    """Return the number of answers to each prompt; removes it from the body."""
    given = body.pop("n", None)
    count = 1 if given is None else given
    if type(count) is not int or not 1 <= count <= _MAX_CHOICES:
        raise FieldError("n", f"n must be a whole number from 1 to {_MAX_CHOICES}, not {count!r}")
    if body.get("best_of") == count:  # all of them are returned, so there is nothing to choose
        del body["best_of"]
    return count
