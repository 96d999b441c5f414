"""Bodies of every API: what is taken, what it means, and what is refused by which name."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest

from hippo_mpi.engine.grammar import json_grammar
from hippo_mpi.engine.request import SamplingParams
from hippo_mpi.errors import FieldError
from hippo_mpi.protocols.anthropic_messages import count_body, read_messages_body
from hippo_mpi.protocols.openai_requests import CHAT, COMPLETION, GenerationRequest, read_body, read_prompts
from hippo_mpi.protocols.openai_responses import RESPONSES, read_responses_body
from hippo_mpi.serving.api.questions import read_question

DEFAULTS = SamplingParams()
USER = {"role": "user", "content": "Where is the fox?"}
FUNCTION = {"name": "find_fox", "parameters": {"type": "object"}}
SCHEMA = {"type": "object", "properties": {"at": {"enum": ["river"]}}}


def chat(**fields: Any) -> GenerationRequest:
    return read_body(CHAT, {"messages": [USER], **fields}, DEFAULTS)


def completion(**fields: Any) -> GenerationRequest:
    return read_body(COMPLETION, {"prompt": "A fox", **fields}, DEFAULTS)


def responses(**fields: Any) -> GenerationRequest:
    return read_responses_body({"input": "Where?", **fields}, DEFAULTS)


def messages(**fields: Any) -> GenerationRequest:
    return read_messages_body({"messages": [USER], "max_tokens": 9, **fields}, DEFAULTS)


HINTS: dict[Any, dict[str, Any]] = {
    chat: {
        "user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "flex", "safety_identifier": "s",
        "prompt_cache_key": "k", "prompt_cache_retention": "24h", "verbosity": "low", "prediction": {"type": "content"},
        "modalities": ["text"], "functions": [], "function_call": "auto", "cache_prompt": True, "best_of": 1,
        "top_k": -1, "seed": -1, "stop": "", "min_tokens": 0, "ignore_eos": False, "skip_special_tokens": True,
        "use_beam_search": False, "top_logprobs": 0, "add_generation_prompt": True, "logit_bias": {}, "priority": 0,
        "response_format": {"type": "text"}, "parallel_tool_calls": True, "tools": [], "chat_template_kwargs": {},
        "continue_final_message": False, "add_special_tokens": False, "length_penalty": 1.0, "echo": False, "audio": None,
    },
    completion: {
        "user": "u", "suffix": "", "best_of": 1, "echo": False, "logprobs": False, "stop": ["", ""], "top_k": -1,
        "seed": -1, "add_special_tokens": True, "spaces_between_special_tokens": True, "n": 1,
    },
    responses: {
        "metadata": {}, "store": False, "prompt_cache_key": "k", "prompt_cache_retention": "24h", "top_logprobs": 0,
        "include": ["reasoning.encrypted_content", "web_search_call.action.sources"], "client_metadata": {"a": "b"},
        "text": {"verbosity": "low"}, "max_tool_calls": 3, "truncation": "auto", "background": False,
        "stream_options": {"include_obfuscation": False}, "previous_response_id": None,
        "reasoning": {"summary": "detailed", "generate_summary": None},
    },
    messages: {
        "metadata": {"user_id": "u"}, "service_tier": "auto", "thread": {"id": "t"}, "cache_control": {"type": "ephemeral"},
        "mcp_servers": [], "container": None, "inference_geo": "eu", "speed": "fast", "diagnostics": {"a": 1},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}, "output_config": {},
        "thinking": {"type": "adaptive"}, "tools": [], "tool_choice": {"type": "auto"}, "top_k": -1,
    },
}  # fmt: skip


@pytest.mark.parametrize(("read", "name"), [(read, name) for read, fields in HINTS.items() for name in fields])
def test_hints_and_neutral_values_change_nothing(read: Any, name: str) -> None:
    plain, hinted = read(), read(**{name: HINTS[read][name]})
    assert hinted == replace(plain, max_calls=hinted.max_calls)
    assert hinted.max_calls is None


@pytest.mark.parametrize(
    ("read", "fields", "field", "line"),
    [
        (chat, {"fox": 1}, "fox", "unknown field 'fox'"),
        (chat, {"echo": True}, "echo", "echo must be false here, not True"),
        (chat, {"modalities": ["text", "audio"]}, "modalities", 'modalities must be ["text"] here'),
        (chat, {"best_of": 2}, "best_of", "best_of must be 1 here, not 2"),
        (chat, {"use_beam_search": True}, "use_beam_search", "use_beam_search must be false here"),
        (chat, {"top_logprobs": 2}, "top_logprobs", "top_logprobs needs logprobs"),
        (chat, {"top_k": -2}, "top_k", "top_k must be a whole number from 0"),
        (chat, {"min_tokens": 3, "stop": "x"}, "min_tokens", "can't be combined with stop"),
        (chat, {"add_generation_prompt": False}, "add_generation_prompt", "the opposite of continue_final_message"),
        (chat, {"continue_final_message": True, "add_generation_prompt": False}, "continue_final_message", "needs an assistant message"),
        (chat, {"tools": [{"type": "custom"}]}, "tools", "tools must be a list"),
        (chat, {"tool_choice": "required"}, "tool_choice", "isn't in tools"),
        (chat, {"reasoning_effort": "huge"}, "reasoning_effort", "reasoning_effort must be one of none"),
        (completion, {"echo": True, "stop": ["x"]}, "stop", "stop can't be combined with echo"),
        (completion, {"suffix": "end"}, "suffix", 'suffix must be "" here'),
        (completion, {"prompt": ["a", [1]], "top_logprobs": 1}, "top_logprobs", "unknown field"),
        (completion, {"prompt": [[]]}, "prompt", "prompt must be a string, a list of tokens, or a list of such"),
        (completion, {"prompt": ["a", "b"]}, "prompt", "prompt must be a single prompt here, not a list of 2"),
        (responses, {"previous_response_id": "r"}, "previous_response_id", "previous_response_id must be null here"),
        (responses, {"max_output_tokens": 0}, "max_output_tokens", "max_output_tokens must be a whole number from 1"),
        (responses, {"include": ["message.output_text.logprobs"]}, "include", "include can't have"),
        (responses, {"text": {"format": {"type": "fairy"}}}, "text", "text must have the type"),
        (responses, {"input": []}, "input", "input must be a list of objects with role"),
        (messages, {"stop_sequences": ["x"] * 17}, "stop_sequences", "stop_sequences can have up to 16 strings"),
        (messages, {"max_tokens": None}, "max_tokens", "max_tokens: Field required"),
        (messages, {"output_config": {"fox": 1}}, "output_config", "output_config can only have effort and format"),
        (messages, {"tools": [{"type": "web_search_20250305"}]}, "tools", "server tools aren't supported"),
        (messages, {"mcp_servers": [{"url": "x"}]}, "mcp_servers", "mcp_servers must be [] here"),
    ],
)  # fmt: skip
def test_what_would_change_the_answer_is_refused_by_name(read: Any, fields: Any, field: str, line: str) -> None:
    with pytest.raises(FieldError) as refused:
        read(**fields)
    assert line in str(refused.value)
    assert refused.value.field == field


def test_prompts_are_asked_each_for_itself() -> None:
    for given, wanted in (("a", ["a"]), (["a"], ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])):  # fmt: skip
        found = read_prompts(COMPLETION, {"prompt": given, "max_tokens": 3}, DEFAULTS)
        assert [asked.prompt for asked in found] == wanted
        assert all(asked.sampling.max_tokens == 3 and asked.continues for asked in found)


def test_end_tokens_that_are_not_wanted() -> None:
    assert chat(min_tokens=5).sampling.min_tokens == 5
    assert completion(ignore_eos=True, max_tokens=7).sampling.min_tokens >= 7


def test_histories_that_others_take() -> None:
    call = {"id": "a", "type": "function", "function": {"name": "find_fox", "arguments": '{"at": '}}
    told = [
        USER,
        {"role": "assistant", "content": None},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
        {"role": "assistant", "content": None, "refusal": "Never."},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": None},
        {"role": "user", "content": ""},
    ]
    found = chat(messages=told).messages
    assert [message["content"] for message in found] == [USER["content"], "", "", "No.", "Never.", "", "", ""]
    for arguments, wanted in (('{"at": ', {"arguments": '{"at": '}), ("[1]", {"arguments": [1]}), ("", {}), ('{"a": 1}', {"a": 1})):  # fmt: skip
        call["function"]["arguments"] = arguments  # type: ignore[index]
        assert chat(messages=told).messages[5]["tool_calls"][0]["function"]["arguments"] == wanted


def test_claude_code_s_fields() -> None:
    """Instructions in the midst of a conversation, an effort, and a format that a grammar holds the answer to."""
    asked = messages(
        messages=[USER, {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}],
        system=[{"type": "text", "text": "You are", "cache_control": {"type": "ephemeral"}}],
        output_config={"effort": "high", "format": {"type": "json_schema", "schema": SCHEMA}},
    )
    assert [message["role"] for message in asked.messages] == ["system", "user", "system"]
    assert asked.template_args == {"reasoning_effort": "high"}
    assert asked.sampling.grammar == json_grammar(SCHEMA)
    assert messages(output_format={"type": "json_schema", "schema": SCHEMA}).sampling.grammar == json_grammar(SCHEMA)
    counted = count_body(
        {"messages": [USER], "output_config": {"effort": "low"}, "thinking": {"type": "adaptive"}}, DEFAULTS
    )
    assert counted.template_args == {"reasoning_effort": "low"}


def test_anthropic_s_roles_take_turns() -> None:
    said = [
        USER,
        {"role": "assistant", "content": "By"},
        {"role": "assistant", "content": [{"type": "text", "text": "it"}]},
    ]
    call = {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "x", "input": {}}]}
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": "so"}]}
    asked = messages(messages=[*said, USER, call, result, USER])
    assert [(message["role"], message["content"]) for message in asked.messages] == [
        ("user", USER["content"]), ("assistant", "By\n\nit"), ("user", USER["content"]), ("assistant", ""),
        ("tool", "so"), ("user", USER["content"]),
    ]  # fmt: skip


def test_a_message_that_is_begun() -> None:
    begun = {"role": "assistant", "content": "By the"}
    assert messages(messages=[USER, begun]).continues
    assert not messages(messages=[USER, begun, USER]).continues
    assert chat(messages=[USER, begun], continue_final_message=True, add_generation_prompt=False).continues
    assert not chat(messages=[USER, begun]).continues


def test_codex_s_tools(caplog: pytest.LogCaptureFixture) -> None:
    """Only functions can be called; the rest of what it offers is left out, and the log says so."""
    tools = [{"type": "function", **FUNCTION}, {"type": "namespace", "name": "x", "tools": []}, {"type": "fox_search"}]
    with caplog.at_level(logging.WARNING):
        asked = responses(tools=tools, tool_choice="auto", parallel_tool_calls=False)
    assert [tool["function"]["name"] for tool in asked.tools] == ["find_fox"]
    assert "ignoring tools of type 'fox_search'" in caplog.text
    with pytest.raises(FieldError, match="isn't in tools"):
        responses(tools=tools[1:], tool_choice="required")


def test_a_wanted_call_wins_over_a_format() -> None:
    text = {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}
    asked = responses(
        tools=[{"type": "function", **FUNCTION}], tool_choice={"type": "function", "name": "find_fox"}, text=text
    )
    assert asked.must_call


def test_what_a_schema_is_called() -> None:
    """A mistake in it is told by the name of the field that it stands in."""
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    given = {"type": "json_schema", "schema": SCHEMA}
    tools = [{"type": "function", "function": FUNCTION}]
    asked = {
        "response_format": chat(response_format=form),
        "output_config": messages(output_config={"format": given}),
        "text": responses(text={"format": {**given, "name": "x"}}),
    }
    for name, one in asked.items():
        assert one.grammars(one.sampling) == [(name, json_grammar(SCHEMA))]
    both = chat(response_format=form, tools=tools)
    assert [name for name, _ in both.grammars(replace(both.sampling, grammar="{}"))] == ["response_format", "tools"]
    must = chat(tools=tools, tool_choice="required")
    assert must.grammars(replace(must.sampling, grammar="{}")) == [("tools", "{}")]
    assert chat().grammars(DEFAULTS) == []


@pytest.mark.parametrize(
    "fields", [{"max_tokens": 2, "max_completion_tokens": 9}, {"max_completion_tokens": 9, "max_tokens": 2}]
)
def test_the_newer_limit_wins_wherever_it_stands(fields: Any) -> None:
    assert chat(**fields).sampling.max_tokens == 9


@pytest.mark.parametrize("temperature", [0, 1e-39, 1e-300])
def test_hardly_any_temperature_is_none(temperature: float) -> None:
    assert chat(temperature=temperature).sampling.temp == 0.0


def test_a_continued_answer_has_no_format() -> None:
    begun = [USER, {"role": "assistant", "content": '{"at": '}]
    with pytest.raises(FieldError, match="continuing") as caught:
        chat(messages=begun, continue_final_message=True, response_format={"type": "json_object"})
    assert caught.value.field == "response_format"


def test_parts_that_are_no_text_are_refused_whatever_else_they_hold() -> None:
    part = {"type": "image_url", "image_url": {"url": "data:"}, "text": "a fox"}
    with pytest.raises(FieldError, match="list of text parts"):
        chat(messages=[{"role": "user", "content": [part]}])


@pytest.mark.parametrize(
    ("fields", "can_keep", "why"),
    [
        ({"store": False}, True, "background responses must be stored, so store can't be false"),
        ({"store": True}, False, "background responses must be stored, and this server has no --journal"),
        ({}, False, "background responses must be stored, and this server has no --journal"),
    ],
)
def test_answers_in_the_background_are_stored(fields: dict[str, Any], can_keep: bool, why: str) -> None:
    with pytest.raises(FieldError) as caught:
        read_question(RESPONSES, {"input": "Where?", "background": True, **fields}, DEFAULTS, can_keep)
    assert str(caught.value) == why and caught.value.field == "background"


def test_a_field_s_name_can_always_be_told() -> None:
    with pytest.raises(FieldError) as caught:
        chat(**{"\ud800": 1})
    assert caught.value.field == "?"
