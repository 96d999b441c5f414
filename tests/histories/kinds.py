"""Streams of every kind: what is sent to which endpoint. Pure: a kind and the number of its variant say all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from tests.servers import GOES_ON

THINKS, OTHER = "thinks", "other"
"""The models of the server that histories happen to: one with tools, thoughts and drafts, and one to change to."""
COMPLETIONS, CHAT, MESSAGES, RESPONSES = (
    "/v1/completions", "/v1/chat/completions", "/v1/messages", "/v1/responses",
)  # fmt: skip
NUM_VARIANTS = 3
THOUGHT = 1429
"""The token with which the model's thoughts begin."""
NO_THOUGHT = {str(THOUGHT): -100}
_ANIMALS = ("fox", "hen", "bear", "owl", "goat", "mouse")
_SCHEMA: dict[str, Any] = {
    "type": "object", "required": ["hero", "friends", "age"], "additionalProperties": False,
    "properties": {
        "hero": {"enum": list(_ANIMALS)}, "age": {"type": "integer", "minimum": 1, "maximum": 99},
        "friends": {"type": "array", "minItems": 4, "maxItems": 8, "items": {"type": "string", "maxLength": 12}},
    },
}  # fmt: skip


@dataclass(frozen=True)
class Ask:
    """One request: a body for an endpoint."""

    path: str
    body: dict[str, Any]

    @property
    def is_stream(self) -> bool:
        return bool(self.body.get("stream"))


def _completion(draw: Random, **fields: Any) -> Ask:
    body = {
        "model": THINKS, "prompt": f"Once upon a time a {draw.choice(_ANIMALS)}", "max_tokens": draw.randint(80, 160),
        "temperature": 1.0, "seed": draw.randrange(1000), "logit_bias": GOES_ON, "stream": True,
    }  # fmt: skip
    body |= {"stream_options": {"include_usage": True}} if fields.get("stream", True) else {}
    return Ask(COMPLETIONS, {name: value for name, value in (body | fields).items() if value is not None})


def _chat(draw: Random, **fields: Any) -> Ask:
    ask = _completion(draw, **fields)
    asked = ask.body.pop("prompt")
    args = {"enable_thinking": False}
    return Ask(
        CHAT, {"messages": [{"role": "user", "content": asked}], "chat_template_kwargs": args, **ask.body, **fields}
    )


def _message(draw: Random, **fields: Any) -> Ask:
    asked = f"Tell me a story about a {draw.choice(_ANIMALS)} and a lantern."
    body = {
        "model": THINKS, "messages": [{"role": "user", "content": asked}], "max_tokens": draw.randint(80, 160),
        "temperature": 1.0, "stream": True, "thinking": {"type": "disabled"},
    }  # fmt: skip
    return Ask(MESSAGES, body | fields)


def _response(draw: Random, **fields: Any) -> Ask:
    asked = f"Tell me a story about a {draw.choice(_ANIMALS)} and a lantern."
    body = {
        "model": THINKS, "input": asked, "max_output_tokens": draw.randint(80, 160), "temperature": 1.0,
        "stream": True, "reasoning": {"effort": "none"},
    }  # fmt: skip
    return Ask(RESPONSES, body | fields)


def _tool(draw: Random) -> dict[str, Any]:
    return {"name": f"find_{draw.choice(_ANIMALS)}", "parameters": _SCHEMA}


def _long_prompt(draw: Random) -> str:
    """Some 1,400 tokens, that take many steps to read; half of it is the same for all."""
    common, own = Random(7), Random(draw.random())
    words = [f"The {common.choice(_ANIMALS)} met the {common.choice(_ANIMALS)}." for _ in range(60)]
    return " ".join(words + [f"A {own.choice(_ANIMALS)} saw a {own.choice(_ANIMALS)}." for _ in range(60)])


_FORMAT = {"type": "json_schema", "json_schema": {"name": "story", "schema": _SCHEMA}}
KINDS: dict[str, Callable[[Random], Ask]] = {
    "greedy": lambda draw: _completion(draw, temperature=0.0),
    "drawn": _completion,
    "choices": lambda draw: _completion(draw, n=3),
    "prompts": lambda draw: _completion(draw, prompt=[f"A {a}" for a in draw.sample(_ANIMALS, 3)], n=2, max_tokens=40),
    "logprobs": lambda draw: _completion(draw, logprobs=3),
    "echo": lambda draw: _completion(draw, logprobs=2, echo=True, stream=False, logit_bias=None, max_tokens=40),
    "stop words": lambda draw: _completion(draw, stop=["never said", "the river and the ", " hill."], max_tokens=200),
    "penalties": lambda draw: _completion(
        draw, presence_penalty=0.5, frequency_penalty=0.5, repetition_penalty=1.1, top_k=40, top_p=0.95, min_p=0.01
    ),
    "repetition": lambda draw: _completion(draw, temperature=0.0, max_repeats=3, max_tokens=200),
    "minimum": lambda draw: _completion(draw, logit_bias={}, min_tokens=50, n=2),
    "whole": lambda draw: _completion(draw, stream=False, n=2, logprobs=1),
    "JSON": lambda draw: _completion(draw, response_format=_FORMAT, logit_bias=NO_THOUGHT, max_tokens=200),
    "long prompt": lambda draw: _completion(draw, prompt=_long_prompt(draw), max_tokens=30),
    "other model": lambda draw: _completion(draw, model=OTHER, logit_bias={}),
    "chat": _chat,
    "chat logprobs": lambda draw: _chat(draw, n=2, logprobs=True, top_logprobs=2),
    "chat JSON": lambda draw: _chat(draw, response_format=_FORMAT, logit_bias={}, max_tokens=200),
    "chat tool": lambda draw: _chat(
        draw, tools=[{"type": "function", "function": _tool(draw)}], tool_choice="required", logit_bias={}, max_tokens=200
    ),
    "chat thoughts": lambda draw: _chat(draw, chat_template_kwargs={"enable_thinking": True}),
    "whole chat": lambda draw: _chat(draw, stream=False),
    "message": lambda draw: _message(draw, stop_sequences=["never said"]),
    "message greedy": lambda draw: _message(draw, temperature=0.0),
    "message thoughts": lambda draw: _message(draw, thinking={"type": "enabled", "budget_tokens": 30}),
    "message tool": lambda draw: _message(
        draw, tools=[{"name": "find_fox", "input_schema": _SCHEMA}], tool_choice={"type": "any"}, max_tokens=200
    ),
    "whole message": lambda draw: _message(draw, stream=False),
    "response": _response,
    "response thoughts": lambda draw: _response(draw, reasoning={"effort": "low"}),
    "response JSON": lambda draw: _response(
        draw, text={"format": {"type": "json_schema", "name": "story", "schema": _SCHEMA}}, max_output_tokens=200
    ),
    "response tool": lambda draw: _response(
        draw, tools=[{"type": "function", **_tool(draw)}], tool_choice="required", max_output_tokens=200
    ),
    "whole response": lambda draw: _response(draw, stream=False),
}  # fmt: skip


def ask_of(kind: str, variant: int) -> Ask:
    return KINDS[kind](Random(f"{kind} {variant}"))
