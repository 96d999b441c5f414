"""Answers that must follow a grammar: llguidance says which tokens may come next.

A grammar is text (llguidance's own JSON form), so that it can travel with a request. The library is an optional extra:
without it, requests with a grammar are refused.

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
from hippo_mpi.transport.processes import give_way

_MAX_KEPT = 32  # compiled grammars; one of 3,000 properties takes some MB
_COMPILE_TIMEOUT_S = 60.0  # grammar_check.py has shown that it takes seconds, but others may be queued before it
_COMPACT = {"whitespace_flexible": False}
_LENIENT = {"lenient": True}  # warnings instead of an error; grammar_check.py looks at them


def json_grammar(schema: dict[str, Any]) -> str:
    """Return the grammar of JSON texts that obey a schema, without checking that llguidance accepts it.

    Raises:
        UserError: llguidance isn't installed, or the schema is nested too deeply.
    """
    _library()
    return _written("response_format", {"json_schema": _with_options(schema, _COMPACT)})


def _with_options(schema: dict[str, Any], defaults: dict[str, bool]) -> dict[str, Any]:
    """Return a schema with llguidance's options; the schema's own win over `defaults`."""
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
    """Return the grammar of a call of one of `tools`, with arguments that obey the tool's schema.

    Args:
        tokenizer: knows the model's format of calls.
        tools: OpenAI's tool objects.
        answer: grammar of an answer that may be given instead of a call; None: a call is required.

    Raises:
        UserError: the model's format of calls can't be forced, or a schema is nested too deeply.
    """
    form = next((form for form in _CALL_FORMS if _is_understood(tokenizer, form)), None)
    if form is None:
        raise FieldError(
            "tools",
            "tool calls in this model's format can't be constrained: tool_choice can't force one, and tools can't be"
            " combined with response_format",
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
    """True if the model's parser reads a call in this form, and its template or vocabulary has the form's marks."""
    template, vocabulary = str(tokenizer.chat_template), tokenizer.get_vocab()
    marks = [piece for piece in form if isinstance(piece, str) and piece.startswith(_MARKS_BEGIN)]
    if not all(mark in vocabulary or mark in template for mark in marks):
        return False
    written = "".join("f" if piece is _NAME else '{"a": "b"}' if piece is _ARGUMENTS else piece for piece in form)
    try:
        parsed = tokenizer.tool_parser(written, None)
    except Exception:  # mlx-lm's parsers may raise anything
        return False
    (call, *_) = parsed if isinstance(parsed, list) else [parsed]
    return isinstance(call, dict) and (call.get("name"), call.get("arguments")) == ("f", {"a": "b"})


def _literal(tokenizer: TokenizerWrapper, text: str) -> str:
    """Return a text as a grammar literal; a single token by its number, the only way to write special tokens."""
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
    """The position of one answer in its grammar."""

    def __init__(self, matcher: Any, vocab_size: int, eos_token_ids: list[int]) -> None:
        self._matcher, self._eos = matcher, eos_token_ids
        self._vocab_size = vocab_size

    def __call__(self, logits: mx.array, other: int | None = None) -> mx.array:
        """Return logits (1, V) with -inf for every token that may not come next.

        At the grammar's end only end tokens may come.

        Args:
            logits: (1, V).
            other: a token that is allowed besides those of the grammar.

        Raises:
            FieldError: llguidance's matcher has failed.
        """
        allowed = np.zeros(self._vocab_size, bool)
        if self._is_at_end():
            allowed[self._eos] = True
        else:
            bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
            self._is_at_end()  # raises if computing the mask made the matcher fail
            allowed[:] = np.unpackbits(bits, bitorder="little")[: self._vocab_size]
        if other is not None:
            allowed[other] = True
        return mx.where(mx.array(allowed), logits, -mx.inf)

    def accept(self, token: int) -> None:
        """Advance by one token of the answer.

        Raises:
            FieldError: the grammar doesn't allow it, or llguidance's matcher has failed.
        """
        if not self._is_at_end():
            self._matcher.consume_token(token)
            self._is_at_end()

    def _is_at_end(self) -> bool:
        """True if nothing may follow; a failed matcher says so too, but its text is incomplete.

        Raises:
            FieldError: the matcher has failed.
        """
        if self._matcher.is_error():
            why = " ".join(self._matcher.get_error().partition("<state>")[0].split())[:200]
            raise FieldError("response_format", f"the answer can no longer follow its schema: {why}")
        return bool(self._matcher.is_stopped())


@dataclass(eq=False)
class Compiling:
    """A grammar that is being compiled, shared by all answers that use it.

    Once compiled, `matcher` holds the original, of which each answer gets a copy.
    """

    grammar: str
    vocab_size: int
    eos_token_ids: list[int]
    began_s: float = field(default_factory=time.monotonic)
    matcher: Future[Any] = field(default_factory=Future)

    @property
    def is_due(self) -> bool:
        """True once `mask` can be called: compiling has finished, or has timed out."""
        return self.matcher.done() or time.monotonic() - self.began_s > _COMPILE_TIMEOUT_S

    def mask(self) -> GrammarMask:
        """Return a mask for one answer.

        Raises:
            UserError: llguidance doesn't accept the grammar or the tokenizer, or compiling took too long.
        """
        if not self.matcher.done():
            raise FieldError(
                "response_format", f"compiling the schema took longer than {_COMPILE_TIMEOUT_S:.0f} s: simplify it"
            )
        return GrammarMask(self.matcher.result().deep_copy(), self.vocab_size, self.eos_token_ids)


class Grammars:
    """Compiles the grammars of a model's requests in a thread, each text once.

    Steps go on meanwhile, because llguidance releases Python's lock. It can't be interrupted, so grammars are checked
    beforehand (grammar_check.py). The tokenizer's tokens are read once, for the first grammar.
    """

    def __init__(self, tokenizer: TokenizerWrapper, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._tokens: Any = None
        self._kept: OrderedDict[str, Compiling] = OrderedDict()
        self._todo: queue.SimpleQueue[Compiling] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def compile(self, grammar: str) -> Compiling:
        """Begin to compile a grammar, unless that has been done."""
        compiling = self._kept.get(grammar)
        if compiling is None:
            eos_token_ids = sorted(self._tokenizer.eos_token_ids)
            compiling = self._kept[grammar] = Compiling(grammar, self._vocab_size, eos_token_ids)
            self._todo.put(compiling)
            if self._thread is None:
                self._thread = threading.Thread(target=self._compile_all, name="hippo-grammars", daemon=True)
                self._thread.start()
        self._kept.move_to_end(grammar)
        if len(self._kept) > _MAX_KEPT:
            self._kept.popitem(last=False)
        return compiling

    def forget(self, compiling: Compiling) -> None:
        """Cancel a grammar that no request waits for any more, unless compiling has begun."""
        if compiling.matcher.cancel():
            self._kept.pop(compiling.grammar, None)

    def _compile_all(self) -> None:
        give_way()
        while True:
            compiling = self._todo.get()
            if compiling.matcher.set_running_or_notify_cancel():
                try:
                    compiling.matcher.set_result(self._matcher(compiling))
                except BaseException as error:  # raised again by `mask`; a Rust panic becomes an Exception
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
            matcher.compute_bitmask()  # the first one takes longest; copies share it
        if matcher.is_error():
            raise FieldError("response_format", f"response_format: {json.dumps(matcher.get_error())[:300]}")
        return matcher
