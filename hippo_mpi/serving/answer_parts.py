"""What an answer's text is made of: what is said, what is thought, and tools that are called.

The marks between them are the tokenizer's, found by mlx-lm, as are the parsers of tool calls.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from typing import Any, Literal

from mlx_lm.tokenizer_utils import TokenizerWrapper

from hippo_mpi.engine.text import find_stop

Kind = Literal["content", "reasoning", "tool"]
_TAIL_TOKENS = 32  # of a prompt: where its template may have begun to think


@dataclass(frozen=True)
class Part:
    """A piece of one kind; of a tool call, the whole."""

    kind: Kind
    text: str


class PartSplitter:
    """Splits the text of one answer as it comes.

    Args:
        prompt: its tokens; a template may end with the beginning of a thought.
        has_tools: whether tools were offered: otherwise a call is just text.
    """

    def __init__(self, tokenizer: TokenizerWrapper, prompt: list[int], has_tools: bool) -> None:
        think_start, think_end = tokenizer.think_start, tokenizer.think_end
        self._marks: dict[Kind, dict[str, Kind]] = {"content": {}, "reasoning": {}, "tool": {}}
        self._kind: Kind = "content"
        if tokenizer.has_thinking:
            self._marks["content"][think_start] = "reasoning"
            self._marks["reasoning"][think_end] = "content"
            tail = tokenizer.decode(prompt[-_TAIL_TOKENS:])
            if tail.rfind(think_start) > tail.rfind(think_end):
                self._kind = "reasoning"
        if has_tools and tokenizer.has_tool_calling:
            self._marks["content"][tokenizer.tool_call_start] = "tool"
            if tokenizer.tool_call_end:
                self._marks["tool"][tokenizer.tool_call_end] = "content"
        self._held = ""

    def feed(self, text: str, is_last: bool) -> list[Part]:
        """The parts that are known to be complete with this text; the beginning of a mark is held back."""
        self._held += text
        parts: list[Part] = []
        while True:
            marks = self._marks[self._kind]
            cut, safe = find_stop(self._held, tuple(marks))
            if cut is None:
                break
            mark = max((m for m in marks if self._held.startswith(m, cut)), key=len)
            parts.append(Part(self._kind, self._held[:cut]))
            self._held, self._kind = self._held[cut + len(mark) :], marks[mark]
        if is_last:
            safe = len(self._held)
        if self._kind != "tool" or is_last:
            parts.append(Part(self._kind, self._held[:safe]))
            self._held = self._held[safe:]
        return [part for part in parts if part.text]


def tool_calls(tokenizer: TokenizerWrapper, text: str, tools: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    """OpenAI's objects for what a model wrote as a call; None if the parser doesn't understand it."""
    try:
        parsed = tokenizer.tool_parser(text, tools)
        found = []
        for call in parsed if isinstance(parsed, list) else [parsed]:
            arguments = call["arguments"]
            text_of = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
            function = {"name": str(call["name"]), "arguments": text_of}
            found.append({"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function})
    except Exception:  # mlx-lm's parsers raise whatever they meet: a model may write anything
        return None
    return found


class ChatMessage:
    """One choice of a chat completion as it comes: OpenAI's deltas, and the whole message."""

    def __init__(self, tokenizer: TokenizerWrapper, prompt: list[int], tools: list[dict[str, Any]]) -> None:
        self._tokenizer, self._tools = tokenizer, tools
        self._splitter = PartSplitter(tokenizer, prompt, bool(tools))
        self._said = self._thought = ""
        self._calls: list[dict[str, Any]] = []

    def delta(self, text: str, is_last: bool) -> dict[str, Any]:
        """What this text adds."""
        found: dict[str, Any] = {}
        for part in self._splitter.feed(text, is_last):
            calls = tool_calls(self._tokenizer, part.text, self._tools) if part.kind == "tool" else None
            if calls is not None:
                start = len(self._calls)
                self._calls += calls
                numbered = [{"index": start + index, **call} for index, call in enumerate(calls)]
                found["tool_calls"] = found.get("tool_calls", []) + numbered
            elif part.kind == "reasoning":
                self._thought += part.text
                found["reasoning_content"] = found.get("reasoning_content", "") + part.text
            else:  # a call that nobody understands is at least shown
                self._said += part.text
                found["content"] = found.get("content", "") + part.text
        return found

    def message(self) -> dict[str, Any]:
        """All of it."""
        found: dict[str, Any] = {"role": "assistant", "content": self._said or (None if self._calls else "")}
        if self._thought:
            found["reasoning_content"] = self._thought
        if self._calls:
            found["tool_calls"] = self._calls
        return found

    def finish_reason(self, reason: str | None) -> str | None:
        """OpenAI's: an answer that stops after calls waits for their results."""
        return "tool_calls" if reason == "stop" and self._calls else reason
