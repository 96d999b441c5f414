"""Requests and answers of Anthropic's API (POST /v1/messages).

Every field is honoured, refused by name, or in a table of ignored_fields.py.
"""

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
"""Fields with the same content in OpenAI's API, with their names there."""
_ROLES = ("user", "assistant", "system")  # system messages may also come in the middle of a conversation
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def read_messages_body(body: dict[str, Any], defaults: SamplingParams) -> GenerationRequest:
    """Read and check the body of a request to MESSAGES.

    Raises:
        UserError: it is invalid; the message names the field.
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
    """Read and check the body of a request to COUNT_TOKENS, which has no max_tokens; raises as `read_messages_body`."""
    return read_messages_body({**body, "max_tokens": 1 << 29}, defaults)


def _output(config: Any, older_format: Any) -> dict[str, Any]:
    """Return OpenAI's fields for an effort and an output format; `older_format` is where earlier clients put it."""
    if not isinstance(config, dict) or set(config) - {"effort", "format"}:
        raise FieldError("output_config", "output_config can only have effort and format")
    form = older_format if config.get("format") is None else config["format"]
    fields: dict[str, Any] = {"reasoning_effort": config.get("effort")}
    if form is not None:
        if not isinstance(form, dict) or form.get("type") != "json_schema":
            raise FieldError("output_config", "output_config: format must have the type json_schema, and a schema")
        fields["response_format"] = {"type": "json_schema", "json_schema": {"schema": form.get("schema")}}
    return fields


def _messages(given: Any, system: Any) -> list[dict[str, Any]]:
    """Return OpenAI's messages, in which each tool result is a message of its own."""
    if not isinstance(given, list) or not all(isinstance(message, dict) for message in given):
        raise FieldError("messages", "messages must be a list of objects with role and content")
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    for message in given:
        role, content = message.get("role"), message.get("content")
        if role not in _ROLES:
            raise FieldError("messages", f"messages: role must be one of {', '.join(_ROLES)}, not {role!r}")
        messages += [{"role": role, "content": content}] if not isinstance(content, list) else _blocks(role, content)
    return _in_turns(messages)


def _in_turns(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Join consecutive texts of one role, as Anthropic does: many chat templates require that roles alternate."""
    joined: list[dict[str, Any]] = []
    for message in messages:
        last = joined[-1] if joined else {}
        texts = [last.get("content"), message["content"]]
        is_plain = set(last) == set(message) == {"role", "content"} and message["role"] in ("user", "assistant")
        if is_plain and last["role"] == message["role"] and all(isinstance(text, str) for text in texts):
            joined[-1] = {**message, "content": "\n\n".join(texts)}
        else:
            joined.append(message)
    return joined


def _is_prefill(messages: list[dict[str, Any]]) -> bool:
    """Return True if the last message is the beginning of the answer, which is to be continued."""
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
            if block.get("is_error") is True:  # chat templates have no field for it
                result = (
                    f"Error: {result}" if isinstance(result, str) else [{"type": "text", "text": "Error: "}, *result]
                )
            results.append({"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": result})
        else:
            raise FieldError(
                "messages", f"messages: a message with role {role} can't have a block of type {kind!r} here"
            )
    message: dict[str, Any] = {"role": role, "content": "".join(text)}
    if thoughts:
        message["reasoning_content"] = "".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return [*results, message] if text or calls or thoughts or not results else results


def _tools(given: Any) -> list[dict[str, Any]]:
    tools = []
    for tool in given if isinstance(given, list) else [None]:
        if not isinstance(tool, dict) or tool.get("type", "custom") not in ("custom", None):
            raise FieldError(
                "tools", "tools must be a list of objects with name and input_schema; server tools aren't supported"
            )
        function = {"name": tool.get("name"), "description": tool.get("description") or ""}
        tools.append({"type": "function", "function": {**function, "parameters": tool.get("input_schema")}})
    return tools


def _tool_choice(given: Any) -> dict[str, Any]:
    kind = given.get("type") if isinstance(given, dict) else None
    many = {} if kind is None else {"parallel_tool_calls": given.get("disable_parallel_tool_use") is not True}
    if kind == "tool":
        return {"tool_choice": {"type": "function", "function": {"name": given.get("name")}}, **many}
    if kind not in list(_CHOICES):  # a list, since `kind` may be unhashable
        raise FieldError("tool_choice", f"tool_choice: type must be auto, any, tool or none, not {kind!r}")
    return {"tool_choice": _CHOICES[kind], **many}


def _thinking(given: Any, max_tokens: Any) -> tuple[int | None, dict[str, Any]]:
    """Return the most tokens that thinking may take (None: no limit), and arguments for the chat template."""
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
    """The answer to one request, with the id and the model that it shows."""

    asked: GenerationRequest
    model: str
    id: str
    prompt: list[int]
    tokenizer: TokenizerWrapper

    def __post_init__(self) -> None:
        self._blocks = Blocks(self.asked.reader(self.tokenizer, self.prompt, self.id))

    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """Return the complete answer as Anthropic's message object."""
        for output in outputs:
            self._blocks.take(output.text, output.finish_reason is not None)
        blocks = [
            _block_object(block, json.loads(block.text) if block.call else block.text) for block in self._blocks.all
        ]
        last = outputs[-1]
        return {**self._head(), **self._stop(last), "content": blocks, "usage": _usage(last.timings)}

    async def events(self, outputs: AsyncIterator[RequestOutput]) -> AsyncIterator[bytes]:
        """Yield the answer as server-sent events; an error of the outputs becomes an error event."""
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
        """Return why the answer ended.

        If it stopped without an end token, that was a stop sequence: the one that comes first in the text.
        """
        if last.finish_reason != "stop":  # Anthropic has no reason for an answer that was ended for repeating itself
            return {"stop_reason": "max_tokens", "stop_sequence": None}
        if last.token in self.tokenizer.eos_token_ids:
            return {"stop_reason": "tool_use" if self._blocks.num_calls else "end_turn", "stop_sequence": None}
        text = self.tokenizer.decode(last.timings.token_ids)
        met = min((word for word in self.asked.sampling.stop_words if word in text), key=text.index, default=None)
        return {"stop_reason": "stop_sequence", "stop_sequence": met}


def _block_object(block: Block, content: Any) -> dict[str, Any]:
    if block.call is not None:
        return {"type": "tool_use", "id": block.call.id, "name": block.call.name, "input": content}
    if block.kind == "reasoning":  # thoughts aren't signed here
        return {"type": "thinking", "thinking": content, "signature": ""}
    return {"type": "text", "text": content}


def _delta(block: Block, text: str) -> dict[str, Any]:
    if block.call is not None:
        return {"type": "input_json_delta", "partial_json": text}
    if block.kind == "reasoning":
        return {"type": "thinking_delta", "thinking": text}
    return {"type": "text_delta", "text": text}


def messages_error(error: Exception, kind: str = "") -> dict[str, Any]:
    """Return an error as Anthropic's error object, of type `kind` or, if empty, of one that fits the error."""
    kind = kind or ("invalid_request_error" if isinstance(error, UserError) else "api_error")
    message = str(error)
    if isinstance(error, ContextError):  # clients search for this text and its numbers
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
