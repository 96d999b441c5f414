"""Requests and answers of OpenAI's responses API (POST /v1/responses).

Every field is honoured, refused by name, or in a table of ignored_fields.py. Nothing is kept for a later request.
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import count
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from hippo_mpi.engine.request import RequestOutput, SamplingParams, Timings
from hippo_mpi.engine.thinking import thought_tokens
from hippo_mpi.errors import ContextError, FieldError, HippoError
from hippo_mpi.protocols.answer_parts import Block, Blocks
from hippo_mpi.protocols.ignored_fields import RESPONSES_IGNORED, without_ignored
from hippo_mpi.protocols.openai_requests import CHAT, GenerationRequest, read_body, renamed

RESPONSES = "/v1/responses"
_SAME = {"temperature": "temperature", "top_p": "top_p", "parallel_tool_calls": "parallel_tool_calls",
         "max_output_tokens": "max_tokens"}  # fmt: skip
"""Fields with the same content in a chat's body, with their names there."""
_OTHER_NAMES = {"max_tokens": "max_output_tokens", "messages": "input", "response_format": "text",
                "reasoning_effort": "reasoning"}  # fmt: skip
_INCLUDED = "message.output_text.logprobs"  # other values concern tools and thoughts that a provider keeps
_SUMMARIES = (None, "auto", "concise", "detailed")
_INCOMPLETE = {"length": "max_output_tokens"}


def read_responses_body(body: dict[str, Any], defaults: SamplingParams) -> GenerationRequest:
    """Read and check the body of a request to RESPONSES.

    Raises:
        UserError: it is invalid; the message names the field.
    """
    rest = without_ignored(body, RESPONSES_IGNORED)
    chat = {_SAME[name]: rest.pop(name) for name in list(rest) if name in _SAME}
    chat["messages"] = _messages(rest.pop("input", None), rest.pop("instructions", None))
    chat["tools"], chat["tool_choice"] = _tools(rest.pop("tools", [])), _tool_choice(rest.pop("tool_choice", "auto"))
    chat["response_format"] = _format(rest.pop("text", {}))
    chat["reasoning_effort"] = _effort(rest.pop("reasoning", {}))
    _check_included(rest.pop("include", []))
    for name in rest:
        raise FieldError(name, f"unknown field {name!r}")
    with renamed(_OTHER_NAMES):
        return replace(read_body(CHAT, chat, defaults), format_field="text")


def _messages(given: Any, instructions: Any) -> list[dict[str, Any]]:
    """Return a chat's messages, in which calls and thoughts are part of the assistant's message next to them."""
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    if not isinstance(given, list) or not all(isinstance(item, dict) for item in given):
        raise FieldError("input", "input must be a string or a list of items")
    messages: list[dict[str, Any]] = [] if instructions is None else [{"role": "system", "content": instructions}]
    is_open = False  # whether the last message is the assistant's, to which further items belong
    for item in given:
        kind = item.get("type", "message")
        if kind == "message" and item.get("role") != "assistant":
            messages.append({"role": item.get("role"), "content": item.get("content")})
        elif kind == "function_call_output":
            messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")})
        elif kind in ("message", "function_call", "reasoning"):
            if not is_open or (kind == "message" and messages[-1]["content"]):
                messages.append({"role": "assistant", "content": ""})
            _add(messages[-1], kind, item)
        else:
            raise FieldError("input", f"input: items of type {kind!r} aren't supported here")
        is_open = messages[-1]["role"] == "assistant"
    return messages


def _add(message: dict[str, Any], kind: str, item: dict[str, Any]) -> None:
    """Add an item to an assistant's message."""
    if kind == "message":
        message["content"] = item.get("content")
    elif kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        message.setdefault("tool_calls", []).append(
            {"id": item.get("call_id"), "type": "function", "function": function}
        )
    else:
        parts = item.get("content") or item.get("summary") or []
        if not isinstance(parts, list) or not all(
            isinstance(p, dict) and isinstance(p.get("text"), str) for p in parts
        ):
            raise FieldError("input", "input: reasoning must have text")
        message["reasoning_content"] = "".join(part["text"] for part in parts)


def _tools(given: Any) -> list[dict[str, Any]]:
    """Return the functions as a chat's tools; in this API a function's fields are beside its type.

    Tools of other types are left out: clients offer all of theirs to any model, and cope if one is never called.
    """
    functions = []
    for tool in given if isinstance(given, list) else [None]:
        if not isinstance(tool, dict) or not isinstance(tool.get("type"), str):
            raise FieldError("tools", "tools must be a list of objects with a type")
        if tool["type"] != "function":
            _note_left_out(tool["type"][:40])
            continue
        function = {name: tool[name] for name in ("name", "description", "parameters") if tool.get(name) is not None}
        functions.append({"type": "function", "function": function})
    return functions


@lru_cache(maxsize=64)  # logs once per type
def _note_left_out(kind: str) -> None:
    logging.getLogger(__name__).warning("ignoring tools of type %r: only functions can be called", kind)


def _check_included(given: Any) -> None:
    """Raise a FieldError for log-probabilities, which aren't returned here; other values have no effect."""
    if not isinstance(given, list) or not all(isinstance(name, str) for name in given):
        raise FieldError("include", "include must be a list of strings")
    if _INCLUDED in given:
        raise FieldError("include", f"include can't have {_INCLUDED!r} here: use /v1/chat/completions for logprobs")


def _tool_choice(given: Any) -> Any:
    if isinstance(given, dict) and given.get("type") == "function":
        return {"type": "function", "function": {"name": given.get("name")}}
    return given


def _format(given: Any) -> Any:
    """Return a chat's response_format."""
    if not isinstance(given, dict) or set(given) - {"format", "verbosity"}:
        raise FieldError("text", "text can only have format (text, json_object or json_schema) and verbosity")
    form = given.get("format")
    if isinstance(form, dict) and form.get("type") == "json_schema":
        return {"type": "json_schema", "json_schema": {"schema": form.get("schema")}}
    return form


def _effort(given: Any) -> Any:
    """Return a chat's reasoning_effort. A wanted summary has no effect: thoughts are returned as they are."""
    if not isinstance(given, dict) or set(given) - {"effort", "summary", "generate_summary"}:
        raise FieldError("reasoning", "reasoning can only have effort and summary")
    for name in ("summary", "generate_summary"):
        if given.get(name) not in _SUMMARIES:
            raise FieldError("reasoning", f"reasoning: {name} must be auto, concise or detailed, not {given[name]!r}")
    return given.get("effort")


@dataclass
class ResponseAnswer:
    """The answer to one request.

    Args:
        asked: the request.
        model: the name that the answer shows.
        id: of the answer.
        prompt: its tokens.
        tokenizer: of the model that answers.
        created: seconds since 1970.
        is_stored: whether the answer is kept for a later GET.
        is_background: whether the answer is made without a client that waits for it.
    """

    asked: GenerationRequest
    model: str
    id: str
    prompt: list[int]
    tokenizer: TokenizerWrapper
    created: int
    is_stored: bool = False
    is_background: bool = False

    def __post_init__(self) -> None:
        self._blocks = Blocks(self.asked.reader(self.tokenizer, self.prompt, self.id))

    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """Return the complete answer as OpenAI's response object."""
        for output in outputs:
            self._blocks.take(output.text, output.finish_reason is not None)
        return self._object(outputs[-1].timings, outputs[-1].finish_reason)

    def so_far(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """Return the response object of an answer that isn't complete yet."""
        response = self._object(outputs[-1].timings if outputs else Timings(prompt_tokens=len(self.prompt)), None)
        return response if outputs else {**response, "status": "queued"}

    def failed(self, error: Exception) -> dict[str, Any]:
        """Return the response object of an answer that ended with an error."""
        response = self._object(Timings(prompt_tokens=len(self.prompt)), None)
        return {**response, "status": "failed", "error": {"code": _error_code(error), "message": str(error)}}

    async def events(self, outputs: AsyncIterator[RequestOutput]) -> AsyncIterator[bytes]:
        """Yield the answer as server-sent events; an error of the outputs becomes an error event."""
        numbers = count()

        def event(kind: str, **fields: Any) -> bytes:
            data = {"type": f"response.{kind}", "sequence_number": next(numbers), **fields}
            return f"event: response.{kind}\ndata: {json.dumps(data)}\n\n".encode()

        try:
            yield event("created", response=self.so_far([]))
            async for output in outputs:
                for what, block, text in self._blocks.take(output.text, output.finish_reason is not None):
                    for kind, fields in self._block_events(what, block, text):
                        yield event(kind, output_index=block.index, **fields)
                if output.finish_reason is not None:
                    whole = self._object(output.timings, output.finish_reason)
                    yield event("incomplete" if whole["status"] == "cancelled" else whole["status"], response=whole)
        except HippoError as error:
            data = {
                "type": "error",
                "sequence_number": next(numbers),
                "message": str(error),
                "code": _error_code(error),
                "param": None,
            }
            yield f"event: error\ndata: {json.dumps(data)}\n\n".encode()

    def _block_events(self, what: str, block: Block, text: str) -> list[tuple[str, dict[str, Any]]]:
        """Return the stream's events for a block that opens, grows or closes."""
        of_item = {"item_id": self._item_id(block)}
        of_part = {**of_item, "content_index": 0}
        name, extra = _TEXT_EVENTS[block.kind]
        if what == "more":
            return [(f"{name}.delta", {**(of_item if block.call else of_part), "delta": text, **extra})]
        item = self._item(block, is_whole=what == "close")
        if block.call is not None:
            done = ("function_call_arguments.done", {**of_item, "name": block.call.name, "arguments": block.text})
            return (
                [("output_item.added", {"item": item})]
                if what == "open"
                else [done, ("output_item.done", {"item": item})]
            )
        if what == "open":
            return [
                ("output_item.added", {"item": item}),
                ("content_part.added", {**of_part, "part": _part(block.kind, "")}),
            ]
        return [
            (f"{name}.done", {**of_part, "text": block.text, **extra}),
            ("content_part.done", {**of_part, "part": _part(block.kind, block.text)}),
            ("output_item.done", {"item": item}),
        ]

    def _object(self, timings: Timings, reason: str | None) -> dict[str, Any]:
        status = {None: "in_progress", "stop": "completed", "abort": "cancelled"}.get(reason, "incomplete")
        made = len(timings.token_ids)
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "model": self.model,
            "status": status,
            "store": self.is_stored,
            "background": self.is_background,
            "error": None,
            "incomplete_details": {"reason": _INCOMPLETE.get(reason or "", reason)} if status == "incomplete" else None,
            "output": [] if reason is None else [self._item(block, is_whole=True) for block in self._blocks.all],
            "parallel_tool_calls": self.asked.max_calls is None,
            "tool_choice": "required" if self.asked.must_call else "auto",
            "tools": [
                {"type": "function", "strict": False, "parameters": {}, **tool["function"]} for tool in self.asked.tools
            ],
            "usage": {
                "input_tokens": timings.prompt_tokens,
                "input_tokens_details": {"cached_tokens": timings.cached_tokens},
                "output_tokens": made,
                "output_tokens_details": {
                    "reasoning_tokens": thought_tokens(self.tokenizer, self.prompt, timings.token_ids)
                },
                "total_tokens": timings.prompt_tokens + made,
            },
        }

    def _item_id(self, block: Block) -> str:
        return f"{_ID_PREFIXES[block.kind]}_{self.id}_{block.index}"

    def _item(self, block: Block, is_whole: bool) -> dict[str, Any]:
        """Return an item of the output, without content if it isn't whole."""
        head: dict[str, Any] = {"id": self._item_id(block), "status": "completed" if is_whole else "in_progress"}
        if block.call is not None:
            arguments = block.text if is_whole else ""
            call = {"call_id": block.call.id, "name": block.call.name, "arguments": arguments}
            return {**head, "type": "function_call", **call}
        content = [_part(block.kind, block.text)] if is_whole else []
        if block.kind == "reasoning":
            return {**head, "type": "reasoning", "summary": [], "content": content}
        return {**head, "type": "message", "role": "assistant", "content": content}


def _error_code(error: Exception) -> str:
    return "context_length_exceeded" if isinstance(error, ContextError) else "server_error"


_ID_PREFIXES = {"content": "msg", "reasoning": "rs", "call": "fc"}
_TEXT_EVENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "content": ("output_text", {"logprobs": []}),
    "reasoning": ("reasoning_text", {}),
    "call": ("function_call_arguments", {}),
}


def _part(kind: str, text: str) -> dict[str, Any]:
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
