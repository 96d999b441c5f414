"""Answers that must follow a grammar: which tokens may come next, told by llguidance.

A grammar is text (llguidance's own JSON form), so that it travels with a request. The library is an extra: without it
a request with a grammar is refused.

Legend: V vocabulary.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from hippo_mpi.errors import FieldError, UserError, install_hint

_MOST_KEPT = 32  # compiled grammars; one of 3,000 properties takes some MB
_PATIENCE_S = 60.0  # for a grammar that was checked to take seconds, with others before it
_COMPACT = {"whitespace_flexible": False}
_LENIENT = {"lenient": True}  # warnings instead of an error; grammar_check.py looks at them


def json_grammar(schema: dict[str, Any]) -> str:
    """The grammar of JSON texts that obey a schema; whether llguidance takes it, nobody has asked yet.

    Raises:
        UserError: llguidance isn't installed, or the schema is nested too deeply.
    """
    _library()
    return _written("response_format", {"json_schema": _with_options(schema, _COMPACT)})


def _with_options(schema: dict[str, Any], defaults: dict[str, bool]) -> dict[str, Any]:
    """A schema with llguidance's options; its own win over `defaults`."""
    own = schema.get("x-guidance")
    return {**schema, "x-guidance": {**defaults, **(own if isinstance(own, dict) else {}), **_LENIENT}}


def _written(field: str, *grammars: dict[str, Any]) -> str:
    return _json_of(field, {"grammars": grammars})


def _json_of(field: str, value: Any) -> str:
    try:
        return json.dumps(value)
    except RecursionError:
        raise FieldError(field, f"{field}: a schema is nested too deeply") from None


_NAME, _ARGUMENTS = object(), object()
_CALL_FORMS: tuple[tuple[Any, ...], ...] = (  # between the tokenizer's marks of a call
    ("<|tool_call_begin|>", "functions.", _NAME, ":0", "<|tool_call_argument_begin|>", _ARGUMENTS, "<|tool_call_end|>"),
    (_NAME, "[ARGS]", _ARGUMENTS),
    ('\n{"name": "', _NAME, '", "arguments": ', _ARGUMENTS, "}\n"),
    ('[{"name": "', _NAME, '", "arguments": ', _ARGUMENTS, "}]"),
)
_MARKS_BEGIN = ("<|", "[ARGS]")


def call_grammar(tokenizer: TokenizerWrapper, tools: Sequence[dict[str, Any]], answer: str | None = None) -> str:
    """The grammar of one call of any of these tools (OpenAI's objects), with arguments that obey its schema.

    Args:
        answer: grammar of what may be said instead of calling; None: there must be a call.

    Raises:
        UserError: the model's format of calls can't be forced, or a schema is nested too deeply.
    """
    form = next((form for form in _CALL_FORMS if _is_understood(tokenizer, form)), None)
    if form is None:
        raise FieldError(
            "tools",
            "calls in this model's format can't be held to a grammar: no tool_choice can force one, and tools can't stand"
            " beside a response_format",
        )
    starts = [f"call_{number}" for number in range(len(tools))]
    rules, others = [], []
    for number, tool in enumerate(tools):
        name = json.dumps(tool["function"]["name"], ensure_ascii=False)[1:-1]
        schema = {**(tool["function"].get("parameters") or {"type": "object"}), "x-guidance": _COMPACT | _LENIENT}
        pieces = [tokenizer.tool_call_start, *form, tokenizer.tool_call_end]
        written = [
            f"args_{number}" if piece is _ARGUMENTS else _literal(tokenizer, name if piece is _NAME else piece)
            for piece in pieces
            if piece
        ]
        rules += [f"call_{number}: {' '.join(written)}", f"args_{number}: %json {_json_of('tools', schema)}"]
    if answer is not None:
        starts.append("@answer")
        others = [{**json.loads(answer)["grammars"][0], "name": "answer"}]
    lark = "\n".join([f"start: {' | '.join(starts)}", *rules])
    return _written("tools", {"lark_grammar": lark}, *others)


def _is_understood(tokenizer: TokenizerWrapper, form: tuple[Any, ...]) -> bool:
    """Whether the model's own parser reads a call in this form, and its template or vocabulary has the form's marks."""
    template, vocabulary = str(tokenizer.chat_template), tokenizer.get_vocab()
    marks = [piece for piece in form if isinstance(piece, str) and piece.startswith(_MARKS_BEGIN)]
    if not all(mark in vocabulary or mark in template for mark in marks):
        return False
    written = "".join("f" if piece is _NAME else '{"a": "b"}' if piece is _ARGUMENTS else piece for piece in form)
    try:
        parsed = tokenizer.tool_parser(written, None)
    except Exception:  # mlx-lm's parsers raise whatever they meet
        return False
    (call, *_) = parsed if isinstance(parsed, list) else [parsed]
    return isinstance(call, dict) and (call.get("name"), call.get("arguments")) == ("f", {"a": "b"})


def _literal(tokenizer: TokenizerWrapper, text: str) -> str:
    """A text in a grammar: a mark that is one token as that token, for special ones have no other way to be written."""
    tokens = tokenizer.encode(text, add_special_tokens=False)
    return f"<[{tokens[0]}]>" if len(tokens) == 1 else json.dumps(text, ensure_ascii=False)


def _library() -> Any:
    try:
        import llguidance
        import llguidance.hf
    except ImportError:
        raise UserError(f"a grammar needs llguidance: {install_hint('serve')}") from None
    return llguidance


class GrammarMask:
    """Follows one answer through a grammar."""

    def __init__(self, matcher: Any, vocab_size: int, eos_token_ids: list[int]) -> None:
        self._matcher, self._eos = matcher, eos_token_ids
        self._vocab_size = vocab_size

    def __call__(self, logits: mx.array, other: int | None = None) -> mx.array:
        """Logits (1, V) with -inf for every token that may not come next; at the grammar's end, for all but end tokens.
        `other` may come beside what the grammar allows.

        Raises:
            FieldError: llguidance has lost its way.
        """
        allowed = np.zeros(self._vocab_size, bool)
        if self._is_at_end():
            allowed[self._eos] = True
        else:
            bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
            self._is_at_end()  # computing may be what leads astray
            allowed[:] = np.unpackbits(bits, bitorder="little")[: self._vocab_size]
        if other is not None:
            allowed[other] = True
        return mx.where(mx.array(allowed), logits, -mx.inf)

    def accept(self, token: int) -> None:
        """The answer goes on with this token.

        Raises:
            FieldError: it can't, or llguidance has lost its way.
        """
        if not self._is_at_end():
            self._matcher.consume_token(token)
            self._is_at_end()

    def _is_at_end(self) -> bool:
        """Whether nothing may follow. A matcher that has met an error says so, too: what it let through isn't whole."""
        if self._matcher.is_error():
            why = " ".join(self._matcher.get_error().partition("<state>")[0].split())[:200]
            raise FieldError("response_format", f"the answer can't be held to its schema any more: {why}")
        return bool(self._matcher.is_stopped())


@dataclass(eq=False)
class Compiling:
    """A grammar that is being compiled, for as many answers as want it; then `matcher`, to be copied, has it."""

    grammar: str
    vocab_size: int
    eos_token_ids: list[int]
    began_s: float = field(default_factory=time.monotonic)
    matcher: Future[Any] = field(default_factory=Future)

    @property
    def is_due(self) -> bool:
        """Whether `mask` says something: it is done, or should be."""
        return self.matcher.done() or time.monotonic() - self.began_s > _PATIENCE_S

    def mask(self) -> GrammarMask:
        """A mask for one answer.

        Raises:
            UserError: llguidance doesn't take the grammar, or the tokenizer, or takes too long.
        """
        if not self.matcher.done():
            raise FieldError(
                "response_format", f"the schema was not compiled within {_PATIENCE_S:.0f} s: make it simpler"
            )
        return GrammarMask(self.matcher.result().deep_copy(), self.vocab_size, self.eos_token_ids)


class Grammars:
    """Compiles the grammars of a model's requests beside its steps, each text once; a tokenizer's tokens are read once,
    when the first is asked for.

    The steps go on: llguidance lets go of Python's lock. Nothing ends it, so texts are checked before (grammar_check.py).
    """

    def __init__(self, tokenizer: TokenizerWrapper, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._tokens: Any = None
        self._kept: OrderedDict[str, Compiling] = OrderedDict()
        self._todo: queue.SimpleQueue[Compiling] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def compile(self, grammar: str) -> Compiling:
        """Begin to compile a grammar, if that isn't done yet."""
        found = self._kept.get(grammar)
        if found is None:
            found = self._kept[grammar] = Compiling(grammar, self._vocab_size, sorted(self._tokenizer.eos_token_ids))
            self._todo.put(found)
            if self._thread is None:
                self._thread = threading.Thread(target=self._compile_all, name="hippo-grammars", daemon=True)
                self._thread.start()
        self._kept.move_to_end(grammar)
        if len(self._kept) > _MOST_KEPT:
            self._kept.popitem(last=False)
        return found

    def forget(self, compiling: Compiling) -> None:
        """Nobody waits for a grammar any more: if its turn hasn't come, it isn't compiled."""
        if compiling.matcher.cancel():
            self._kept.pop(compiling.grammar, None)

    def _compile_all(self) -> None:
        while True:
            compiling = self._todo.get()
            if compiling.matcher.set_running_or_notify_cancel():
                try:
                    compiling.matcher.set_result(self._matcher(compiling))
                except BaseException as error:  # it is raised where the mask is wanted, a panic of Rust's as our own
                    known = error if isinstance(error, Exception) else RuntimeError(repr(error))
                    compiling.matcher.set_exception(known)

    def _matcher(self, compiling: Compiling) -> Any:
        llguidance = _library()
        try:
            if self._tokens is None:
                eos = compiling.eos_token_ids
                self._tokens = llguidance.hf.from_tokenizer(self._tokenizer._tokenizer, self._vocab_size, eos)
            matcher = llguidance.LLMatcher(self._tokens, compiling.grammar, log_level=0)
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"response_format doesn't work with this model's tokenizer: {error}") from None
        if not matcher.is_error():
            matcher.compute_bitmask()  # the first is what takes longest, and copies have it
        if matcher.is_error():
            raise FieldError("response_format", f"response_format: {json.dumps(matcher.get_error())[:300]}")
        return matcher
