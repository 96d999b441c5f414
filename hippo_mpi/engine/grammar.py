"""Answers that must follow a grammar: which tokens may come next, told by llguidance.

A grammar is text (llguidance's own JSON form), so that it travels with a request. The library is an extra: without it
a request with a grammar is refused.

Legend: V vocabulary.
"""

from __future__ import annotations

import json
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from hippo_mpi.errors import UserError


def json_grammar(schema: dict[str, Any]) -> str:
    """The grammar of JSON texts that obey a schema.

    Raises:
        UserError: llguidance isn't installed, or doesn't take the schema.
    """
    llguidance = _library()
    try:
        grammar = str(llguidance.LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_flexible": False}))
        mistake = llguidance.LLMatcher.validate_grammar(grammar)
    except (ValueError, TypeError, RecursionError) as error:
        mistake = str(error)
    if mistake:
        raise UserError(f"response_format: {' '.join(mistake.split())[:300]}")
    return grammar


def _library() -> Any:
    try:
        import llguidance
        import llguidance.hf
    except ImportError:
        raise UserError('response_format needs llguidance: pip install "hippo-mpi[serve]"') from None
    return llguidance


class GrammarMask:
    """Follows one answer through a grammar."""

    def __init__(self, matcher: Any, vocab_size: int, eos_token_ids: list[int]) -> None:
        self._matcher, self._eos = matcher, eos_token_ids
        self._vocab_size = vocab_size

    def __call__(self, logits: mx.array) -> mx.array:
        """Logits (1, V) with -inf for every token that may not come next; at the grammar's end, for all but end tokens."""
        allowed = np.zeros(self._vocab_size, bool)
        if self._matcher.is_stopped():
            allowed[self._eos] = True
        else:
            bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
            allowed[:] = np.unpackbits(bits, bitorder="little")[: self._vocab_size]
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
