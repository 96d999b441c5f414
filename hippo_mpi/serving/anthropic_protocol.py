"""Anthropic's words for requests and answers (POST /v1/messages). Every field is honoured, refused, or has no effect."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from hippo_mpi.engine.request import RequestOutput, SamplingParams, Timings
from hippo_mpi.errors import HippoError, UserError
from hippo_mpi.serving.openai_protocol import CHAT, Asked, read_body

MESSAGES = "/v1/messages"
_WITHOUT_EFFECT = {"model", "metadata", "service_tier", "stream"}
_SAME = {"messages", "max_tokens", "temperature", "top_p", "top_k"}


def read_messages_body(body: dict[str, Any], defaults: SamplingParams) -> Asked:
    """Check a request body.

    Raises:
        UserError: what is wrong with it, with the name of the field.
    """
    if body.get("max_tokens") is None:
        raise UserError("max_tokens: Field required")
    chat: dict[str, Any] = {}
    for name, value in body.items():
        if name in _SAME:
            chat[name] = value
        elif name == "stop_sequences":
            chat["stop"] = value
        elif name == "system":
            continue  # below: it goes in front of the messages
        elif name not in _WITHOUT_EFFECT and value is not None:
            raise UserError(f"unknown field {name!r}")
    if body.get("system") and isinstance(chat.get("messages"), list):
        chat["messages"] = [{"role": "system", "content": body["system"]}, *chat["messages"]]
    return read_body(CHAT, chat, defaults)


def message_object(
    asked: Asked, model: str, message_id: str, outputs: list[RequestOutput], tokenizer: TokenizerWrapper
) -> dict[str, Any]:
    """The message that a request's outputs amount to."""
    text, last = "".join(output.text for output in outputs), outputs[-1]
    found = {**_head(model, message_id), **_stop(asked, last, tokenizer)}
    return {**found, "content": [{"type": "text", "text": text}], "usage": _usage(last.timings)}


async def message_events(
    asked: Asked, model: str, message_id: str, outputs: AsyncIterator[RequestOutput], tokenizer: TokenizerWrapper
) -> AsyncIterator[bytes]:
    """The events of a streamed message."""
    try:
        is_begun = False
        async for output in outputs:
            if not is_begun:
                is_begun = True
                head = {**_head(model, message_id), "content": [], "usage": _usage(output.timings)}
                yield _event("message_start", message={**head, "stop_reason": None, "stop_sequence": None})
                yield _event("content_block_start", index=0, content_block={"type": "text", "text": ""})
            if output.text:
                yield _event("content_block_delta", index=0, delta={"type": "text_delta", "text": output.text})
            if output.finish_reason is not None:
                yield _event("content_block_stop", index=0)
                yield _event("message_delta", delta=_stop(asked, output, tokenizer), usage=_usage(output.timings))
                yield _event("message_stop")
    except HippoError as error:
        yield _event("error", error=messages_error(error)["error"])


def messages_error(error: Exception, kind: str = "") -> dict[str, Any]:
    """An error in Anthropic's shape."""
    kind = kind or ("invalid_request_error" if isinstance(error, UserError) else "api_error")
    return {"type": "error", "error": {"type": kind, "message": str(error)}}


def _head(model: str, message_id: str) -> dict[str, Any]:
    return {"id": message_id, "type": "message", "role": "assistant", "model": model}


def _stop(asked: Asked, last: RequestOutput, tokenizer: TokenizerWrapper) -> dict[str, Any]:
    """Why the message ended. An answer that stops without an end token has met a stop sequence: the first in it."""
    if last.finish_reason != "stop":  # Anthropic has no word for an answer that was ended because it repeats itself
        return {"stop_reason": "max_tokens", "stop_sequence": None}
    if last.token in tokenizer.eos_token_ids:
        return {"stop_reason": "end_turn", "stop_sequence": None}
    text = tokenizer.decode(last.timings.token_ids)
    met = min((word for word in asked.sampling.stop_words if word in text), key=text.index, default=None)
    return {"stop_reason": "stop_sequence", "stop_sequence": met}


def _usage(timings: Timings) -> dict[str, Any]:
    return {
        "input_tokens": timings.prompt_tokens - timings.cached_tokens,
        "cache_read_input_tokens": timings.cached_tokens,
        "output_tokens": len(timings.token_ids),
    }


def _event(kind: str, **fields: Any) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n".encode()
