"""What an answer's text is made of: what is said, what is thought, and tools that are called.

The marks between them are the tokenizer's, found by mlx-lm, as are the parsers of tool calls. Knows no API's words.
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
    """A piece of one kind; of a tool call, the whole."""

    kind: Kind
    text: str


@dataclass(frozen=True)
class Call:
    """A tool called by its name, with arguments as JSON."""

    name: str
    arguments: str
    id: str


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
            if Thinking(tokenizer, prompt).is_open:
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


def _calls(tokenizer: TokenizerWrapper, text: str, tools: list[dict[str, Any]]) -> list[tuple[str, str]] | None:
    """What a model wrote as a call: names, and arguments as JSON; None if its parser doesn't understand it."""
    try:
        parsed = tokenizer.tool_parser(text, tools)
        found = []
        for call in parsed if isinstance(parsed, list) else [parsed]:
            arguments = call["arguments"]
            text_of = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
            json.loads(text_of)
            found.append((str(call["name"]), text_of))
    except Exception:  # mlx-lm's parsers raise whatever they meet: a model may write anything
        return None
    return found


class AnswerReader:
    """Reads one answer as it comes.

    Args:
        prompt, tools: what it answers, and what it may call.
        most_calls: later ones are left out; None: any number.
        name: of the answer; calls are named after it, so that an answer that is read again has the same; empty: any.
    """

    def __init__(
        self,
        tokenizer: TokenizerWrapper,
        prompt: list[int],
        tools: list[dict[str, Any]],
        most_calls: int | None = None,
        name: str = "",
    ) -> None:
        self._tokenizer, self._tools, self._most_calls = tokenizer, tools, most_calls
        self._name = name or secrets.token_hex(12)
        self._splitter = PartSplitter(tokenizer, prompt, bool(tools))
        self.num_calls = 0

    def read(self, text: str, is_last: bool) -> list[Part | Call]:
        """What this text adds. A call that nobody understands is at least shown."""
        found: list[Part | Call] = []
        for part in self._splitter.feed(text, is_last):
            calls = _calls(self._tokenizer, part.text, self._tools) if part.kind == "tool" else None
            if calls is None:
                found.append(Part("reasoning" if part.kind == "reasoning" else "content", part.text))
            else:
                calls = calls[: None if self._most_calls is None else self._most_calls - self.num_calls]
                for name, arguments in calls:
                    found.append(Call(name, arguments, self._call_id()))
                    self.num_calls += 1
        return found

    def _call_id(self) -> str:
        return f"call_{hashlib.sha256(f'{self._name}/{self.num_calls}'.encode()).hexdigest()[:24]}"


@dataclass
class Block:
    """Neighbouring pieces of one kind, or one call."""

    index: int
    kind: Literal["content", "reasoning", "call"]
    text: str = ""  # of a call: its arguments
    call: Call | None = None


Change = tuple[Literal["open", "more", "close"], Block, str]
"""What happens to a block; with "more", the text that it gets."""


class Blocks:
    """An answer as blocks, as Anthropic's messages and OpenAI's responses have it."""

    def __init__(self, reader: AnswerReader) -> None:
        self.all: list[Block] = []
        self._reader = reader
        self._is_open = False

    @property
    def num_calls(self) -> int:
        return self._reader.num_calls

    def take(self, text: str, is_last: bool) -> list[Change]:
        """What this text does to the blocks; one is there at the end."""
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
