"""What an answer is made of: cut anywhere, and as a real model writes it under a grammar."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import TokenizerWrapper

from hippo_mpi.config.bundled import BUNDLED_MODEL
from hippo_mpi.engine.engine import Engine
from hippo_mpi.engine.grammar import Grammars
from hippo_mpi.engine.prefill import Limits
from hippo_mpi.engine.request import Request, Resume, SamplingParams
from hippo_mpi.engine.text import ChatFormat, open_tokenizer
from hippo_mpi.errors import UserError
from hippo_mpi.protocols.answer_parts import AnswerReader, Blocks, Call, Part, PartSplitter
from hippo_mpi.protocols.openai_answers import AnswerHead, Choice, answer_object
from hippo_mpi.protocols.openai_requests import CHAT, COMPLETION, GenerationRequest, read_body
from tests.local_ring import LocalRing, make_stages, open_folder

TOOLS = [{"type": "function", "function": {"name": "find_fox", "parameters": {
    "type": "object", "properties": {"at": {"enum": ["river", "wood"]}}, "required": ["at"], "additionalProperties": False,
}}}]  # fmt: skip
TEMPLATE = """{% if tools %}<|system|>
<tool_call>{{ tools | tojson }}</tool_call>
{% endif %}{% for message in messages %}<|{{ message.role }}|>
{{ message.content }}{% for tool_call in message.tool_calls or [] %}<tool_call>{{ tool_call.name }}{% endfor %}<|end|>
{% endfor %}<|assistant|>
"""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TokenizerWrapper:
    """The bundled model's, with a chat template that knows tools; mlx-lm finds the marks and the parser."""
    folder = tmp_path_factory.mktemp("tools")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED_MODEL / name, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    found = open_tokenizer(folder, [4, 0], (), False)
    found._think_start, found._think_end = "<think>", "</think>"
    found._think_start_tokens = tuple(found.encode("<think>", add_special_tokens=False))
    found._think_end_tokens = tuple(found.encode("</think>", add_special_tokens=False))
    return found


ANSWER = (
    'I see.<think>A fox?</think>Yes.<tool_call>{"name": "find_fox", "arguments": {"at": "river"}}</tool_call>Done <'
)


@given(st.lists(st.integers(0, len(ANSWER)), max_size=12).map(sorted))
def test_cut_anywhere(tokenizer: TokenizerWrapper, cuts: list[int]) -> None:
    """However the text comes, its parts are the same."""
    blocks = Blocks(AnswerReader(tokenizer, [5], TOOLS))
    told: dict[int, str] = {}
    for start, stop in zip([0, *cuts], [*cuts, len(ANSWER)], strict=True):
        is_last = stop == len(ANSWER) and start == ([0, *cuts])[-1]
        for what, block, text in blocks.take(ANSWER[start:stop], is_last):
            told[block.index] = told.get(block.index, "") + (text if what == "more" else f"|{what}|")
    assert [(block.kind, block.text) for block in blocks.all] == [
        ("content", "I see."), ("reasoning", "A fox?"), ("content", "Yes."), ("call", '{"at": "river"}'), ("content", "Done <"),
    ]  # fmt: skip
    assert blocks.all[3].call is not None and blocks.all[3].call.name == "find_fox"
    assert list(told.values()) == [f"|open|{block.text}|close|" for block in blocks.all]


def test_only_so_many_calls(tokenizer: TokenizerWrapper) -> None:
    """parallel_tool_calls: false."""
    pieces = AnswerReader(tokenizer, [5], TOOLS, max_calls=1).read(ANSWER + ANSWER, True)
    assert len([piece for piece in pieces if isinstance(piece, Call)]) == 1


def test_a_prompt_may_begin_the_thought(tokenizer: TokenizerWrapper) -> None:
    splitter = PartSplitter(tokenizer, tokenizer.encode("fox<think>"), has_tools=False)
    found = splitter.feed("so</think>yes<tool_call>", is_last=True)
    assert found == [Part("reasoning", "so"), Part("content", "yes<tool_call>")]


def test_a_call_that_nobody_understands_is_shown(tokenizer: TokenizerWrapper) -> None:
    reader = AnswerReader(tokenizer, [5], TOOLS)
    assert reader.read("<tool_call>{oh", True) == [Part("content", "{oh")]
    assert reader.num_calls == 0


def answer(
    tokenizer: TokenizerWrapper, asked: GenerationRequest, resume: Resume | None = None
) -> tuple[dict[str, Any], str]:
    """What the bundled model makes of a request: the choice, and its text, behind that which is there already."""
    prompt, sampling = asked.prepare(tokenizer, ChatFormat())
    story = open_folder(BUNDLED_MODEL)
    engine = Engine(LocalRing(make_stages(story, [4, 8])).leader, tokenizer, Limits(), 2048, story.config["vocab_size"])
    engine.add(Request(0, prompt, sampling, resume))
    choice = Choice(asked, prompt, tokenizer)
    for output in engine.run():
        choice.take(output)
    (found,) = answer_object(AnswerHead(asked.url, "story", "id"), [choice])["choices"]
    return found, "".join(output.text for output in choice.outputs)


ASKED: dict[str, Any] = {"messages": [{"role": "user", "content": "Where?"}], "tools": TOOLS, "max_tokens": 80}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_that_must_call_a_tool(tokenizer: TokenizerWrapper, temperature: float) -> None:
    """The bundled model knows no tools: the grammar makes it write a call that fits the schema."""
    choice = {"type": "function", "function": {"name": "find_fox"}}
    body = {**ASKED, "tool_choice": choice, "temperature": temperature, "seed": 1}
    asked = read_body(CHAT, body, SamplingParams())
    assert "find_fox" in tokenizer.decode(asked.encode(tokenizer, ChatFormat()))
    found, _ = answer(tokenizer, asked)
    assert found["finish_reason"] == "tool_calls"
    (call,) = found["message"]["tool_calls"]
    assert call["function"]["name"] == "find_fox"
    assert json.loads(call["function"]["arguments"])["at"] in ("river", "wood")
    assert found["message"]["content"] is None


@pytest.mark.slow
def test_an_answer_in_a_format_or_a_call(tokenizer: TokenizerWrapper) -> None:
    """response_format holds for what is said; a call may be made instead."""
    schema = {
        "type": "object",
        "properties": {"at": {"const": "wood"}},
        "required": ["at"],
        "additionalProperties": False,
    }
    body = {**ASKED, "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}
    asked = read_body(CHAT, body, SamplingParams())
    _, sampling = asked.prepare(tokenizer, ChatFormat())
    compiling = Grammars(tokenizer, 4096).compile(sampling.grammar or "")
    compiling.matcher.result(30)
    matcher = compiling.mask()
    allowed = np.isfinite(np.array(matcher(mx.zeros((1, 4096)))[0]))
    begins = {tokenizer.decode([int(token)])[:1] for token in allowed.nonzero()[0]}
    assert begins == {"{", "<"}
    assert answer(tokenizer, asked)[0]["finish_reason"] == "tool_calls"
    calls = {int(token): -10000 for token in allowed.nonzero()[0] if tokenizer.decode([int(token)])[0] == "<"}
    _, text = answer(tokenizer, read_body(CHAT, {**body, "logit_bias": calls}, SamplingParams()))
    assert json.loads(text) == {"at": "wood"}


def test_a_model_that_is_served_for_some_modes(tokenizer: TokenizerWrapper) -> None:
    asked = read_body(CHAT, ASKED, SamplingParams())
    assert asked.within(["chat", "tools", "thinking"]) == asked
    assert asked.within(["chat", "tools"]).template_args == {"enable_thinking": False}
    effort = read_body(CHAT, {**ASKED, "reasoning_effort": "high"}, SamplingParams())
    assert effort.within(["chat", "tools"]).template_args == {"enable_thinking": False}
    text = read_body(COMPLETION, {"prompt": "A fox"}, SamplingParams())
    for body, modes, mode in (
        (asked, ["chat"], "tools"),
        (asked, ["completion", "tools"], "chat"),
        (text, ["chat", "tools"], "completion"),
    ):
        with pytest.raises(UserError, match=f"served for {', '.join(modes)} only, not for {mode}"):
            body.within(modes)


@pytest.mark.slow
def test_thoughts_are_free_and_limited() -> None:
    """A grammar waits for the end of a thought, and a limit brings it about."""
    thinker = open_tokenizer(Path(BUNDLED_MODEL), [4, 0], (), False)
    prompt = list(thinker.encode("Once upon a time"))
    thinker._think_start, thinker._think_start_tokens = " time", tuple(prompt[-1:])
    thinker._think_end, thinker._think_end_tokens = "!??", tuple(thinker.encode("!??", add_special_tokens=False))
    _, story = answer(thinker, read_body(COMPLETION, {"prompt": prompt, "max_tokens": 60}, SamplingParams()))
    body = {"prompt": prompt, "max_tokens": 60, "response_format": {"type": "json_object"}}
    asked = read_body(COMPLETION, body, SamplingParams())
    assert answer(thinker, asked)[1] == story
    limited = replace(asked, sampling=replace(asked.sampling, max_thinking_tokens=5))
    _, text = answer(thinker, limited)
    thought, mark, said = text.partition("!??")
    assert mark and story.startswith(thought)
    assert said.startswith("{")
    tokens = list(thinker.encode(f"Once upon a time{thought}"))[len(prompt) :]
    assert len(tokens) == 5
    for begun in (tokens, [*tokens, thinker.think_end_tokens[0]]):  # on other ranks, before and inside the mark
        shown = thinker.decode(begun)
        assert shown + answer(thinker, limited, Resume(begun, len(shown)))[1] == text


def test_tools_of_a_conversation(tokenizer: TokenizerWrapper) -> None:
    """Calls and their results go back into the template; what can't be done is refused."""
    call = {"id": "a", "type": "function", "function": {"name": "find_fox", "arguments": '{"at": "river"}'}}
    messages = [
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": "by the river"},
    ]
    asked = read_body(CHAT, {"messages": messages, "tools": TOOLS}, SamplingParams())
    assert asked.messages[1]["tool_calls"][0]["function"]["arguments"] == {"at": "river"}
    assert "by the river" in tokenizer.decode(asked.encode(tokenizer, ChatFormat()))
    assert read_body(CHAT, {"messages": messages, "tools": TOOLS, "tool_choice": "none"}, SamplingParams()).tools == []
    for choice, line in (
        ("all", "tool_choice must be"),
        ({"type": "function", "function": {"name": "x"}}, "isn't in tools"),
    ):
        with pytest.raises(UserError, match=line):
            read_body(CHAT, {"messages": messages, "tools": TOOLS, "tool_choice": choice}, SamplingParams())
    with pytest.raises(UserError, match="tool_calls must be a list"):
        read_body(CHAT, {"messages": [{"role": "assistant", "tool_calls": [{"function": "{"}]}]}, SamplingParams())
    plain = open_tokenizer(Path(BUNDLED_MODEL), [4, 0], (), False)
    with pytest.raises(UserError, match="tools: this model's chat template doesn't support tools"):
        asked.encode(plain, ChatFormat())
