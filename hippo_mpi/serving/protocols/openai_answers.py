"""OpenAI's words for answers: whole objects, the chunks of a stream, and errors."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from hippo_mpi.engine.request import RequestOutput
from hippo_mpi.engine.thinking import thought_tokens
from hippo_mpi.serving.protocols.answer_parts import Call, Part
from hippo_mpi.serving.protocols.openai_requests import CHAT, Asked


@dataclass
class Choice:
    """One answer to a request: what came, and what OpenAI calls it."""

    asked: Asked
    prompt: list[int]
    tokenizer: TokenizerWrapper
    outputs: list[RequestOutput] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._reader = self.asked.reader(self.tokenizer, self.prompt)
        self._pieces: list[Part | Call] = []

    def take(self, output: RequestOutput) -> dict[str, Any]:
        """What this output adds, as fields of a streamed choice."""
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
        told = _logprobs(self.asked, [output], self.tokenizer)
        return {**content, "logprobs": told, "finish_reason": self._finish_reason()}

    def whole(self) -> dict[str, Any]:
        """All of it, as fields of a choice."""
        content: dict[str, Any] = {"text": "".join(output.text for output in self.outputs)}
        if self.asked.url == CHAT:
            message = {"role": "assistant", "content": None if self._reader.num_calls else ""}
            content = {"message": message | _message_fields(self._pieces)}
        told = _logprobs(self.asked, self.outputs, self.tokenizer)
        return {**content, "logprobs": told, "finish_reason": self._finish_reason()}

    def _finish_reason(self) -> str | None:
        """An answer that stops after calls waits for their results."""
        reason = self.outputs[-1].finish_reason
        return "tool_calls" if reason == "stop" and self._reader.num_calls else reason


def _message_fields(pieces: Sequence[Part | Call]) -> dict[str, Any]:
    """Pieces of an answer as fields of a message, or of what is added to one."""
    found: dict[str, Any] = {}
    for piece in pieces:
        if isinstance(piece, Call):
            function = {"name": piece.name, "arguments": piece.arguments}
            found.setdefault("tool_calls", []).append({"id": piece.id, "type": "function", "function": function})
        else:
            name = "reasoning_content" if piece.kind == "reasoning" else "content"
            found[name] = found.get(name, "") + piece.text
    return found


def answer_object(model: str, request_id: str, choices: Sequence[Choice]) -> dict[str, Any]:
    """The chat completion or text completion that its choices amount to."""
    found = [{"index": index, **choice.whole()} for index, choice in enumerate(choices)]
    kind = "chat.completion" if choices[0].asked.url == CHAT else "text_completion"
    usage = usage_object(choices)
    return {**_head(request_id, kind, model), "choices": found, "usage": usage}


def chunk_object(asked: Asked, model: str, request_id: str, index: int, fields: dict[str, Any]) -> dict[str, Any]:
    """A chunk of a stream: what one choice got."""
    kind = "chat.completion.chunk" if asked.url == CHAT else "text_completion"
    return {**_head(request_id, kind, model), "choices": [{"index": index, **fields}]}


def first_fields(asked: Asked) -> dict[str, Any]:
    """How a streamed choice begins."""
    content: dict[str, Any] = {"text": ""}
    if asked.url == CHAT:
        content = {"delta": {"role": "assistant", "content": ""}}
    return {**content, "logprobs": None, "finish_reason": None}


def usage_chunk(asked: Asked, model: str, request_id: str, choices: Sequence[Choice]) -> dict[str, Any]:
    """The last chunk of a stream that was asked for its usage."""
    kind = "chat.completion.chunk" if asked.url == CHAT else "text_completion"
    return {**_head(request_id, kind, model), "choices": [], "usage": usage_object(choices)}


def usage_object(choices: Sequence[Choice]) -> dict[str, Any]:
    """Tokens of all choices of a request; they share its prompt."""
    timings = [choice.outputs[-1].timings for choice in choices]
    prompt, made = timings[0].prompt_tokens, sum(len(one.token_ids) for one in timings)
    thought = sum(
        thought_tokens(choice.tokenizer, choice.prompt, choice.outputs[-1].timings.token_ids) for choice in choices
    )
    return {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
        "completion_tokens_details": {"reasoning_tokens": thought},
        "prompt_tokens_details": {"cached_tokens": timings[0].cached_tokens},
    }


def error_object(message: str, kind: str, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def _head(request_id: str, kind: str, model: str) -> dict[str, Any]:
    return {"id": request_id, "object": kind, "created": int(time.time()), "model": model}


def _logprobs(asked: Asked, outputs: Sequence[RequestOutput], tokenizer: TokenizerWrapper) -> dict[str, Any] | None:
    if asked.sampling.logprobs is None:
        return None
    return (_chat_logprobs if asked.url == CHAT else _completion_logprobs)(outputs, tokenizer)


def _chat_logprobs(outputs: Sequence[RequestOutput], tokenizer: TokenizerWrapper) -> dict[str, Any]:
    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = tokenizer.decode([token])
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    content = []
    for output in outputs:
        if output.token is not None and output.logprobs is not None:
            top = [entry(token, logprob) for token, logprob in output.logprobs.top]
            content.append({**entry(output.token, output.logprobs.chosen), "top_logprobs": top})
    return {"content": content}


def _completion_logprobs(outputs: Sequence[RequestOutput], tokenizer: TokenizerWrapper) -> dict[str, Any]:
    told = [(o.token, o.logprobs) for o in outputs if o.token is not None and o.logprobs is not None]
    texts = [tokenizer.decode([token]) for token, _ in told]
    return {
        "tokens": texts,
        "token_logprobs": [logprobs.chosen for _, logprobs in told],
        "top_logprobs": [{tokenizer.decode([t]): value for t, value in logprobs.top} for _, logprobs in told],
        "text_offset": [len("".join(texts[:i])) for i in range(len(texts))],
    }
