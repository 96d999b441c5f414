"""The parts of an answer's text: content, reasoning and tool calls, independent of any API's names for them.

The marks between them, and the parsers of tool calls, are those that mlx-lm finds in the tokenizer.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from mlx_lm.tokenizer_utils import TokenizerWrapper

from hippo_mpi.engine.text import find_stop
from hippo_mpi.engine.thinking import Thinking

Kind = Literal["content", "reasoning", "tool"]


@dataclass(frozen=True)
class Part:
    """A piece of text of one kind; a tool call comes in one piece."""

    kind: Kind
    text: str


@dataclass(frozen=True)
class Call:
    """A call of a tool: its name, and its arguments as JSON text."""

    name: str
    arguments: str
    id: str


class PartSplitter:
    """A splitter of one answer's text into parts, as the text is generated.

    Args:
        tokenizer: whose marks separate the parts.
        prompt: its tokens; a chat template may end inside a thought that it has opened.
        has_tools: whether tools were offered; without them a call counts as text.
    """

    def __init__(self, tokenizer: TokenizerWrapper, prompt: list[int], has_tools: bool) -> None:
        think_start, think_end = tokenizer.think_start, tokenizer.think_end
        self._marks: dict[Kind, dict[str, Kind]] = {"content": {}, "reasoning": {}, "tool": {}}
        self._kind: Kind = "content"
        if tokenizer.has_thinking:
            self._marks["content"][think_start] = "reasoning"
            self._marks["reasoning"][think_end] = "content"
            if Thinking(tokenizer, prompt).is_open:
                self._kind = "reasoning"
        if has_tools and tokenizer.has_tool_calling:
            self._marks["content"][tokenizer.tool_call_start] = "tool"
            if tokenizer.tool_call_end:
                self._marks["tool"][tokenizer.tool_call_end] = "content"
        self._held = ""

    def feed(self, text: str, is_last: bool) -> list[Part]:
        """Return the parts that are certain with this text.

        What may be the beginning of a mark is held back until it is decided, and a tool call until it is complete.
        """
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


def _calls(tokenizer: TokenizerWrapper, text: str, tools: list[dict[str, Any]]) -> list[tuple[str, str]] | None:
    """Parse a model's tool calls; return names with arguments as JSON text, or None if the parser fails on them."""
    try:
        parsed = tokenizer.tool_parser(text, tools)
        calls = []
        for call in parsed if isinstance(parsed, list) else [parsed]:
            arguments = call["arguments"]
            text_of = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
            json.loads(text_of)
            calls.append((str(call["name"]), text_of))
    except Exception:  # a model may write anything, and mlx-lm's parsers may raise anything
        return None
    return calls


class AnswerReader:
    """A reader of one answer's parts and calls, as its text is generated.

    Args:
        tokenizer: of the model that answers.
        prompt: the tokens that are answered.
        tools: which the answer may call.
        max_calls: further calls are left out; None: no limit.
        name: of the answer; call ids are derived from it, so that reading an answer again gives the same ones. Empty: a
            random name.
    """

    def __init__(
        self,
        tokenizer: TokenizerWrapper,
        prompt: list[int],
        tools: list[dict[str, Any]],
        max_calls: int | None = None,
        name: str = "",
    ) -> None:
        self._tokenizer, self._tools, self._max_calls = tokenizer, tools, max_calls
        self._name = name or secrets.token_hex(12)
        self._splitter = PartSplitter(tokenizer, prompt, bool(tools))
        self.num_calls = 0

    def read(self, text: str, is_last: bool) -> list[Part | Call]:
        """Return the parts and calls that this text adds; a call that can't be parsed is returned as content."""
        pieces: list[Part | Call] = []
        for part in self._splitter.feed(text, is_last):
            calls = _calls(self._tokenizer, part.text, self._tools) if part.kind == "tool" else None
            if calls is None:
                pieces.append(Part("reasoning" if part.kind == "reasoning" else "content", part.text))
            else:
                calls = calls[: None if self._max_calls is None else self._max_calls - self.num_calls]
                for name, arguments in calls:
                    pieces.append(Call(name, arguments, self._call_id()))
                    self.num_calls += 1
        return pieces

    def _call_id(self) -> str:
        return f"call_{hashlib.sha256(f'{self._name}/{self.num_calls}'.encode()).hexdigest()[:24]}"


@dataclass
class Block:
    """Adjacent pieces of one kind, or one call."""

    index: int
    kind: Literal["content", "reasoning", "call"]
    text: str = ""  # of a call: its arguments
    call: Call | None = None


Change = tuple[Literal["open", "more", "close"], Block, str]
"""A change of a block, and the text that "more" adds to it."""


class Blocks:
    """An answer as a list of blocks, as in Anthropic's messages and OpenAI's responses."""

    def __init__(self, reader: AnswerReader) -> None:
        self.all: list[Block] = []
        self._reader = reader
        self._is_open = False

    @property
    def num_calls(self) -> int:
        """The number of tool calls so far."""
        return self._reader.num_calls

    def take(self, text: str, is_last: bool) -> list[Change]:
        """Add text to the blocks and return how they change; after the last text there is at least one block."""
        return list(self._changes(self._reader.read(text, is_last), is_last))

    def _changes(self, pieces: Iterable[Part | Call], is_last: bool) -> Iterator[Change]:
        for piece in pieces:
            if isinstance(piece, Call):
                yield from self._close()
                yield from self._open(Block(len(self.all), "call", call=piece))
                yield self._add(piece.arguments)
                yield from self._close()
                continue
            kind: Literal["content", "reasoning"] = "reasoning" if piece.kind == "reasoning" else "content"
            if not self._is_open or self.all[-1].kind != kind:
                yield from self._close()
                yield from self._open(Block(len(self.all), kind))
            yield self._add(piece.text)
        if is_last:
            if not self.all:
                yield from self._open(Block(0, "content"))
            yield from self._close()

    def _open(self, block: Block) -> Iterator[Change]:
        self.all.append(block)
        self._is_open = True
        yield "open", block, ""

    def _add(self, text: str) -> Change:
        self.all[-1].text += text
        return "more", self.all[-1], text

    def _close(self) -> Iterator[Change]:
        if self._is_open:
            self._is_open = False
            yield "close", self.all[-1], ""
