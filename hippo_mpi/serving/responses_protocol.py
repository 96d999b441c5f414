"""OpenAI's words for responses (POST /v1/responses). Every field is honoured, refused, or has no effect; nothing is kept
for a later request."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from itertools import count
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from hippo_mpi.engine.request import RequestOutput, SamplingParams, Timings
from hippo_mpi.errors import HippoError, UserError
from hippo_mpi.serving.openai_protocol import CHAT, Asked, read_body

RESPONSES = "/v1/responses"
_WITHOUT_EFFECT = {"model", "metadata", "service_tier", "stream", "store", "user", "safety_identifier"}
_INCOMPLETE = {"length": "max_output_tokens"}
_ONLY = {"background": False, "truncation": "disabled", "tools": [], "previous_response_id": None}


def read_responses_body(body: dict[str, Any], defaults: SamplingParams) -> Asked:
    """Check a request body.

    Raises:
        UserError: what is wrong with it, with the name of the field.
    """
    chat: dict[str, Any] = {}
    for name, value in body.items():
        if name in ("temperature", "top_p"):
            chat[name] = value
        elif name == "max_output_tokens":
            chat["max_tokens"] = value
        elif name in _ONLY:
            if value not in (None, _ONLY[name]):
                raise UserError(f"{name} must be {_ONLY[name]!r} here, not {value!r}")
        elif name not in _WITHOUT_EFFECT | {"input", "instructions"} and value is not None:
            raise UserError(f"unknown field {name!r}")
    chat["messages"] = _messages(body.get("input"), body.get("instructions"))
    return read_body(CHAT, chat, defaults)


def _messages(given: Any, instructions: Any) -> list[Any]:
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    if not isinstance(given, list) or not all(isinstance(item, dict) for item in given):
        raise UserError("input must be a text, or a list of messages")
    if any(item.get("type", "message") != "message" for item in given):
        raise UserError("input takes messages only")
    found = [{"role": item.get("role"), "content": item.get("content")} for item in given]
    if instructions is None:
        return found
    return [{"role": "system", "content": instructions}, *found]


def response_object(
    _: Asked, model: str, response_id: str, outputs: list[RequestOutput], __: TokenizerWrapper
) -> dict[str, Any]:
    """The response that a request's outputs amount to."""
    text, last = "".join(output.text for output in outputs), outputs[-1]
    return _response(model, response_id, last.timings, text, last.finish_reason)


async def response_events(
    _: Asked, model: str, response_id: str, outputs: AsyncIterator[RequestOutput], __: TokenizerWrapper
) -> AsyncIterator[bytes]:
    """The events of a streamed response."""
    numbers, is_begun = count(), False

    def event(kind: str, **fields: Any) -> bytes:
        found = {"type": kind, "sequence_number": next(numbers), **fields}
        return f"event: {kind}\ndata: {json.dumps(found)}\n\n".encode()

    text = ""
    try:
        async for output in outputs:
            item = {"output_index": 0, "item_id": f"msg_{response_id}"}
            if not is_begun:
                is_begun = True
                begun = _response(model, response_id, output.timings, "", None)
                yield event("response.created", response=begun)
                yield event("response.output_item.added", output_index=0, item=_item(response_id, None))
                yield event("response.content_part.added", **item, content_index=0, part=_part(""))
            text += output.text
            if output.text:
                yield event("response.output_text.delta", **item, content_index=0, delta=output.text, logprobs=[])
            if output.finish_reason is not None:
                yield event("response.output_text.done", **item, content_index=0, text=text, logprobs=[])
                yield event("response.content_part.done", **item, content_index=0, part=_part(text))
                yield event("response.output_item.done", output_index=0, item=_item(response_id, text))
                whole = _response(model, response_id, output.timings, text, output.finish_reason)
                yield event(f"response.{whole['status']}", response=whole)
    except HippoError as error:
        yield event("error", message=str(error), code="server_error", param=None)


def _response(model: str, response_id: str, timings: Timings, text: str, reason: str | None) -> dict[str, Any]:
    status = {None: "in_progress", "stop": "completed"}.get(reason, "incomplete")
    made = len(timings.token_ids)
    return {
        "id": response_id,
        "object": "response",
        "created_at": int(time.time()),
        "model": model,
        "status": status,
        "error": None,
        "incomplete_details": {"reason": _INCOMPLETE.get(reason or "", reason)} if status == "incomplete" else None,
        "output": [] if reason is None else [_item(response_id, text)],
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        "usage": {
            "input_tokens": timings.prompt_tokens,
            "input_tokens_details": {"cached_tokens": timings.cached_tokens},
            "output_tokens": made,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": timings.prompt_tokens + made,
        },
    }


def _item(response_id: str, text: str | None) -> dict[str, Any]:
    """The one message of a response; without text it has just begun."""
    content = [] if text is None else [_part(text)]
    status = "in_progress" if text is None else "completed"
    return {"id": f"msg_{response_id}", "type": "message", "role": "assistant", "status": status, "content": content}


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
