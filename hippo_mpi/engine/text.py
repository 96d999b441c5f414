"""Between text and tokens: chat template, end tokens, stop words. The tokenizer is mlx-lm's."""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_tokenizer

from hippo_mpi.errors import ModelError, UserError, print_traceback


def open_tokenizer(
    path: Path, eos_token_ids: Any, extra_eos: tuple[str, ...], trust_remote_code: bool
) -> TokenizerWrapper:
    """The tokenizer of a checkpoint.

    Raises:
        ModelError: there is none, or it can't be read.
        UserError: an extra end token isn't a single token of its vocabulary.
    """
    files = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "*.tiktoken", "vocab.json", "vocab.txt")
    if not any(next(path.glob(name), None) for name in files):
        raise ModelError(f"{path} has no tokenizer (tokenizer.json or tokenizer.model)")
    try:
        tokenizer = load_tokenizer(path, {"trust_remote_code": trust_remote_code}, eos_token_ids=eos_token_ids)
    except Exception as error:  # transformers raises whatever its parsers raise
        print_traceback(error)
        raise ModelError(f"the tokenizer of {path} can't be read: {one_line(error)}") from None
    for token in extra_eos:
        try:
            tokenizer.add_eos_token(token)
        except ValueError as error:
            raise UserError(f"--extra-eos-token {token}: {one_line(error)}") from None
    return tokenizer


def one_line(error: BaseException) -> str:
    """An exception's message, short enough for one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


@dataclass(frozen=True)
class ChatFormat:
    """How messages become a prompt; flags of mlx_lm.generate.

    Raises:
        UserError: the config isn't a JSON object.
    """

    ignore_chat_template: bool = False
    chat_template_config: str | None = None
    prefill_response: str | None = None

    @classmethod
    def from_options(cls, options: argparse.Namespace) -> ChatFormat:
        return cls(options.ignore_chat_template, options.chat_template_config, options.prefill_response)

    def __post_init__(self) -> None:
        self._options()

    def _options(self) -> dict[str, Any]:
        try:
            options = json.loads(self.chat_template_config) if self.chat_template_config else {}
        except json.JSONDecodeError as error:
            raise UserError(f"--chat-template-config is not JSON: {error}") from None
        if not isinstance(options, dict):
            raise UserError("--chat-template-config must be a JSON object")
        return options

    def encode(
        self,
        tokenizer: TokenizerWrapper,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        template_args: dict[str, Any] | None = None,
    ) -> list[int]:
        """Tokens of a conversation, ready to be continued by the assistant, who may call `tools`.

        Args:
            template_args: beside those of `chat_template_config`, over which they win.

        Raises:
            UserError: the prompt is empty, or the template doesn't take it, or knows nothing of an argument.
        """
        if not messages or (messages[-1]["role"] == "user" and not messages[-1]["content"].strip()):
            raise UserError("the prompt is empty")
        if tools and (self.ignore_chat_template or not tokenizer.has_tool_calling):
            raise UserError("tools: this model's chat template has none")
        template_args = dict(template_args or {})
        if template_args.get("enable_thinking") is False and not tokenizer.has_thinking:
            del template_args["enable_thinking"]  # it doesn't think as it is
        for name in template_args:
            if self.ignore_chat_template or not _knows(tokenizer, name):
                raise UserError(f"{name}: this model's chat template has no such argument")
        if self.ignore_chat_template or not tokenizer.has_chat_template:
            text = "\n".join(message["content"] for message in messages)
            return encode(tokenizer, text)
        options = {**self._options(), **template_args}
        if self.prefill_response is not None:
            messages = [*messages, {"role": "assistant", "content": self.prefill_response}]
            options = {**options, "continue_final_message": True}
        else:
            options = {**options, "add_generation_prompt": True}
        if tools:
            options["tools"] = tools
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except Exception as error:  # jinja templates raise whatever they like
            raise UserError(f"the chat template doesn't take this conversation: {one_line(error)}") from None
        return encode(tokenizer, text, add_special_tokens=False)


def _knows(tokenizer: TokenizerWrapper, name: str) -> bool:
    """Whether a chat template looks at an argument. One that isn't a text may look at anything."""
    if name == "enable_thinking":
        return bool(tokenizer.has_thinking)
    return not isinstance(tokenizer.chat_template, str) or bool(
        re.search(rf"\b{re.escape(name)}\b", tokenizer.chat_template)
    )


def encode(tokenizer: TokenizerWrapper, text: str, **options: bool) -> list[int]:
    """The tokens of a text.

    Raises:
        UserError: the tokenizer doesn't take it.
    """
    try:
        return list(tokenizer.encode(text, **options))
    except Exception as error:  # tokenizers raise whatever they like
        raise UserError(f"the tokenizer doesn't take this text: {one_line(error)}") from None


def find_stop(text: str, stop_words: tuple[str, ...]) -> tuple[int | None, int]:
    """(where `text` is to be cut off, how many characters are safe to show).

    A tail that may be the beginning of a stop word is held back until more text tells.
    """
    found = [at for word in stop_words if (at := text.find(word)) >= 0]
    if found:
        return min(found), min(found)
    held = 0
    for word in stop_words:
        for length in range(min(len(word) - 1, len(text)), held, -1):
            if text.endswith(word[:length]):
                held = length
                break
    return None, len(text) - held
