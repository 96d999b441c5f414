"""Answers that must follow a grammar: which tokens may come next, told by llguidance.

A grammar is text (llguidance's own JSON form), so that it travels with a request. The library is an extra: without it
a request with a grammar is refused.

Legend: V vocabulary.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from hippo_mpi.errors import FieldError, UserError, install_hint

_COMPACT = {"whitespace_flexible": False}
_LENIENT = {"lenient": True}  # warnings instead of an error; `_checked` looks at them
_NOT_HELD_TO = ('Unimplemented keys: ["uniqueItems"]', "Unknown format: ")
"""Warnings of llguidance that are only logged: a list may then say something twice (every set[...] of Python has such a
schema), and a text's format, which JSON Schema itself takes for a remark if it is unknown, isn't looked at."""


def json_grammar(schema: dict[str, Any]) -> str:
    """The grammar of JSON texts that obey a schema.

    Raises:
        UserError: llguidance isn't installed, or doesn't take the schema.
    """
    make = _library().LLMatcher.grammar_from_json_schema
    return _checked("response_format", lambda: str(make(schema, defaults=_COMPACT, overrides=_LENIENT)))


def _checked(field: str, make: Callable[[], str]) -> str:
    """A grammar that llguidance takes; a FieldError says what is wrong with it."""
    try:
        grammar = make()
        _, mistakes = _library().LLMatcher.validate_grammar_with_warnings(grammar)
    except (ValueError, TypeError, RecursionError) as error:
        mistakes = [str(error)]
    for mistake in mistakes:
        if not mistake.startswith(_NOT_HELD_TO):
            raise FieldError(field, f"{field}: {' '.join(mistake.split())[:300]}")
        _note_not_held_to(mistake[:100])
    return grammar


@lru_cache(maxsize=64)  # once
def _note_not_held_to(warning: str) -> None:
    logging.getLogger(__name__).warning("a schema has what answers can't be held to. %s", warning)


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
        UserError: the model's format of calls can't be forced, or a schema isn't taken.
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
        rules += [f"call_{number}: {' '.join(written)}", f"args_{number}: %json {json.dumps(schema)}"]
    if answer is not None:
        starts.append("@answer")
        others = [{**json.loads(answer)["grammars"][0], "name": "answer"}]
    lark = "\n".join([f"start: {' | '.join(starts)}", *rules])
    return _checked("tools", lambda: json.dumps({"grammars": [{"lark_grammar": lark}, *others]}))


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
        """
        allowed = np.zeros(self._vocab_size, bool)
        if self._matcher.is_stopped():
            allowed[self._eos] = True
        else:
            bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
            allowed[:] = np.unpackbits(bits, bitorder="little")[: self._vocab_size]
        if other is not None:
            allowed[other] = True
        return mx.where(mx.array(allowed), logits, -mx.inf)

    def accept(self, token: int) -> None:
        """The answer goes on with this token."""
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)


class Grammars:
    """Makes the masks of a model's requests; a tokenizer's tokens are read once, when the first is asked for."""

    def __init__(self, tokenizer: TokenizerWrapper, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._tokens: Any = None

    def mask(self, grammar: str) -> GrammarMask:
        """A mask for one answer.

        Raises:
            UserError: llguidance doesn't take the grammar, or the tokenizer.
        """
        llguidance, eos = _library(), sorted(self._tokenizer.eos_token_ids)
        try:
            if self._tokens is None:
                self._tokens = llguidance.hf.from_tokenizer(self._tokenizer._tokenizer, self._vocab_size, eos)
            matcher = llguidance.LLMatcher(self._tokens, grammar)
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"response_format doesn't work with this model's tokenizer: {error}") from None
        if matcher.is_error():
            raise UserError(f"response_format: {json.dumps(matcher.get_error())[:300]}")
        return GrammarMask(matcher, self._vocab_size, eos)
