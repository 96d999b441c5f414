"""OpenAI's words for requests: checked bodies. Every field is honoured, refused, or has no effect on an answer; none
is silently dropped. The words for answers are in openai_answers.py."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from hippo_mpi.engine.grammar import call_grammar, json_grammar
from hippo_mpi.engine.request import SamplingParams
from hippo_mpi.engine.text import ChatFormat, encode
from hippo_mpi.errors import UserError
from hippo_mpi.serving.protocols.answer_parts import AnswerReader

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
_WITHOUT_EFFECT = {"model", "user", "metadata", "store", "service_tier", "stream_options", "safety_identifier"}
ROLES = ("system", "developer", "user", "assistant", "tool")
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh")
_OUR_TEMPLATE_ARGS = {
    "tools", "messages", "conversation", "documents", "tokenize", "chat_template", "add_generation_prompt",
    "continue_final_message", "return_dict", "return_tensors", "padding", "truncation", "max_length",
}  # fmt: skip
_MAX_LOGPROBS = 20
_MAX_BIAS = 10_000  # OpenAI's is 100; any logit is far below
_MAX_STOPS, _MAX_STOP_CHARS = 16, 256  # each is looked for in every answer after every token


@dataclass(frozen=True)
class Asked:
    """A checked body: messages of a chat, or a prompt (text or tokens) to be continued."""

    url: str
    sampling: SamplingParams
    messages: list[dict[str, Any]] = field(default_factory=list)
    prompt: str | list[int] = ""
    tools: list[dict[str, Any]] = field(default_factory=list)
    must_call: bool = False  # one of the tools
    most_calls: int | None = None
    template_args: dict[str, Any] = field(default_factory=dict)

    def within(self, modes: Sequence[str]) -> Asked:
        """The same of a model that is served for some of config.MODES only; without thinking, it is told not to think.

        Raises:
            UserError: what is asked is none of them.
        """
        thinks = bool(self.template_args.get("enable_thinking")) or "reasoning_effort" in self.template_args
        needed = ["chat" if self.url == CHAT else "completion", *["tools"] * bool(self.tools), *["thinking"] * thinks]
        if missing := [mode for mode in needed if mode not in modes]:
            raise UserError(f"this model is served for {', '.join(modes)}, and not for {missing[0]}")
        if "thinking" in modes or self.url != CHAT:
            return self
        return replace(self, template_args={**self.template_args, "enable_thinking": False})

    def prepare(
        self, tokenizer: TokenizerWrapper, chat_format: ChatFormat, system: list[dict[str, str]] | None = None
    ) -> tuple[list[int], SamplingParams]:
        """The prompt's tokens, and how they are to be answered; `system` as for `encode`.

        Raises:
            UserError: the model can't be asked this.
        """
        prompt, sampling = self.encode(tokenizer, chat_format, system), self.sampling
        if self.must_call:
            sampling = replace(sampling, grammar=call_grammar(tokenizer, self.tools))
        elif self.tools and sampling.grammar is not None:  # a format is for what is said, and calls may be made instead
            sampling = replace(sampling, grammar=call_grammar(tokenizer, self.tools, sampling.grammar))
        return prompt, sampling

    def reader(self, tokenizer: TokenizerWrapper, prompt: list[int]) -> AnswerReader:
        """For an answer to this."""
        return AnswerReader(tokenizer, prompt, self.tools, self.most_calls)

    def encode(
        self, tokenizer: TokenizerWrapper, chat_format: ChatFormat, system: list[dict[str, str]] | None = None
    ) -> list[int]:
        """The prompt's tokens; `system` goes in front of messages that have no system message.

        Raises:
            UserError: there are none, or the chat template doesn't take the messages.
        """
        if self.url == CHAT:
            has_system = any(message.get("role") in ("system", "developer") for message in self.messages)
            messages = [*([] if has_system else system or []), *self.messages]
            return chat_format.encode(tokenizer, messages, self.tools, self.template_args)
        tokens = self.prompt if isinstance(self.prompt, list) else encode(tokenizer, self.prompt)
        if not tokens or self.prompt == "":
            raise UserError("the prompt is empty")
        return tokens


def read_body(url: str, body: Any, defaults: SamplingParams) -> Asked:
    """Check a request body.

    Raises:
        UserError: what is wrong with it, with the name of the field.
    """
    if url not in (CHAT, COMPLETION):
        raise UserError(f"url must be {CHAT} or {COMPLETION}, not {url!r}")
    if not isinstance(body, dict):
        raise UserError("body must be a JSON object")
    rest = {name: value for name, value in body.items() if name not in _WITHOUT_EFFECT and value is not None}
    if url == CHAT:
        messages = _messages(rest.pop("messages", None))
        tools, must_call = _chosen(_tools(rest.pop("tools", [])), rest.pop("tool_choice", "auto"))
        many = _boolean("parallel_tool_calls", rest.pop("parallel_tool_calls", True))
        template_args = _template_args(rest)
        asked = Asked(url, defaults, messages, "", tools, must_call, None if many else 1, template_args)
    else:
        asked = Asked(url, defaults, prompt=_prompt(rest.pop("prompt", None)))
    asked = replace(asked, sampling=_sampling(rest, defaults, url == CHAT))
    if asked.must_call and asked.sampling.grammar is not None:
        raise UserError("a tool_choice that wants a call contradicts response_format")
    return asked


def _chosen(tools: list[dict[str, Any]], choice: Any) -> tuple[list[dict[str, Any]], bool]:
    """The tools that may be called, and whether one must be."""
    if choice == "none":
        return [], False
    if choice == "auto":
        return tools, False
    if choice != "required":
        called = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
        name = called.get("name") if isinstance(called, dict) else None
        if name is None:
            raise UserError(f"tool_choice must be 'auto', 'none', 'required' or a function's name, not {choice!r}")
        tools = [tool for tool in tools if tool["function"]["name"] == name]
    if not tools:
        raise UserError("tool_choice asks for a tool that isn't among the tools")
    return tools, True


def _template_args(rest: dict[str, Any]) -> dict[str, Any]:
    """Arguments for the chat template; taken out of the fields."""
    found = rest.pop("chat_template_kwargs", {})
    if not isinstance(found, dict) or set(found) & _OUR_TEMPLATE_ARGS:
        raise UserError("chat_template_kwargs must be an object of arguments that the chat template knows")
    effort = rest.pop("reasoning_effort", None)
    if effort is None:
        return found
    if effort not in EFFORTS:
        raise UserError(f"reasoning_effort must be one of {', '.join(EFFORTS)}, not {effort!r}")
    return {**found, **({"enable_thinking": False} if effort == "none" else {"reasoning_effort": effort})}


def _messages(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        raise UserError("messages must be a list of objects with role and content")
    return [_message(message) for message in value]


def _message(message: dict[str, Any]) -> dict[str, Any]:
    """A message as chat templates want it: text, and arguments of calls as objects."""
    if message.get("role") not in ROLES:
        raise UserError(f"messages: role must be one of {', '.join(ROLES)}, not {message.get('role')!r}")
    calls = message.get("tool_calls")
    found = {**message, "content": _content("" if calls and message.get("content") is None else message.get("content"))}
    if calls is not None:
        try:
            found["tool_calls"] = [{**call, "function": _called(call["function"])} for call in calls]
        except (TypeError, KeyError, ValueError):
            raise UserError("messages: tool_calls must be a list of OpenAI's calls with JSON arguments") from None
    return found


def _called(function: dict[str, Any]) -> dict[str, Any]:
    arguments = function.get("arguments") or "{}"
    return {**function, "arguments": json.loads(arguments) if isinstance(arguments, str) else arguments}


def _tools(value: Any) -> list[dict[str, Any]]:
    def is_tool(tool: Any) -> bool:
        function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            return False
        return function.get("parameters") is None or isinstance(function["parameters"], dict)

    if not isinstance(value, list) or not all(is_tool(tool) for tool in value):
        raise UserError(
            "tools must be a list of objects with the type function, and a function with a name and, as an object,"
            " parameters"
        )
    return value


def _content(value: Any) -> str:
    """The text of a message: a string, or OpenAI's list of parts."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in value):
        return "".join(part["text"] for part in value)
    raise UserError("messages: content must be a string or a list of text parts")


def _prompt(value: Any) -> str | list[int]:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(type(token) is int and token >= 0 for token in value):
        return value
    raise UserError("prompt must be a string or a list of tokens")


def _sampling(fields: dict[str, Any], defaults: SamplingParams, is_chat: bool) -> SamplingParams:
    found: dict[str, Any] = {}
    for name, value in fields.items():
        if name == "logprobs" and is_chat:
            found["logprobs"] = 0 if _boolean(name, value) else None
        elif name == "top_logprobs" and is_chat:
            continue  # below: it needs logprobs
        elif name in _FIELDS:
            target, check = _FIELDS[name]
            found[target] = check.read(name, value)
        elif name in _ONLY:
            if value != _ONLY[name]:
                raise UserError(f"{name} must be {_ONLY[name]!r} here, not {value!r}")
        else:
            raise UserError(f"unknown field {name!r}")
    if is_chat and "top_logprobs" in fields:
        if found.get("logprobs") is None:
            raise UserError("top_logprobs needs logprobs: true")
        found["logprobs"] = _COUNT_OF_LOGPROBS.read("top_logprobs", fields["top_logprobs"])
    return replace(defaults, **found)


@dataclass(frozen=True)
class _Check:
    """What a field may hold: a reader that raises, and the same as a JSON schema."""

    read: Callable[[str, Any], Any]
    schema: dict[str, Any]


def _boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise UserError(f"{name} must be true or false, not {value!r}")
    return value


def _whole(low: int, high: int) -> _Check:
    def check(name: str, value: Any) -> int:
        if type(value) is not int or not low <= value <= high:
            raise UserError(f"{name} must be a whole number from {low} to {high}, not {value!r}")
        return value

    return _Check(check, {"type": "integer", "minimum": low, "maximum": high})


def _number(low: float, high: float) -> _Check:
    def check(name: str, value: Any) -> float:
        if type(value) not in (int, float) or not low <= value <= high:
            raise UserError(f"{name} must be a number from {low:g} to {high:g}, not {value!r}")
        return float(value)

    return _Check(check, {"type": "number", "minimum": low, "maximum": high})


def _stop(name: str, value: Any) -> tuple[str, ...]:
    words = [value] if isinstance(value, str) else value
    if not isinstance(words, list) or not all(isinstance(word, str) and word for word in words):
        raise UserError(f"{name} must be a text or a list of texts")
    if len(words) > _MAX_STOPS or any(len(word) > _MAX_STOP_CHARS for word in words):
        raise UserError(f"{name} takes up to {_MAX_STOPS} texts of up to {_MAX_STOP_CHARS} characters")
    return tuple(words)


def _bias(name: str, value: Any) -> tuple[tuple[int, float], ...]:
    try:
        found = tuple((int(token), float(amount)) for token, amount in value.items())
    except (AttributeError, TypeError, ValueError, OverflowError):
        found = ()
    if not all(-_MAX_BIAS <= amount <= _MAX_BIAS for _, amount in found) or (value and not found):
        raise UserError(f"{name} must be an object of tokens and numbers from -{_MAX_BIAS} to {_MAX_BIAS}")
    return found


def _response_format(name: str, value: Any) -> str | None:
    """The grammar that a format asks for."""
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return json_grammar({"type": "object"})
    given = value.get("json_schema") if kind == "json_schema" else None
    schema = given.get("schema") if isinstance(given, dict) else None
    if not isinstance(schema, dict):
        raise UserError(f"{name} must have the type text, json_object, or json_schema with a schema")
    return json_grammar(schema)


_TEXT = {"type": "string", "minLength": 1, "maxLength": _MAX_STOP_CHARS}
_COUNT_OF_LOGPROBS = _whole(0, _MAX_LOGPROBS)
_FIELDS: dict[str, tuple[str, _Check]] = {
    "max_tokens": ("max_tokens", _whole(1, 1 << 30)),
    "max_completion_tokens": ("max_tokens", _whole(1, 1 << 30)),
    "temperature": ("temp", _number(0, 100)),
    "top_p": ("top_p", _number(0, 1)),
    "min_p": ("min_p", _number(0, 1)),
    "top_k": ("top_k", _whole(0, 1 << 30)),
    "seed": ("seed", _whole(0, 2**63 - 1)),
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
    "logprobs": ("logprobs", _COUNT_OF_LOGPROBS),
    "response_format": ("grammar", _Check(_response_format, {"type": "object", "required": ["type"]})),
    "max_repeats": ("max_repeats", _whole(0, 1 << 30)),
}
_ONLY: dict[str, Any] = {"n": 1, "best_of": 1, "stream": False, "echo": False}


def field_schemas(is_chat: bool) -> dict[str, Any]:
    """JSON schemas of the optional fields of a body, by name."""
    found = {name: check.schema for name, (_, check) in _FIELDS.items()}
    if is_chat:
        found |= {"logprobs": {"type": "boolean"}, "top_logprobs": _COUNT_OF_LOGPROBS.schema}
    return found
