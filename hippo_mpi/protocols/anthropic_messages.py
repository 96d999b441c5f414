"""Anthropic's words for requests and answers (POST /v1/messages). Every field is honoured, refused by name, or in
ignored_fields.py's table."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from hippo_mpi.engine.request import RequestOutput, SamplingParams, Timings
from hippo_mpi.errors import ContextError, FieldError, HippoError, UserError
from hippo_mpi.protocols.answer_parts import Block, Blocks
from hippo_mpi.protocols.ignored_fields import MESSAGES_IGNORED, without_ignored
from hippo_mpi.protocols.openai_requests import CHAT, GenerationRequest, read_body, renamed

MESSAGES = "/v1/messages"
COUNT_TOKENS = f"{MESSAGES}/count_tokens"
_SAME = {"max_tokens": "max_tokens", "temperature": "temperature", "top_p": "top_p", "top_k": "top_k",
         "stop_sequences": "stop"}  # fmt: skip
"""OpenAI's names of fields that hold the same."""
_ROLES = ("user", "assistant", "system")  # the last in the middle of a conversation, too
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def read_messages_body(body: dict[str, Any], defaults: SamplingParams) -> GenerationRequest:
    """Check a request body.

    Raises:
        UserError: what is wrong with it, with the name of the field.
    """
    rest = without_ignored(body, MESSAGES_IGNORED)
    if "max_tokens" not in rest:
        raise FieldError("max_tokens", "max_tokens: Field required")
    limit, template_args = _thinking(rest.pop("thinking", None), rest["max_tokens"])
    chat = {_SAME[name]: rest.pop(name) for name in list(rest) if name in _SAME}
    chat["messages"] = _messages(rest.pop("messages", None), rest.pop("system", None))
    chat["continue_final_message"] = _is_prefill(chat["messages"])
    chat["tools"] = _tools(rest.pop("tools", []))
    chat |= _tool_choice(rest.pop("tool_choice", {"type": "auto"}))
    chat |= _output(rest.pop("output_config", {}), rest.pop("output_format", None))
    for name in rest:
        raise FieldError(name, f"unknown field {name!r}")
    with renamed({openai_name: name for name, openai_name in _SAME.items()} | {"response_format": "output_config"}):
        asked = read_body(CHAT, {**chat, "chat_template_kwargs": template_args}, defaults)
    sampling = replace(asked.sampling, max_thinking_tokens=limit)
    return replace(asked, sampling=sampling, format_field="output_config")


def count_body(body: dict[str, Any], defaults: SamplingParams) -> GenerationRequest:
    """As `read_messages_body`, of a body whose tokens are only to be counted: nothing says how many may follow."""
    return read_messages_body({**body, "max_tokens": 1 << 29}, defaults)


def _output(config: Any, older_format: Any) -> dict[str, Any]:
    """How much to think, and a format to be held to."""
    if not isinstance(config, dict) or set(config) - {"effort", "format"}:
        raise FieldError("output_config", "output_config takes an effort and a format only")
    form = older_format if config.get("format") is None else config["format"]
    found: dict[str, Any] = {"reasoning_effort": config.get("effort")}
    if form is not None:
        if not isinstance(form, dict) or form.get("type") != "json_schema":
            raise FieldError("output_config", "output_config: format must have the type json_schema, and a schema")
        found["response_format"] = {"type": "json_schema", "json_schema": {"schema": form.get("schema")}}
    return found


def _messages(given: Any, system: Any) -> list[dict[str, Any]]:
    """OpenAI's messages: results of tools are messages of their own."""
    if not isinstance(given, list) or not all(isinstance(message, dict) for message in given):
        raise FieldError("messages", "messages must be a list of objects with role and content")
    found: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    for message in given:
        role, content = message.get("role"), message.get("content")
        if role not in _ROLES:
            raise FieldError("messages", f"messages: role must be one of {', '.join(_ROLES)}, not {role!r}")
        found += [{"role": role, "content": content}] if not isinstance(content, list) else _blocks(role, content)
    return _in_turns(found)


def _in_turns(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Join texts of one role that follow each other, as Anthropic does: many templates want roles to take turns."""
    found: list[dict[str, Any]] = []
    for message in messages:
        last = found[-1] if found else {}
        texts = [last.get("content"), message["content"]]
        is_plain = set(last) == set(message) == {"role", "content"} and message["role"] in ("user", "assistant")
        if is_plain and last["role"] == message["role"] and all(isinstance(text, str) for text in texts):
            found[-1] = {**message, "content": "\n\n".join(texts)}
        else:
            found.append(message)
    return found


def _is_prefill(messages: list[dict[str, Any]]) -> bool:
    """Whether the answer is to go on from a text of the assistant's."""
    last = messages[-1] if messages else {}
    text = last.get("content")
    return last.get("role") == "assistant" and isinstance(text, str) and bool(text.strip()) and "tool_calls" not in last


def _blocks(role: str, content: list[Any]) -> list[dict[str, Any]]:
    text: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for block in content:
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "text" and isinstance(block.get("text"), str):
            text.append(block["text"])
        elif kind == "thinking" and role == "assistant" and isinstance(block.get("thinking"), str):
            thoughts.append(block["thinking"])
        elif kind == "tool_use" and role == "assistant":
            function = {"name": block.get("name"), "arguments": block.get("input")}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif kind == "tool_result" and role == "user":
            result = block.get("content") or ""
            if block.get("is_error") is True:  # templates have no other word for it
                result = (
                    f"Error: {result}" if isinstance(result, str) else [{"type": "text", "text": "Error: "}, *result]
                )
            results.append({"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": result})
        else:
            raise FieldError(
                "messages", f"messages: a message of the {role} can't have a block of the type {kind!r} here"
            )
    message: dict[str, Any] = {"role": role, "content": "".join(text)}
    if thoughts:
        message["reasoning_content"] = "".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return [*results, message] if text or calls or thoughts or not results else results


def _tools(given: Any) -> list[dict[str, Any]]:
    found = []
    for tool in given if isinstance(given, list) else [None]:
        if not isinstance(tool, dict) or tool.get("type", "custom") not in ("custom", None):
            raise FieldError(
                "tools", "tools must be a list of objects with name and input_schema; the server has none of its own"
            )
        function = {"name": tool.get("name"), "description": tool.get("description") or ""}
        found.append({"type": "function", "function": {**function, "parameters": tool.get("input_schema")}})
    return found


def _tool_choice(given: Any) -> dict[str, Any]:
    kind = given.get("type") if isinstance(given, dict) else None
    many = {} if kind is None else {"parallel_tool_calls": given.get("disable_parallel_tool_use") is not True}
    if kind == "tool":
        return {"tool_choice": {"type": "function", "function": {"name": given.get("name")}}, **many}
    if kind not in list(_CHOICES):  # it may be anything, even what has no hash
        raise FieldError("tool_choice", f"tool_choice: type must be auto, any, tool or none, not {kind!r}")
    return {"tool_choice": _CHOICES[kind], **many}


def _thinking(given: Any, max_tokens: Any) -> tuple[int | None, dict[str, Any]]:
    """(tokens that a thought may have, arguments for the chat template)."""
    kind = given.get("type") if isinstance(given, dict) else None
    if given is None or kind == "adaptive":
        return None, {}
    if kind == "disabled":
        return None, {"enable_thinking": False}
    if kind != "enabled":
        raise FieldError("thinking", f"thinking: type must be enabled, disabled or adaptive, not {kind!r}")
    budget = given.get("budget_tokens")
    if type(budget) is not int or type(max_tokens) is not int or not 1 <= budget < max_tokens:
        raise FieldError(
            "thinking", f"thinking: budget_tokens must be a whole number from 1 to less than max_tokens, not {budget!r}"
        )
    return budget, {"enable_thinking": True}


@dataclass
class MessageAnswer:
    """The answer to one request."""

    asked: GenerationRequest
    model: str
    id: str
    prompt: list[int]
    tokenizer: TokenizerWrapper

    def __post_init__(self) -> None:
        self._blocks = Blocks(self.asked.reader(self.tokenizer, self.prompt, self.id))

    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """All of it."""
        for output in outputs:
            self._blocks.take(output.text, output.finish_reason is not None)
        blocks = [
            _block_object(block, json.loads(block.text) if block.call else block.text) for block in self._blocks.all
        ]
        last = outputs[-1]
        return {**self._head(), **self._stop(last), "content": blocks, "usage": _usage(last.timings)}

    async def events(self, outputs: AsyncIterator[RequestOutput]) -> AsyncIterator[bytes]:
        """The events of its stream."""
        is_begun = False
        try:
            async for output in outputs:
                if not is_begun:
                    is_begun = True
                    head = {**self._head(), "content": [], "usage": _usage(output.timings)}
                    yield _event("message_start", message={**head, "stop_reason": None, "stop_sequence": None})
                for what, block, text in self._blocks.take(output.text, output.finish_reason is not None):
                    if what == "open":
                        empty = _block_object(block, {} if block.call else "")
                        yield _event("content_block_start", index=block.index, content_block=empty)
                    elif what == "more":
                        yield _event("content_block_delta", index=block.index, delta=_delta(block, text))
                    else:
                        yield _event("content_block_stop", index=block.index)
                if output.finish_reason is not None:
                    yield _event("message_delta", delta=self._stop(output), usage=_usage(output.timings))
                    yield _event("message_stop")
        except HippoError as error:
            yield _event("error", error=messages_error(error)["error"])

    def _head(self) -> dict[str, Any]:
        return {"id": self.id, "type": "message", "role": "assistant", "model": self.model}

    def _stop(self, last: RequestOutput) -> dict[str, Any]:
        """Why the message ended. One that stops without an end token has met a stop sequence: the first in it."""
        if last.finish_reason != "stop":  # Anthropic has no word for an answer that was ended because it repeats itself
            return {"stop_reason": "max_tokens", "stop_sequence": None}
        if last.token in self.tokenizer.eos_token_ids:
            return {"stop_reason": "tool_use" if self._blocks.num_calls else "end_turn", "stop_sequence": None}
        text = self.tokenizer.decode(last.timings.token_ids)
        met = min((word for word in self.asked.sampling.stop_words if word in text), key=text.index, default=None)
        return {"stop_reason": "stop_sequence", "stop_sequence": met}


def _block_object(block: Block, content: Any) -> dict[str, Any]:
    if block.call is not None:
        return {"type": "tool_use", "id": block.call.id, "name": block.call.name, "input": content}
    if block.kind == "reasoning":  # nobody signs thoughts here
        return {"type": "thinking", "thinking": content, "signature": ""}
    return {"type": "text", "text": content}


def _delta(block: Block, text: str) -> dict[str, Any]:
    if block.call is not None:
        return {"type": "input_json_delta", "partial_json": text}
    if block.kind == "reasoning":
        return {"type": "thinking_delta", "thinking": text}
    return {"type": "text_delta", "text": text}


def messages_error(error: Exception, kind: str = "") -> dict[str, Any]:
    """An error in Anthropic's shape."""
    kind = kind or ("invalid_request_error" if isinstance(error, UserError) else "api_error")
    message = str(error)
    if isinstance(error, ContextError):  # clients look for these words, and for the numbers
        message = f"prompt is too long: {error.prompt_tokens} tokens > {error.max_context} maximum; {error}"
    return {"type": "error", "error": {"type": kind, "message": message}}


def _usage(timings: Timings) -> dict[str, Any]:
    return {
        "input_tokens": timings.prompt_tokens - timings.cached_tokens,
        "cache_read_input_tokens": timings.cached_tokens,
        "output_tokens": len(timings.token_ids),
    }


def _event(kind: str, **fields: Any) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n".encode()
