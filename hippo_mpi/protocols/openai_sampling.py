"""The sampling fields of OpenAI's requests: which values they may have, and which parameters they set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from hippo_mpi.engine.grammar import json_grammar
from hippo_mpi.engine.request import SamplingParams
from hippo_mpi.errors import FieldError

_MAX_LOGPROBS = 20
_MAX_TOKENS = 1 << 30
IGNORING_EOS = _MAX_TOKENS + 1
"""The min_tokens that ignore_eos sets: more tokens than an answer can have."""
_MAX_BIAS = 10_000  # OpenAI's limit is 100; logits are far smaller than this
_MAX_STOPS, _MAX_STOP_CHARS = 16, 256  # limited, since every answer is searched for each of them after every token


def read_sampling(fields: dict[str, Any], defaults: SamplingParams, is_chat: bool) -> SamplingParams:
    """Read sampling parameters from a body's fields, none of them null.

    Raises:
        FieldError: a field is unknown or has an invalid value.
    """
    given: dict[str, Any] = {}
    for name, value in fields.items():
        if name in _FIELDS:
            target, check = _FIELDS[name]
            given[target] = check.read(name, value)
        elif name not in _READ_TOGETHER:
            raise FieldError(name, f"unknown field {name!r}")
    if "max_completion_tokens" in fields:  # the newer name takes precedence, in any order
        given["max_tokens"] = fields["max_completion_tokens"]
    given |= {"logprobs": _count_of_logprobs(fields, is_chat)}
    if "ignore_eos" in fields and boolean("ignore_eos", fields["ignore_eos"]):
        given["min_tokens"] = IGNORING_EOS
    if given.get("min_tokens") and given.get("stop_words"):
        raise FieldError("min_tokens", "min_tokens and ignore_eos can't be combined with stop")
    return replace(defaults, **given)


_READ_TOGETHER = {"logprobs", "top_logprobs", "ignore_eos"}
"""Fields whose meaning depends on other fields."""


def _count_of_logprobs(fields: dict[str, Any], is_chat: bool) -> int | None:
    """Return for how many of the likeliest tokens log-probabilities are returned; None: not even for the chosen one."""
    wanted, top = fields.get("logprobs", False), fields.get("top_logprobs", 0)
    if not is_chat:
        if "top_logprobs" in fields:
            raise FieldError("top_logprobs", "unknown field 'top_logprobs'")
        return None if wanted is False else _LOGPROBS.read("logprobs", wanted)
    top = _LOGPROBS.read("top_logprobs", top)
    if not boolean("logprobs", wanted):
        if top:
            raise FieldError("top_logprobs", "top_logprobs needs logprobs: true")
        return None
    return int(top)


@dataclass(frozen=True)
class _Check:
    """The valid values of a field: as a reader that raises a FieldError for others, and as a JSON schema."""

    read: Callable[[str, Any], Any]
    schema: dict[str, Any]


def boolean(name: str, value: Any) -> bool:
    """Return the value of a field that must be true or false.

    Raises:
        FieldError: it is neither.
    """
    if not isinstance(value, bool):
        raise FieldError(name, f"{name} must be true or false, not {value!r}")
    return value


def _whole(low: int, high: int, neutral: dict[int, Any] | None = None) -> _Check:
    """Return a check for whole numbers; `neutral` maps further values to those that stand for an absent field."""

    def check(name: str, value: Any) -> Any:
        if type(value) is int and value in (neutral or {}):
            return (neutral or {})[value]
        if type(value) is not int or not low <= value <= high:
            raise FieldError(name, f"{name} must be a whole number from {low} to {high}, not {value!r}")
        return value

    return _Check(check, {"type": "integer", "minimum": min([low, *(neutral or {})]), "maximum": high})


def _number(low: float, high: float, least: float = 0.0) -> _Check:
    """Return a check for numbers; those below `least` count as 0, since float32 can't hold their reciprocal."""

    def check(name: str, value: Any) -> float:
        if type(value) not in (int, float) or not low <= value <= high:
            raise FieldError(name, f"{name} must be a number from {low:g} to {high:g}, not {value!r}")
        return float(value) if value >= least else 0.0

    return _Check(check, {"type": "number", "minimum": low, "maximum": high})


def _stop(name: str, value: Any) -> tuple[str, ...]:
    words = [value] if isinstance(value, str) else value
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise FieldError(name, f"{name} must be a string or a list of strings")
    if len(words) > _MAX_STOPS or any(len(word) > _MAX_STOP_CHARS for word in words):
        raise FieldError(name, f"{name} can have up to {_MAX_STOPS} strings of up to {_MAX_STOP_CHARS} characters")
    return tuple(word for word in words if word)


def _bias(name: str, value: Any) -> tuple[tuple[int, float], ...]:
    try:
        pairs = tuple((int(token), float(amount)) for token, amount in value.items())
    except (AttributeError, TypeError, ValueError, OverflowError):
        pairs = ()
    if not all(-_MAX_BIAS <= amount <= _MAX_BIAS for _, amount in pairs) or (value and not pairs):
        raise FieldError(name, f"{name} must be an object of tokens and numbers from -{_MAX_BIAS} to {_MAX_BIAS}")
    return pairs


def _response_format(name: str, value: Any) -> str | None:
    """Return the grammar of a response format; None: any text."""
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return json_grammar({"type": "object"})
    given = value.get("json_schema") if kind == "json_schema" else None
    schema = given.get("schema") if isinstance(given, dict) else None
    if not isinstance(schema, dict):
        raise FieldError(name, f"{name} must have the type text, json_object, or json_schema with a schema")
    return json_grammar(schema)


_TEXT = {"type": "string", "maxLength": _MAX_STOP_CHARS}
_LOGPROBS = _whole(0, _MAX_LOGPROBS)
_FIELDS: dict[str, tuple[str, _Check]] = {
    "max_tokens": ("max_tokens", _whole(1, _MAX_TOKENS)),
    "max_completion_tokens": ("max_tokens", _whole(1, _MAX_TOKENS)),
    "min_tokens": ("min_tokens", _whole(0, _MAX_TOKENS)),
    "temperature": ("temp", _number(0, 100, least=1e-6)),
    "top_p": ("top_p", _number(0, 1)),
    "min_p": ("min_p", _number(0, 1)),
    "top_k": ("top_k", _whole(0, 1 << 30, {-1: 0})),
    "seed": ("seed", _whole(0, 2**63 - 1, {-1: None})),
    "stop": (
        "stop_words",
        _Check(_stop, {"anyOf": [_TEXT, {"type": "array", "items": _TEXT, "maxItems": _MAX_STOPS}]}),
    ),
    "presence_penalty": ("presence_penalty", _number(-2, 2)),
    "frequency_penalty": ("frequency_penalty", _number(-2, 2)),
    "repetition_penalty": ("repetition_penalty", _number(0.01, 100)),
    "logit_bias": (
        "logit_bias",
        _Check(
            _bias,
            {
                "type": "object",
                "propertyNames": {"pattern": "^[0-9]{1,6}$"},
                "additionalProperties": {"type": "number", "minimum": -_MAX_BIAS, "maximum": _MAX_BIAS},
            },
        ),
    ),
    "response_format": ("grammar", _Check(_response_format, {"type": "object", "required": ["type"]})),
    "max_repeats": ("max_repeats", _whole(0, 1 << 30)),
}


def field_schemas(is_chat: bool) -> dict[str, Any]:
    """Return the JSON schemas of a body's sampling fields, by name."""
    schemas = {name: check.schema for name, (_, check) in _FIELDS.items()} | {"ignore_eos": {"type": "boolean"}}
    if is_chat:
        return schemas | {"logprobs": {"type": "boolean"}, "top_logprobs": _LOGPROBS.schema}
    return schemas | {"logprobs": _LOGPROBS.schema}
