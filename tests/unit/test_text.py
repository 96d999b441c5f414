"""Between text and tokens: stop words, spaces and characters that tokens cut, and instructions in a conversation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import (
    BPEStreamingDetokenizer,
    NaiveStreamingDetokenizer,
    SPMStreamingDetokenizer,
    TokenizerWrapper,
)
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from hippo_mpi.config.bundled import BUNDLED_MODEL
from hippo_mpi.engine.request import RequestOutput, SamplingParams, Timings, TokenLogprobs
from hippo_mpi.engine.text import AnswerText, ChatFormat, find_stop, open_tokenizer, token_bytes
from hippo_mpi.errors import FieldError, UserError
from hippo_mpi.protocols.openai_answers import Choice
from hippo_mpi.protocols.openai_requests import COMPLETION, read_body

ALPHABET = st.text("ab<|>", max_size=12)


@given(st.lists(ALPHABET, max_size=8), st.lists(ALPHABET.filter(bool), min_size=1, max_size=3))
def test_shown_text_never_has_a_stop_word(pieces: list[str], words: list[str]) -> None:
    """Text shown piece by piece begins like the whole, and is complete if no stop word comes."""
    stops, shown, text = tuple(words), "", ""
    for piece in pieces:
        text += piece
        cut, safe = find_stop(text, stops)
        shown += text[len(shown) : safe]
        if cut is not None:
            break
        assert len(text) - len(shown) < max(map(len, words))
    assert text.startswith(shown)
    assert not any(word in shown for word in words)


def test_a_beginning_stop_word_is_held_back() -> None:
    assert find_stop("hello <", ("<end>",)) == (None, 6)
    assert find_stop("hello <end> more", ("<end>",)) == (6, 6)
    assert find_stop("hello", ()) == (None, 5)


def byte_level(detokenizer: type) -> TokenizerWrapper:
    found = open_tokenizer(Path(BUNDLED_MODEL), [4, 0], (), False)
    return TokenizerWrapper(found._tokenizer, detokenizer, eos_token_ids=[4, 0])


def sentence_piece(detokenizer: type) -> TokenizerWrapper:
    """A tokenizer of a few words and bytes, as SentencePiece makes them."""
    pieces = ["\u2581a", "\u2581fox", "fox", "<0xC3>", "<0xA9>", "<end>"]
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<end>"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return TokenizerWrapper(
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>"), detokenizer, eos_token_ids=[5]
    )


def text_of(tokenizer: TokenizerWrapper, tokens: list[int], before: list[int]) -> str:
    answer = AnswerText(tokenizer, before)
    for token in tokens:
        answer.add_token(token)
    answer.finalize()
    return answer.text


@pytest.mark.parametrize("detokenizer", [BPEStreamingDetokenizer, NaiveStreamingDetokenizer])
def test_a_text_goes_on_with_its_space(detokenizer: type) -> None:
    tokenizer = byte_level(detokenizer)
    before, after = tokenizer.encode("There was once a"), tokenizer.encode(" cow", add_special_tokens=False)
    assert text_of(tokenizer, after, before) == " cow"
    assert text_of(tokenizer, tokenizer.encode(", or so", add_special_tokens=False), before) == ", or so"
    assert text_of(tokenizer, after, tokenizer.encode("So.\n")) == " cow"


@pytest.mark.parametrize("detokenizer", [SPMStreamingDetokenizer, NaiveStreamingDetokenizer])
def test_a_text_of_sentence_pieces_goes_on_with_its_space(detokenizer: type) -> None:
    tokenizer = sentence_piece(detokenizer)
    assert text_of(tokenizer, [1, 0], [0]) == " fox a"
    assert text_of(tokenizer, [2, 1], [0]) == "fox fox"
    assert text_of(tokenizer, [1, 0], []) == "fox a"  # as mlx-lm has it


@pytest.mark.parametrize("detokenizer", [BPEStreamingDetokenizer, NaiveStreamingDetokenizer])
def test_half_a_character_at_the_end_is_left_out(detokenizer: type) -> None:
    tokenizer = byte_level(detokenizer)
    tokens = tokenizer.encode("fox \u732b", add_special_tokens=False)
    assert text_of(tokenizer, tokens, []) == "fox \u732b"
    assert text_of(tokenizer, tokens[:-1], []).rstrip() == "fox"
    assert text_of(sentence_piece(SPMStreamingDetokenizer), [1, 3], [0]) == " fox"


def test_tokens_are_bytes() -> None:
    tokenizer = byte_level(BPEStreamingDetokenizer)
    text = " fox \u732b\U0001f98a"
    tokens = tokenizer.encode(text, add_special_tokens=False)
    assert b"".join(token_bytes(tokenizer, token) for token in tokens) == text.encode()
    pieces = sentence_piece(SPMStreamingDetokenizer)
    assert [token_bytes(pieces, token) for token in (3, 4)] == [b"\xc3", b"\xa9"]
    assert [token_bytes(pieces, token) for token in (0, 1, 2, 5)] == [b" a", b" fox", b"fox", b"<end>"]


def test_where_tokens_are_in_their_text() -> None:
    """Whole or streamed; the parts of a character are where it is. A long answer costs no more per token than a short one."""
    tokenizer = byte_level(BPEStreamingDetokenizer)
    text = " fox \u732b\U0001f98a!"
    tokens = tokenizer.encode(text, add_special_tokens=False)
    asked = read_body(COMPLETION, {"prompt": [tokens[0]], "logprobs": 0}, SamplingParams())
    outputs = [RequestOutput(0, "", token, Timings(), TokenLogprobs(0.0, [])) for token in tokens]
    choice = Choice(asked, asked.prompt, tokenizer)
    streamed = [at for output in outputs for at in choice.take(output)["logprobs"]["text_offset"]]
    assert streamed == choice.whole()["logprobs"]["text_offset"]
    at, wanted = 0, []
    for token in tokens:
        wanted.append(len(text.encode()[:at].decode(errors="ignore")))
        at += len(token_bytes(tokenizer, token))
    assert streamed == wanted and len(set(wanted)) < len(wanted)


LOSING = "{% for m in messages %}{% if m.role in ('user', 'assistant') or loop.first %}<{{ m.role }}>{{ m.content }}{% endif %}{% endfor %}"
RAISING = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('first') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}"
)
ANYWHERE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
DEVELOPER = "{# developer #}" + ANYWHERE
CONVERSATION = [
    ("system", "A"),
    ("developer", "B"),
    ("user", "hi"),
    ("assistant", "ho"),
    ("system", "C"),
    ("user", "go"),
]


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        (LOSING, "<system>A\n\nB\n\nC<user>hi<assistant>ho<user>go"),
        (RAISING, "<system>A\n\nB\n\nC<user>hi<assistant>ho<user>go"),
        (ANYWHERE, "<system>A\n\nB<user>hi<assistant>ho<system>C<user>go"),
        (DEVELOPER, "<system>A\n\nB<user>hi<assistant>ho<system>C<user>go"),
    ],
)
def test_no_instruction_is_lost(template: str, wanted: str) -> None:
    tokenizer = byte_level(BPEStreamingDetokenizer)
    tokenizer._tokenizer.chat_template = template
    messages = [{"role": role, "content": text} for role, text in CONVERSATION]
    assert tokenizer.decode(ChatFormat().encode(tokenizer, messages)) == wanted


def test_a_developer_is_the_system_unless_the_template_knows_one() -> None:
    tokenizer = byte_level(BPEStreamingDetokenizer)
    messages = [{"role": "developer", "content": "B"}, {"role": "user", "content": "hi"}]
    for template, role in ((ANYWHERE, "system"), (DEVELOPER, "developer")):
        tokenizer._tokenizer.chat_template = template
        assert tokenizer.decode(ChatFormat().encode(tokenizer, messages)) == f"<{role}>B<user>hi"


def test_a_conversation_may_end_with_an_empty_text() -> None:
    tokenizer = byte_level(BPEStreamingDetokenizer)
    tokenizer._tokenizer.chat_template = ANYWHERE
    said: list[dict[str, Any]] = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    empty = {"role": "user", "content": " "}
    assert ChatFormat().encode(tokenizer, [*said, empty])
    for messages in ([], [empty], [{"role": "system", "content": "A"}, empty]):
        with pytest.raises(UserError, match="the prompt is empty"):
            ChatFormat().encode(tokenizer, messages)


def test_what_a_template_does_not_know() -> None:
    """How much to think is no matter to a model that doesn't think; any other argument would have an effect."""
    tokenizer = byte_level(BPEStreamingDetokenizer)
    tokenizer._tokenizer.chat_template = ANYWHERE
    messages = [{"role": "user", "content": "hi"}]
    plain = ChatFormat().encode(tokenizer, messages)
    for taken in ({"reasoning_effort": "high"}, {"enable_thinking": True}, {"enable_thinking": False}):
        assert ChatFormat().encode(tokenizer, messages, template_args=taken) == plain
    with pytest.raises(FieldError, match="fox: this model's chat template has no such argument") as refused:
        ChatFormat().encode(tokenizer, messages, template_args={"fox": 1})
    assert refused.value.field == "chat_template_kwargs"


def test_the_beginning_of_an_answer_is_continued() -> None:
    tokenizer = byte_level(BPEStreamingDetokenizer)
    tokenizer._tokenizer.chat_template = ANYWHERE + "<end>{% if add_generation_prompt %}<assistant>{% endif %}"
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "A fox"}]
    assert tokenizer.decode(ChatFormat().encode(tokenizer, messages, continues=True)) == "<user>hi<assistant>A fox"
