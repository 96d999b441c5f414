"""Tools over the API, as each client sees them. The bundled model knows none: a grammar makes it call them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest

from hippo_mpi.config.bundled import BUNDLED_MODEL
from tests.servers import Server, server

NAME = "story-tools"
TEMPLATE = """{% if tools %}<|system|>
<tool_call>{{ tools | tojson }}</tool_call>
{% endif %}{% for message in messages %}<|{{ message.role }}|>
{{ message.content }}{% for tool_call in message.tool_calls or [] %}<tool_call>{{ tool_call.name }}{% endfor %}<|end|>
{% endfor %}<|assistant|>
"""
PLACES = ["river", "wood"]
SCHEMA = {
    "type": "object", "properties": {"at": {"enum": PLACES}}, "required": ["at"], "additionalProperties": False,
}  # fmt: skip
QUESTION = {"role": "user", "content": "Where is the fox?"}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("tools") / NAME
    shutil.copytree(BUNDLED_MODEL, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    with server("--model", str(folder), "--max-tokens", "80") as found:
        yield found


@pytest.mark.slow
def test_chat_completions(running: Server) -> None:
    client, tool = running.client(), {"name": "find_fox", "parameters": SCHEMA}
    asked: Any = {
        "model": NAME, "tools": [{"type": "function", "function": tool}], "tool_choice": "required",
        "messages": [QUESTION],
    }  # fmt: skip
    choice = client.chat.completions.create(**asked).choices[0]
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls or []
    assert call.function.name == "find_fox" and json.loads(call.function.arguments)["at"] in PLACES
    with client.chat.completions.stream(**asked) as stream:
        (streamed,) = stream.get_final_completion().choices[0].message.tool_calls or []
    assert (streamed.function.name, streamed.function.arguments) == ("find_fox", call.function.arguments)
    result = {"role": "tool", "tool_call_id": call.id, "content": "by the river"}
    asked |= {"messages": [QUESTION, choice.message.model_dump(exclude_none=True), result], "tool_choice": "auto"}
    assert client.chat.completions.create(**asked).choices[0].message.content
    with pytest.raises(openai.BadRequestError, match="isn't in tools"):
        client.chat.completions.create(**{**asked, "tool_choice": {"type": "function", "function": {"name": "x"}}})
    effort: Any = {"model": NAME, "messages": asked["messages"], "reasoning_effort": "low"}
    assert client.chat.completions.create(**effort).choices[0].message.content  # it doesn't think, whatever is asked


@pytest.mark.slow
def test_messages(running: Server) -> None:
    client = anthropic.Anthropic(base_url=running.url, api_key="none", max_retries=0)
    asked: Any = {
        "model": NAME, "max_tokens": 80, "tool_choice": {"type": "any"}, "messages": [QUESTION],
        "tools": [{"name": "find_fox", "description": "Finds it.", "input_schema": SCHEMA}],
        "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
        "thinking": {"type": "disabled"},
    }  # fmt: skip
    whole = client.messages.create(**asked)
    assert whole.stop_reason == "tool_use"
    (block,) = whole.content
    assert block.type == "tool_use" and block.name == "find_fox"
    assert dict(block.input)["at"] in PLACES  # type: ignore[call-overload]
    with client.messages.stream(**asked) as stream:
        (streamed,) = stream.get_final_message().content
    assert streamed.type == "tool_use" and streamed.input == block.input
    result = {"type": "tool_result", "tool_use_id": block.id, "content": [{"type": "text", "text": "by the river"}]}
    said: Any = {"role": "assistant", "content": [block.model_dump(exclude_none=True)]}
    asked |= {"messages": [QUESTION, said, {"role": "user", "content": [result]}], "tool_choice": {"type": "none"}}
    (block,) = client.messages.create(**asked).content
    assert block.type == "text" and block.text
    counted = client.messages.count_tokens(model=NAME, messages=[{"role": "user", "content": "a fox"}])
    assert counted.input_tokens > 2
    thoughtful = {**asked, "thinking": {"type": "enabled", "budget_tokens": 10}}
    assert client.messages.create(**thoughtful).content == [block]


@pytest.mark.slow
def test_responses(running: Server) -> None:
    client = running.client()
    asked: Any = {
        "model": NAME, "input": [QUESTION], "parallel_tool_calls": False,
        "tools": [{"type": "function", "name": "find_fox", "parameters": SCHEMA, "strict": True}],
        "tool_choice": {"type": "function", "name": "find_fox"},
    }  # fmt: skip
    (call,) = client.responses.create(**asked).output
    assert call.type == "function_call" and call.name == "find_fox" and json.loads(call.arguments)["at"] in PLACES
    with client.responses.stream(**asked) as stream:
        (streamed,) = stream.get_final_response().output
    assert streamed.type == "function_call" and streamed.arguments == call.arguments
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "by the river"}
    asked |= {"input": [QUESTION, call.model_dump(exclude_none=True), result], "tool_choice": "auto"}
    assert client.responses.create(**asked).output_text
    form = {"type": "json_schema", "name": "place", "schema": SCHEMA}
    answer = client.responses.create(model=NAME, input="Where?", text={"format": form})  # type: ignore[call-overload]
    assert json.loads(answer.output_text)["at"] in PLACES
