"""What a client is told by an answer, whichever API says it, streamed or whole: without ids, times and chunk borders."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.histories.kinds import CHAT, COMPLETIONS, MESSAGES, RESPONSES, Ask

_NEAR = 0.01  # between logprobs: rows in other company round otherwise


class Lost(Exception):
    """A client got an error, or an end that is none."""


@dataclass
class Said:
    """What was told, by place ("0.text", say), and when.

    Args:
        took_s: from the request to the last byte.
        longest_wait_s: for an event.
        num_events: that brought something.
    """

    texts: dict[str, str] = field(default_factory=dict)
    logprobs: dict[str, list[float]] = field(default_factory=dict)
    took_s: float = 0.0
    longest_wait_s: float = 0.0
    num_events: int = 0
    gaps_s: list[float] = field(default_factory=list)
    has_ended: bool = False

    def add(self, place: str, text: Any) -> None:
        if text is not None:
            self.texts[place] = self.texts.get(place, "") + str(text)

    def add_logprob(self, place: str, value: float | None) -> None:
        self.logprobs.setdefault(place, []).append(math.nan if value is None else value)

    def difference(self, wanted: Said) -> str:
        """Where this isn't the beginning of `wanted`, or, if it has ended, not all of it; "" if it is."""
        for place in sorted({*self.texts, *wanted.texts} if self.has_ended else self.texts):
            mine, other = self.texts.get(place), wanted.texts.get(place)
            if mine == other or (not self.has_ended and mine is not None and (other or "").startswith(mine)):
                continue
            mine, other = mine or "", other or ""
            at = next(
                (i for i, (a, b) in enumerate(zip(mine, other, strict=False)) if a != b), min(len(mine), len(other))
            )
            return f"{place} at {at}: {mine[max(0, at - 20) : at + 40]!r}, not {other[max(0, at - 20) : at + 40]!r}"
        for place, values in self.logprobs.items():
            others = wanted.logprobs.get(place, [])
            if len(values) > len(others) or (self.has_ended and len(values) != len(others)):
                return f"{place}: {len(values)} logprobs, not {len(others)}"
            for index, (a, b) in enumerate(zip(values, others, strict=False)):
                if abs(a - b) > _NEAR or math.isnan(a) != math.isnan(b):
                    return f"{place} at {index}: logprob {a}, not {b}"
        return ""


def listen(url: str, ask: Ask, limit_s: float, leaves_after: int | None = None) -> Said:
    """Ask, and take the answer down, to its end or until the client goes away.

    Raises:
        Lost: an error, an end in the midst, or no end within `limit_s`.
    """
    said, began = Said(), time.monotonic()
    try:
        with httpx.stream("POST", url + ask.path, json=ask.body, timeout=limit_s) as answer:
            if answer.status_code != 200:
                answer.read()
                raise Lost(f"status {answer.status_code}: {answer.text[:300]}")
            if ask.is_stream:
                _take_events(answer, ask.path, said, began + limit_s, leaves_after)
            else:
                answer.read()
                _WHOLE[ask.path](said, answer.json())
                said.has_ended = True
    except httpx.HTTPError as error:
        raise Lost(f"{type(error).__name__}: {error}") from None
    said.took_s = time.monotonic() - began
    if not said.has_ended and leaves_after is None:
        raise Lost(f"the stream ended in the midst, after {said.num_events} events")
    return said


def _take_events(answer: httpx.Response, path: str, said: Said, ends: float, leaves_after: int | None) -> None:
    before = time.monotonic()
    for line in answer.iter_lines():
        now = time.monotonic()
        if now > ends:
            raise Lost(f"no end in time, after {said.num_events} events")
        if not line.startswith("data: "):
            continue
        said.longest_wait_s = max(said.longest_wait_s, now - before)
        said.gaps_s.append(now - before)
        before, said.num_events = now, said.num_events + 1
        if line == "data: [DONE]":
            said.has_ended = True
        else:
            event = json.loads(line.removeprefix("data: "))
            if event.get("error") or event.get("type") == "response.failed":
                raise Lost(f"an error after {said.num_events} events: {line[:300]}")
            _EVENTS[path](said, event)
        if said.num_events == leaves_after:
            return


# ---- each API's words


def _completion(said: Said, event: dict[str, Any]) -> None:
    for choice in event["choices"]:
        place = choice["index"]
        said.add(f"{place}.text", choice["text"])
        said.add(f"{place}.end", choice["finish_reason"])
        told = choice.get("logprobs") or {}
        for token, value in zip(told.get("tokens", ()), told.get("token_logprobs", ()), strict=True):
            said.add(f"{place}.tokens", f"{token}|")
            said.add_logprob(f"{place}.logprobs", value)
    _usage(said, event.get("usage"), "completion_tokens")


def _chat(said: Said, event: dict[str, Any]) -> None:
    for choice in event["choices"]:
        place, message = choice["index"], choice.get("delta") or choice.get("message") or {}
        for name in ("content", "reasoning_content"):
            said.add(f"{place}.{name}", message.get(name) or None)
        for index, call in enumerate(message.get("tool_calls") or ()):
            for name, text in call["function"].items():
                said.add(f"{place}.call {call.get('index', index)}.{name}", text)
        said.add(f"{place}.end", choice["finish_reason"])
        for told in (choice.get("logprobs") or {}).get("content") or ():
            said.add(f"{place}.tokens", f"{told['token']}|")
            said.add_logprob(f"{place}.logprobs", told["logprob"])
    _usage(said, event.get("usage"), "completion_tokens")


def _message(said: Said, event: dict[str, Any]) -> None:
    kind = event["type"]
    if kind == "content_block_start":
        _block(said, event["index"], event["content_block"])
    elif kind == "content_block_delta":
        for name in ("text", "thinking", "partial_json"):
            said.add(f"{event['index']}.{name}", event["delta"].get(name))
    elif kind == "message_delta":
        _end_of_message(said, event["delta"], event["usage"])
    said.has_ended |= kind == "message_stop"


def _whole_message(said: Said, message: dict[str, Any]) -> None:
    for index, block in enumerate(message["content"]):
        _block(said, index, block)
    _end_of_message(said, message, message["usage"])


def _block(said: Said, index: int, block: dict[str, Any]) -> None:
    for name in ("type", "name", "text", "thinking"):
        said.add(f"{index}.{name}", block.get(name))


def _end_of_message(said: Said, end: dict[str, Any], usage: dict[str, Any]) -> None:
    said.add("end", f"{end['stop_reason']} {end['stop_sequence']}")
    _usage(said, usage, "output_tokens")


def _response(said: Said, event: dict[str, Any]) -> None:
    kind = event["type"]
    if kind.endswith(".delta"):
        said.add(f"{event.get('output_index')}.{kind}", event["delta"])
    elif kind in ("response.completed", "response.incomplete"):
        _whole_response(said, event["response"])
        said.has_ended = True


def _whole_response(said: Said, response: dict[str, Any]) -> None:
    for index, item in enumerate(response["output"]):
        for name in ("type", "name", "arguments"):
            said.add(f"{index}.{name}", item.get(name))
        for part in item.get("content") or ():
            said.add(f"{index}.text", part.get("text"))
    said.add("end", f"{response['status']} {response.get('incomplete_details')}")
    _usage(said, response["usage"], "output_tokens")


def _usage(said: Said, usage: dict[str, Any] | None, name: str) -> None:
    if usage:
        said.add("tokens", usage[name])


_EVENTS = {COMPLETIONS: _completion, CHAT: _chat, MESSAGES: _message, RESPONSES: _response}
_WHOLE = {COMPLETIONS: _completion, CHAT: _chat, MESSAGES: _whole_message, RESPONSES: _whole_response}
