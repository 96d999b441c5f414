"""Requests in OpenAI's format: bodies, checked. Answers are in openai_answers.py.

Every field is honoured, refused by name, or in a table of ignored_fields.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from hippo_mpi.engine.grammar import call_grammar
from hippo_mpi.engine.request import SamplingParams
from hippo_mpi.engine.text import ChatFormat, encode
from hippo_mpi.errors import FieldError, UserError
from hippo_mpi.protocols.answer_parts import AnswerReader
from hippo_mpi.protocols.ignored_fields import CHAT_IGNORED, COMPLETION_IGNORED, without_ignored
from hippo_mpi.protocols.openai_messages import read_messages, read_tools
from hippo_mpi.protocols.openai_sampling import boolean, read_sampling

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
_ALLOWED_WITH_ECHO = {"max_tokens", "logprobs", "temperature", "top_p", "top_k", "min_p", "seed", "add_special_tokens"}
_OUR_TEMPLATE_ARGS = {
    "tools", "messages", "conversation", "documents", "tokenize", "chat_template", "add_generation_prompt",
    "continue_final_message", "return_dict", "return_tensors", "padding", "truncation", "max_length",
}  # fmt: skip


@dataclass(frozen=True)
class GenerationRequest:
    """A request for text, read from a checked body: a chat's messages, or a prompt (text or tokens) to continue."""

    url: str
    sampling: SamplingParams
    messages: list[dict[str, Any]] = field(default_factory=list)
    prompt: str | list[int] = ""
    tools: list[dict[str, Any]] = field(default_factory=list)
    must_call: bool = False  # the answer has to call one of the tools
    max_calls: int | None = None  # None: no limit
    template_args: dict[str, Any] = field(default_factory=dict)
    continues: bool = False  # the answer continues the last message, or a text without a chat
    add_special_tokens: bool = True  # to a prompt that is text
    echo: bool = False  # the answer begins with the prompt, with its tokens' log-probabilities if asked
    format_field: str = "response_format"  # the body's name for the schema that constrains the answer

    def grammars(self, sampling: SamplingParams) -> list[tuple[str, str]]:
        """Return the fields of the body that constrain the answer, each with its grammar, which has yet to be checked.

        Args:
            sampling: as `prepare` returned it.
        """
        own, both = self.sampling.grammar, sampling.grammar
        fields = [] if own is None else [(self.format_field, own)]
        return fields if both in (None, own) else [*fields, ("tools", str(both))]

    def within(self, modes: Sequence[str]) -> GenerationRequest:
        """Return this request, adapted to a model that is served for these config.MODES only.

        Without "thinking" among them, the chat template is told not to think, whatever the request says.

        Raises:
            UserError: the request needs another mode.
        """
        needed = ["chat" if self.url == CHAT else "completion", *["tools"] * bool(self.tools)]
        if missing := [mode for mode in needed if mode not in modes]:
            raise UserError(f"this model is served for {', '.join(modes)} only, not for {missing[0]}")
        if "thinking" in modes or self.url != CHAT:
            return self
        others = {name: value for name, value in self.template_args.items() if name != "reasoning_effort"}
        return replace(self, template_args={**others, "enable_thinking": False})

    def prepare(
        self, tokenizer: TokenizerWrapper, chat_format: ChatFormat, system: list[dict[str, str]] | None = None
    ) -> tuple[list[int], SamplingParams]:
        """Return the prompt's tokens and the sampling parameters with which to answer them.

        Args:
            tokenizer: of the model.
            chat_format: its chat template.
            system: messages to put in front of a chat without a system message.

        Raises:
            UserError: the prompt is empty, or this model can't answer such a request.
        """
        prompt = self.encode(tokenizer, chat_format, system)
        sampling = replace(self.sampling, keep_space=self.continues)
        if self.echo:
            prompt, sampling = _echoing(prompt, sampling)
        if self.must_call:
            sampling = replace(sampling, grammar=call_grammar(tokenizer, self.tools))
        elif self.tools and sampling.grammar is not None:  # the format constrains content; calls stay possible
            sampling = replace(sampling, grammar=call_grammar(tokenizer, self.tools, sampling.grammar))
        return prompt, sampling

    def reader(self, tokenizer: TokenizerWrapper, prompt: list[int], name: str = "") -> AnswerReader:
        """Return a reader for the answer with this name; `prompt` is its prompt's tokens."""
        return AnswerReader(tokenizer, prompt, self.tools, self.max_calls, name)

    def encode(
        self, tokenizer: TokenizerWrapper, chat_format: ChatFormat, system: list[dict[str, str]] | None = None
    ) -> list[int]:
        """Return the prompt's tokens; `system` goes in front of a chat without a system message.

        Raises:
            UserError: the prompt is empty, or the chat template doesn't accept the messages.
        """
        if self.url == CHAT:
            has_system = any(message.get("role") in ("system", "developer") for message in self.messages)
            messages = [*([] if has_system else system or []), *self.messages]
            return chat_format.encode(tokenizer, messages, self.tools, self.template_args, self.continues)
        if not self.prompt:
            raise FieldError("prompt", "the prompt is empty")
        if isinstance(self.prompt, list):
            return self.prompt
        return encode(tokenizer, self.prompt, add_special_tokens=self.add_special_tokens)


def read_body(url: str, body: Any, defaults: SamplingParams) -> GenerationRequest:
    """Read and check a request body with one prompt.

    Raises:
        UserError: it is invalid; the message names the field.
    """
    asked, *others = read_prompts(url, body, defaults)
    if others:
        raise FieldError("prompt", f"prompt must be a single prompt here, not a list of {1 + len(others)}")
    return asked


@contextlib.contextmanager
def renamed(names: Mapping[str, str]) -> Iterator[None]:
    """Replace the names of OpenAI's fields by another API's in errors of the block.

    Args:
        names: from OpenAI's to the other API's.

    Raises:
        FieldError: the block has raised one; with the other name.
    """
    try:
        yield
    except FieldError as error:
        name = names.get(error.field, error.field)
        raise FieldError(name, str(error).replace(error.field, name, 1)) from None


def read_prompts(url: str, body: Any, defaults: SamplingParams) -> list[GenerationRequest]:
    """Read and check a request body; return a request for each of its prompts (a chat has one).

    Raises:
        UserError: it is invalid; the message names the field.
    """
    if url not in (CHAT, COMPLETION):
        raise UserError(f"url must be {CHAT} or {COMPLETION}, not {url!r}")
    if not isinstance(body, dict):
        raise UserError("body must be a JSON object")
    if url == CHAT:
        return [_read_chat(without_ignored(body, CHAT_IGNORED), defaults)]
    rest = without_ignored(body, COMPLETION_IGNORED)
    prompts = _prompts(rest.pop("prompt", None))
    echo = boolean("echo", rest.pop("echo", False))
    if echo:
        for name in set(rest) - _ALLOWED_WITH_ECHO:
            raise FieldError(name, f"{name} can't be combined with echo")
    tells_only_prompt = echo and type(rest.get("max_tokens")) is int and rest["max_tokens"] == 0
    if tells_only_prompt:
        del rest["max_tokens"]
    has_specials = boolean("add_special_tokens", rest.pop("add_special_tokens", True))
    sampling = read_sampling(rest, defaults, is_chat=False)
    if tells_only_prompt:
        sampling = replace(sampling, max_tokens=0)
    asked = GenerationRequest(url, sampling, continues=True, add_special_tokens=has_specials, echo=echo)
    return [replace(asked, prompt=prompt) for prompt in prompts]


def _echoing(prompt: list[int], sampling: SamplingParams) -> tuple[list[int], SamplingParams]:
    """Force the prompt's tokens as the beginning of the answer, except the first, which has no log-probability."""
    first, *others = prompt
    if not others and not sampling.max_tokens:
        raise FieldError("max_tokens", "max_tokens must be at least 1 with echo and a prompt of one token")
    forced = replace(sampling, forced=tuple(others), max_tokens=len(others) + sampling.max_tokens)
    return [first], replace(forced, stop_words=(), max_repeats=0)


def _read_chat(rest: dict[str, Any], defaults: SamplingParams) -> GenerationRequest:
    messages = read_messages(rest.pop("messages", None))
    tools, must_call = _chosen(read_tools(rest.pop("tools", [])), rest.pop("tool_choice", "auto"))
    many = boolean("parallel_tool_calls", rest.pop("parallel_tool_calls", True))
    continues = _continues(rest, messages)
    template_args = _template_args(rest)
    sampling = read_sampling(rest, defaults, is_chat=True)
    if continues and sampling.grammar is not None:
        raise FieldError("response_format", "response_format can't be combined with continuing an assistant message")
    return GenerationRequest(
        CHAT, sampling, messages, "", tools, must_call, None if many else 1, template_args, continues
    )


def _continues(rest: dict[str, Any], messages: list[dict[str, Any]]) -> bool:
    """Return whether the last message is to be continued; removes the fields that say so, which are vLLM's."""
    continues = boolean("continue_final_message", rest.pop("continue_final_message", False))
    if boolean("add_generation_prompt", rest.pop("add_generation_prompt", not continues)) is continues:
        raise FieldError(
            "add_generation_prompt", "add_generation_prompt must be the opposite of continue_final_message"
        )
    if continues and (messages[-1]["role"] != "assistant" or not messages[-1]["content"].strip()):
        raise FieldError(
            "continue_final_message", "continue_final_message needs an assistant message with text at the end"
        )
    return continues


def _chosen(tools: list[dict[str, Any]], choice: Any) -> tuple[list[dict[str, Any]], bool]:
    """Return the tools that may be called, and whether one must be."""
    if choice == "none":
        return [], False
    if choice == "auto":
        return tools, False
    if choice != "required":
        called = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
        name = called.get("name") if isinstance(called, dict) else None
        if name is None:
            raise FieldError(
                "tool_choice",
                f"tool_choice must be 'auto', 'none', 'required' or a function's name, not {choice!r}",
            )
        tools = [tool for tool in tools if tool["function"]["name"] == name]
    if not tools:
        raise FieldError("tool_choice", "tool_choice asks for a tool that isn't in tools")
    return tools, True


def _template_args(rest: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments for the chat template; removes them from the fields."""
    arguments = rest.pop("chat_template_kwargs", {})
    if not isinstance(arguments, dict) or set(arguments) & _OUR_TEMPLATE_ARGS:
        raise FieldError(
            "chat_template_kwargs",
            "chat_template_kwargs must be an object of arguments that the chat template supports",
        )
    effort = rest.pop("reasoning_effort", None)
    if effort is None:
        return arguments
    if effort not in EFFORTS:
        raise FieldError("reasoning_effort", f"reasoning_effort must be one of {', '.join(EFFORTS)}, not {effort!r}")
    return {**arguments, **({"enable_thinking": False} if effort == "none" else {"reasoning_effort": effort})}


def _prompts(value: Any) -> list[str | list[int]]:
    """Return the prompts of a completion, given as a text, a list of tokens, or a list of either."""
    if _is_prompt(value):
        return [value]
    if not isinstance(value, list) or not value or not all(_is_prompt(one) for one in value):
        raise FieldError("prompt", "prompt must be a string, a list of tokens, or a list of such prompts")
    return value


def _is_prompt(value: Any) -> bool:
    is_tokens = isinstance(value, list) and bool(value) and all(type(token) is int and token >= 0 for token in value)
    return isinstance(value, str) or is_tokens
