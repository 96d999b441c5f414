"""Converts between text and tokens: chat template, end tokens, stop words. The tokenizer is mlx-lm's."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from hippo_mpi.config.options import PromptOptions
from hippo_mpi.errors import FieldError, ModelError, UserError, print_traceback

_TOKENS_BEFORE = 8  # of a prompt, given to the detokenizer as context: enough to have some text


def open_tokenizer(
    path: Path, eos_token_ids: Any, extra_eos: tuple[str, ...], trust_remote_code: bool
) -> TokenizerWrapper:
    """Open the tokenizer of a checkpoint.

    Args:
        path: the checkpoint's folder.
        eos_token_ids: end tokens, as in the model's config.
        extra_eos: texts of further end tokens.
        trust_remote_code: whether the checkpoint's own Python code may run.

    Raises:
        ModelError: there is none, or it can't be read.
        UserError: an extra end token isn't a single token of its vocabulary.
    """
    files = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "*.tiktoken", "vocab.json", "vocab.txt")
    if not any(next(path.glob(name), None) for name in files):
        raise ModelError(f"{path} has no tokenizer (tokenizer.json or tokenizer.model)")
    try:
        tokenizer = load_tokenizer(path, {"trust_remote_code": trust_remote_code}, eos_token_ids=eos_token_ids)
    except Exception as error:  # transformers passes on whatever its parsers raise
        print_traceback(error)
        raise ModelError(f"the tokenizer of {path} can't be read: {one_line(error)}") from None
    for token in extra_eos:
        try:
            tokenizer.add_eos_token(token)
        except ValueError as error:
            raise UserError(f"--extra-eos-token {token}: {one_line(error)}") from None
    return tokenizer


def one_line(error: BaseException) -> str:
    """Return an exception's message as one line of at most 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


@dataclass(frozen=True)
class ChatFormat:
    """How messages become a prompt; the fields are flags of mlx_lm.generate.

    Raises:
        UserError: the config isn't a JSON object.
    """

    ignore_chat_template: bool = False
    chat_template_config: str | None = None
    prefill_response: str | None = None

    @classmethod
    def from_options(cls, options: PromptOptions) -> ChatFormat:
        """Return the format that the command line sets."""
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
        continues: bool = False,
    ) -> list[int]:
        """Return the tokens of a conversation, ready to be continued by the assistant.

        Args:
            tokenizer: has the chat template.
            messages: objects with a role and a content, OpenAI's.
            tools: OpenAI's tool objects, which the assistant may call.
            template_args: arguments of the template; they win over those of `chat_template_config`. Those that say how
                much to think are ignored if the model doesn't think.
            continues: whether the last message is the beginning of the answer.

        Raises:
            UserError: the prompt is empty, or the template rejects it or doesn't have an argument.
        """
        if _is_empty(messages):
            raise UserError("the prompt is empty")
        has_template = tokenizer.has_chat_template and not self.ignore_chat_template
        if tools and not (has_template and tokenizer.has_tool_calling):
            raise FieldError("tools", "tools: this model's chat template doesn't support tools")
        known = {
            name: value for name, value in (template_args or {}).items() if has_template and _knows(tokenizer, name)
        }
        for name in template_args or {}:
            if name not in known and name not in _HOW_TO_THINK:
                raise FieldError("chat_template_kwargs", f"{name}: this model's chat template has no such argument")
        if not has_template:
            return encode(tokenizer, "\n".join(message["content"] for message in messages))
        if self.prefill_response is not None and not continues:
            messages, continues = [*messages, {"role": "assistant", "content": self.prefill_response}], True
        options = {**self._options(), **known}
        options["continue_final_message" if continues else "add_generation_prompt"] = True
        if tools:
            options["tools"] = tools
        return encode(tokenizer, _render(tokenizer, messages, options), add_special_tokens=False)


_HOW_TO_THINK = {"enable_thinking", "reasoning_effort"}
_INSTRUCTING = ("system", "developer")


def _is_empty(messages: list[dict[str, Any]]) -> bool:
    """True if there is no message besides instructions, or only one by the user without text."""
    turns = [message for message in messages if message["role"] not in _INSTRUCTING]
    return not messages or (len(turns) == 1 and turns[0]["role"] == "user" and not turns[0]["content"].strip())


def _render(tokenizer: TokenizerWrapper, messages: list[dict[str, Any]], options: dict[str, Any]) -> str:
    """Return the text of a conversation.

    Templates differ in how they handle instructions: many don't know the developer role, and accept a system message
    only in the first place. Otherwise some raise, and some silently leave it out. So each instruction is looked for in
    the text, and if one is missing, all are merged into the first message.

    Raises:
        UserError: the template rejects the conversation.
    """
    template = tokenizer.chat_template
    if not (isinstance(template, str) and "developer" in template):
        messages = [{**m, "role": "system"} if m["role"] == "developer" else m for m in messages]
    turns = [place for place, message in enumerate(messages) if message["role"] not in _INSTRUCTING]
    num_leading = turns[0] if turns else len(messages)
    messages = [*_merged(messages[:num_leading]), *messages[num_leading:]]
    later = [message["content"].strip() for message in messages[1:] if message["role"] in _INSTRUCTING]
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
        if all(instruction in text for instruction in later):
            return text
    except Exception as error:  # jinja templates may raise anything
        if not later:
            raise UserError(f"the chat template rejects this conversation: {one_line(error)}") from None
    instructions = [message for message in messages if message["role"] in _INSTRUCTING]
    others = [message for message in messages if message["role"] not in _INSTRUCTING]
    return _render(tokenizer, [*_merged(instructions), *others], options)


def _merged(instructions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return instructions merged into one message, in a list; an empty list if there are none."""
    texts = [message["content"] for message in instructions]
    return [{**instructions[0], "content": "\n\n".join(texts)}] if instructions else []


def _knows(tokenizer: TokenizerWrapper, name: str) -> bool:
    """True if a chat template uses an argument; one that isn't text is assumed to use any."""
    if name == "enable_thinking":
        return bool(tokenizer.has_thinking)
    return not isinstance(tokenizer.chat_template, str) or bool(
        re.search(rf"\b{re.escape(name)}\b", tokenizer.chat_template)
    )


def encode(tokenizer: TokenizerWrapper, text: str, **options: bool) -> list[int]:
    """Return the tokens of a text; `options` are the tokenizer's.

    Raises:
        UserError: the tokenizer rejects it.
    """
    try:
        return list(tokenizer.encode(text, **options))
    except Exception as error:  # tokenizers may raise anything
        raise UserError(f"the tokenizer rejects this text: {one_line(error)}") from None


class AnswerText:
    """The text of an answer, decoded token by token with mlx-lm's detokenizer.

    Args:
        tokenizer: has the detokenizer.
        before: tokens that the answer continues as one text. Without them a leading space is dropped, as by mlx-lm.
    """

    def __init__(self, tokenizer: TokenizerWrapper, before: Sequence[int] = ()) -> None:
        self._detokenizer = tokenizer.detokenizer
        table = getattr(self._detokenizer, "tokenmap", None)
        self._num_known = len(table) if table is not None else 1 << 32
        for token in before[-_TOKENS_BEFORE:]:
            self.add_token(token)
        self._start = len(self._detokenizer.text)
        self._end: int | None = None

    @property
    def text(self) -> str:
        """All text that is certain so far."""
        return str(self._detokenizer.text[self._start : self._end])

    def add_token(self, token: int) -> None:
        """Append a token; one beyond the tokenizer's vocabulary (logits may be padded) adds no text."""
        if token < self._num_known:
            self._detokenizer.add_token(token)

    def finalize(self) -> None:
        """End the answer: release text that was held back, except an incomplete character."""
        whole = len(self._detokenizer.text)
        self._detokenizer.finalize()
        self._end = whole + len(self._detokenizer.text[whole:].rstrip("\ufffd"))


def token_bytes(tokenizer: TokenizerWrapper, token: int) -> bytes:
    """Return the bytes that a token stands for, perhaps a part of a character."""
    text = str(tokenizer.decode([token]))
    piece = str(tokenizer.convert_ids_to_tokens([token])[0])
    if "\ufffd" not in text:
        spaced = piece.replace("\u2581", " ")  # SentencePiece's mark for a space; decoding drops a leading one
        return (spaced if spaced.lstrip(" ") == text.lstrip(" ") else text).encode()
    if re.fullmatch("<0x[0-9A-F]{2}>", piece):  # SentencePiece's form of a byte
        return bytes([int(piece[3:5], 16)])
    # The byte alphabet of GPT-2's tokenizer and many since.
    byte_of: dict[str, int] = {character: byte for byte, character in bytes_to_unicode().items()}
    return bytes(byte_of[c] for c in piece) if set(piece) <= set(byte_of) else text.encode()


def find_stop(text: str, stop_words: tuple[str, ...]) -> tuple[int | None, int]:
    """Return (where a stop word begins in `text` or None, how many characters are safe to show).

    A tail that may be the beginning of a stop word is held back until more text decides.
    """
    stops = [at for word in stop_words if (at := text.find(word)) >= 0]
    if stops:
        return min(stops), min(stops)
    held = 0
    for word in stop_words:
        for length in range(min(len(word) - 1, len(text)), held, -1):
            if text.endswith(word[:length]):
                held = length
                break
    return None, len(text) - held
