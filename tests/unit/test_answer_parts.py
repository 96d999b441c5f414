"""What an answer is made of: cut anywhere, and as a real model writes it under a grammar."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import TokenizerWrapper

from hippo_mpi.config import BUNDLED_MODEL
from hippo_mpi.engine.engine import Engine
from hippo_mpi.engine.request import Request, SamplingParams
from hippo_mpi.engine.scheduler import Limits
from hippo_mpi.engine.text import ChatFormat, open_tokenizer
from hippo_mpi.errors import UserError
from hippo_mpi.serving.answer_parts import ChatMessage, Part, PartSplitter
from hippo_mpi.serving.openai_answers import Choice, answer_object
from hippo_mpi.serving.openai_protocol import CHAT, read_body
from tests.local_ring import LocalRing, make_stages, open_folder

TOOLS = [{"type": "function", "function": {"name": "find_fox", "parameters": {"type": "object"}}}]
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
    return found


ANSWER = (
    'I see.<think>A fox?</think>Yes.<tool_call>{"name": "find_fox", "arguments": {"at": "river"}}</tool_call>Done <'
)


@given(st.lists(st.integers(0, len(ANSWER)), max_size=12).map(sorted))
def test_cut_anywhere(tokenizer: TokenizerWrapper, cuts: list[int]) -> None:
    """However the text comes, its parts are the same."""
    message = ChatMessage(tokenizer, [5], TOOLS)
    deltas = []
    for start, stop in zip([0, *cuts], [*cuts, len(ANSWER)], strict=True):
        deltas.append(message.delta(ANSWER[start:stop], stop == len(ANSWER) and start == ([0, *cuts])[-1]))
    assert message.message()["content"] == "I see.Yes.Done <"
    assert message.message()["reasoning_content"] == "A fox?"
    (call,) = message.message()["tool_calls"]
    assert call["function"] == {"name": "find_fox", "arguments": '{"at": "river"}'}
    assert "".join(delta.get("content", "") for delta in deltas) == "I see.Yes.Done <"
    assert [c["index"] for delta in deltas for c in delta.get("tool_calls", [])] == [0]
    assert message.finish_reason("stop") == "tool_calls"


def test_a_prompt_may_begin_the_thought(tokenizer: TokenizerWrapper) -> None:
    splitter = PartSplitter(tokenizer, tokenizer.encode("fox<think>"), has_tools=False)
    found = splitter.feed("so</think>yes<tool_call>", is_last=True)
    assert found == [Part("reasoning", "so"), Part("content", "yes<tool_call>")]


def test_a_call_that_nobody_understands_is_shown(tokenizer: TokenizerWrapper) -> None:
    message = ChatMessage(tokenizer, [5], TOOLS)
    message.delta("<tool_call>{oh", True)
    assert message.message() == {"role": "assistant", "content": "{oh"}
    assert message.finish_reason("length") == "length"


def test_a_model_that_calls_a_tool(tokenizer: TokenizerWrapper) -> None:
    """The bundled model knows no tools, so a grammar makes it write a call; from the body to OpenAI's object."""
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "Where?"}], "tools": TOOLS, "max_tokens": 80}
    asked = read_body(CHAT, body, SamplingParams())
    prompt = asked.encode(tokenizer, ChatFormat())
    assert "find_fox" in tokenizer.decode(prompt)
    story = open_folder(BUNDLED_MODEL)
    ring = LocalRing(make_stages(story, [4, 8]))
    engine = Engine(ring.leader, tokenizer, Limits(), 2048, story.config["vocab_size"])
    call = '{"name": "find_fox", "arguments": {"at": "river"}}'
    grammar = json.dumps({"grammars": [{"lark_grammar": f"start: {json.dumps(f'Yes.<tool_call>{call}</tool_call>')}"}]})
    engine.add(Request(0, prompt, SamplingParams(max_tokens=80, grammar=grammar)))
    choice = Choice(asked, prompt, tokenizer)
    for output in engine.run():
        choice.take(output)
    (found,) = answer_object("story", "id", [choice])["choices"]
    assert found["message"]["content"] == "Yes."
    assert found["message"]["tool_calls"][0]["function"] == {"name": "find_fox", "arguments": '{"at": "river"}'}
    assert found["finish_reason"] == "tool_calls"


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
    with pytest.raises(UserError, match="tool_choice must be 'auto' or 'none' here, not 'required'"):
        read_body(CHAT, {"messages": messages, "tools": TOOLS, "tool_choice": "required"}, SamplingParams())
    with pytest.raises(UserError, match="tool_calls must be a list"):
        read_body(
            CHAT, {"messages": [{"role": "user", "tool_calls": [{"function": {"arguments": "{"}}]}]}, SamplingParams()
        )
    plain = open_tokenizer(Path(BUNDLED_MODEL), [4, 0], (), False)
    with pytest.raises(UserError, match="tools: this model's chat template has none"):
        asked.encode(plain, ChatFormat())
