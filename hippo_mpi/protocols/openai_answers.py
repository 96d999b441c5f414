"""Answers in OpenAI's format: whole objects, the chunks of a stream, and errors."""

from __future__ import annotations

import codecs
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from hippo_mpi.engine.request import RequestOutput
from hippo_mpi.engine.text import token_bytes
from hippo_mpi.engine.thinking import thought_tokens
from hippo_mpi.protocols.answer_parts import Call, Part
from hippo_mpi.protocols.openai_requests import CHAT, GenerationRequest


@dataclass
class Choice:
    """One answer to a request, collected from the engine's outputs.

    Args:
        asked: the request.
        prompt: its tokens.
        tokenizer: of the model that answers.
        num_echoed: how many of the answer's first tokens are the prompt's, which is echoed without its first token.
        name: from which the ids of its calls are derived; empty: random.
        outputs: what came so far.
    """

    asked: GenerationRequest
    prompt: list[int]
    tokenizer: TokenizerWrapper
    num_echoed: int = 0
    name: str = ""
    outputs: list[RequestOutput] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._reader = self.asked.reader(self.tokenizer, self.prompt, self.name)
        self._pieces: list[Part | Call] = []
        self._offsets = _Offsets()  # of the tokens whose log-probabilities were returned so far

    def take(self, output: RequestOutput) -> dict[str, Any]:
        """Add an output; return what it adds, as fields of a streamed choice."""
        self.outputs.append(output)
        reason = output.finish_reason
        content: dict[str, Any] = {"text": output.text}
        if self.asked.url == CHAT:
            num_calls = self._reader.num_calls
            pieces = self._reader.read(output.text, reason is not None)
            self._pieces += pieces
            delta = _message_fields(pieces)
            for index, call in enumerate(delta.get("tool_calls", []), num_calls):
                call["index"] = index
            content = {"delta": delta}
        return {**content, "logprobs": self._logprobs([output], self._offsets), "finish_reason": self._finish_reason()}

    def whole(self) -> dict[str, Any]:
        """Return the complete answer as fields of a choice."""
        first = self.tokenizer.decode(self.prompt, skip_special_tokens=True) if self.asked.echo else ""
        content: dict[str, Any] = {"text": first + "".join(output.text for output in self.outputs)}
        if self.asked.url == CHAT:
            message = {"role": "assistant", "content": None if self._reader.num_calls else ""}
            content = {"message": message | _message_fields(self._pieces)}
        told = self._logprobs(self.outputs, _Offsets())
        return {**content, "logprobs": told, "finish_reason": self._finish_reason()}

    def _logprobs(self, outputs: Sequence[RequestOutput], offsets: _Offsets) -> dict[str, Any] | None:
        if self.asked.sampling.logprobs is None:
            return None
        if self.asked.url == CHAT:
            return _chat_logprobs(outputs, self.tokenizer)
        return _completion_logprobs(outputs, self.tokenizer, offsets, self.prompt if self.asked.echo else [])

    def _finish_reason(self) -> str | None:
        """Return OpenAI's finish reason; an answer that stops after calls waits for their results."""
        reason = self.outputs[-1].finish_reason
        return "tool_calls" if reason == "stop" and self._reader.num_calls else reason


def _message_fields(pieces: Sequence[Part | Call]) -> dict[str, Any]:
    """Return pieces of an answer as fields of a message, or of a chunk's delta."""
    fields: dict[str, Any] = {}
    for piece in pieces:
        if isinstance(piece, Call):
            function = {"name": piece.name, "arguments": piece.arguments}
            fields.setdefault("tool_calls", []).append({"id": piece.id, "type": "function", "function": function})
        else:
            name = "reasoning_content" if piece.kind == "reasoning" else "content"
            fields[name] = fields.get(name, "") + piece.text
    return fields


@dataclass(frozen=True)
class AnswerHead:
    """The fields that every object of an answer, or every chunk of its stream, begins with.

    Args:
        url: path of the endpoint, CHAT or COMPLETION.
        model: the name that the answer shows.
        id: of the answer.
        created: seconds since 1970.
    """

    url: str
    model: str
    id: str
    created: int = field(default_factory=lambda: int(time.time()))

    def fields(self, is_chunk: bool) -> dict[str, Any]:
        """Return the fields of a whole object or of a chunk."""
        kind = ("chat.completion.chunk" if is_chunk else "chat.completion") if self.url == CHAT else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def answer_object(head: AnswerHead, choices: Sequence[Choice]) -> dict[str, Any]:
    """Return the chat completion or text completion of these choices."""
    objects = [{"index": index, **choice.whole()} for index, choice in enumerate(choices)]
    return {**head.fields(False), "choices": objects, "usage": usage_object(choices)}


def chunk_object(head: AnswerHead, index: int, fields: dict[str, Any]) -> dict[str, Any]:
    """Return the chunk of a stream that adds `fields` to the choice with this index."""
    return {**head.fields(True), "choices": [{"index": index, **fields}]}


def first_fields(head: AnswerHead) -> dict[str, Any]:
    """Return the fields of a streamed choice's first chunk."""
    content: dict[str, Any] = {"text": ""}
    if head.url == CHAT:
        content = {"delta": {"role": "assistant", "content": ""}}
    return {**content, "logprobs": None, "finish_reason": None}


def says_something(fields: dict[str, Any]) -> bool:
    """Return True if a chunk isn't empty; tokens add nothing while a call or a possible stop word is held back."""
    return bool(fields.get("text") or fields.get("delta") or fields["logprobs"] or fields["finish_reason"])


def usage_chunk(head: AnswerHead, choices: Sequence[Choice]) -> dict[str, Any]:
    """Return the last chunk of a stream whose client has asked for its usage."""
    return {**head.fields(True), "choices": [], "usage": usage_object(choices)}


def usage_so_far(choice: Choice) -> dict[str, Any]:
    """Return the numbers of tokens of a choice that isn't complete yet."""
    timings = choice.outputs[-1].timings
    prompt, made = timings.prompt_tokens, len(timings.token_ids)
    return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}


def usage_object(choices: Sequence[Choice]) -> dict[str, Any]:
    """Return the numbers of tokens of all choices of a request.

    A prompt counts once, however many choices it has: its choices share one list object of prompt tokens.
    """
    firsts = {id(choice.prompt): choice for choice in reversed(choices)}.values()
    prompt = sum(choice.outputs[-1].timings.prompt_tokens + choice.num_echoed for choice in firsts)
    made = sum(len(choice.outputs[-1].timings.token_ids) - choice.num_echoed for choice in choices)
    thought = sum(
        thought_tokens(choice.tokenizer, choice.prompt, choice.outputs[-1].timings.token_ids) for choice in choices
    )
    return {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
        "completion_tokens_details": {"reasoning_tokens": thought},
        "prompt_tokens_details": {"cached_tokens": sum(choice.outputs[-1].timings.cached_tokens for choice in firsts)},
    }


def error_object(message: str, kind: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """Return OpenAI's error object; `param` is the name of the field at fault."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class _Offsets:
    """The offsets of tokens in the text that they form; tokens inside one character have the character's offset."""

    def __init__(self) -> None:
        self._decoder, self._num_chars = codecs.getincrementaldecoder("utf-8")("replace"), 0

    def take(self, token: bytes) -> int:
        """Add the next token and return its offset, in characters."""
        begin = self._num_chars
        self._num_chars += len(self._decoder.decode(token))
        return begin


def _chat_logprobs(outputs: Sequence[RequestOutput], tokenizer: TokenizerWrapper) -> dict[str, Any]:
    def entry(token: int, logprob: float) -> dict[str, Any]:
        data = token_bytes(tokenizer, token)
        return {"token": _text(data), "logprob": logprob, "bytes": list(data)}

    content = []
    for output in outputs:
        if output.token is not None and output.logprobs is not None:
            top = [entry(token, logprob) for token, logprob in output.logprobs.top]
            content.append({**entry(output.token, output.logprobs.chosen), "top_logprobs": top})
    return {"content": content}


def _text(token: bytes) -> str:
    return token.decode("utf-8", "replace")


def _completion_logprobs(
    outputs: Sequence[RequestOutput], tokenizer: TokenizerWrapper, offsets: _Offsets, before: list[int]
) -> dict[str, Any]:
    """Return the logprobs object of a text completion.

    Args:
        outputs: the generated or echoed tokens.
        tokenizer: of the model that answers.
        offsets: of the text so far; moved on by the tokens that are added.
        before: tokens in front that have no log-probability; special tokens among them have no text.
    """
    told = [(o.token, o.logprobs) for o in outputs if o.token is not None and o.logprobs is not None]
    tokens = [token_bytes(tokenizer, token) for token in (*before, *(token for token, _ in told))]
    seen = [b"" if t in tokenizer.all_special_ids else data for t, data in zip(before, tokens, strict=False)]
    nothing = [None] * len(before)
    return {
        "tokens": list(map(_text, tokens)),
        "token_logprobs": [*nothing, *(logprobs.chosen for _, logprobs in told)],
        "top_logprobs": [
            *nothing,
            *({_text(token_bytes(tokenizer, t)): value for t, value in logprobs.top} for _, logprobs in told),
        ],
        "text_offset": [offsets.take(data) for data in [*seen, *tokens[len(before) :]]],
    }
