"""Bodies as clients send them, in miniature: what was written down in front of each, against one server.

The clients themselves are in tests/clients.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from hippo_mpi.config.bundled import BUNDLED_MODEL
from tests.commands.test_tools import TEMPLATE
from tests.servers import GOES_ON, Server, server

pytestmark = pytest.mark.slow

NAME = "story-tools"
TIMEOUT_S = 60
USER = {"role": "user", "content": "Where is the fox?"}
SCHEMA = {
    "type": "object", "properties": {"at": {"enum": ["river", "wood"]}}, "required": ["at"], "additionalProperties": False,
}  # fmt: skip
CHAT, COMPLETION, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses"
ANTHROPIC = {"anthropic-version": "2023-06-01", "anthropic-beta": "claude-code-20250219"}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("clients") / NAME
    shutil.copytree(BUNDLED_MODEL, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    with server("--model", str(folder), "--max-tokens", "40") as found:
        yield found


def post(running: Server, path: str, body: dict[str, Any], **headers: str) -> httpx.Response:
    return httpx.post(running.url + path, json=body, headers=headers, timeout=TIMEOUT_S)


def events(answer: httpx.Response) -> list[Any]:
    """The JSON of a stream's events."""
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


CLAUDE_CODE: dict[str, Any] = {
    "model": NAME, "max_tokens": 8, "stream": True, "temperature": 1, "metadata": {"user_id": "user_1"},
    "system": [
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=2"},
        {"type": "text", "text": "You are Claude Code.", "cache_control": {"type": "ephemeral"}},
    ],
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "Say hello.", "cache_control": {"type": "ephemeral"}}]},
        {"role": "system", "content": "The date is today."},
    ],
    "tools": [{"name": "Bash", "description": "Runs.", "input_schema": {"type": "object", "properties": {}}}],
    "thinking": {"type": "adaptive"},
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    "output_config": {"effort": "high"},
}  # fmt: skip
CODEX: dict[str, Any] = {
    "model": NAME, "instructions": "You are Codex.", "stream": True, "store": False, "parallel_tool_calls": True,
    "input": [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "<permissions>"}]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Say hello."}]},
    ],
    "tools": [
        {"type": "function", "name": "shell", "strict": False, "parameters": {"type": "object", "properties": {}}},
        {"type": "namespace", "name": "agents", "description": "", "tools": []},
        {"type": "web_search", "external_web_access": False},
    ],
    "tool_choice": "auto", "include": ["reasoning.encrypted_content"], "prompt_cache_key": "k",
    "client_metadata": {"x-codex-installation-id": "i"}, "reasoning": {"effort": "medium", "summary": "auto"},
    "text": {"verbosity": "low"},
}  # fmt: skip
BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Claude Code": (f"{MESSAGES}?beta=true", CLAUDE_CODE),
    "Anthropic's tool runner": (MESSAGES, {"max_tokens": 4, "messages": [USER], "thread": {"id": "t"}, "container": None}),
    "Codex CLI": (RESPONSES, CODEX),
    "LangChain's OpenAI": (COMPLETION, {"prompt": ["Once"], "max_tokens": 4, "n": 1, "best_of": 1, "logit_bias": {}}),
    "lm-eval": (COMPLETION, {"prompt": [[667, 262]], "max_tokens": 4, "temperature": 0, "stop": ["\n\n", ""], "seed": 1234}),
    "lm-eval, loglikelihood": (COMPLETION, {
        "prompt": [[667, 262]], "max_tokens": 1, "temperature": 0, "logprobs": 1, "seed": 1234, "echo": True,
    }),
    "guidellm": (CHAT, {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "A fox"}]}], "stream": True, "stop": None,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True}, "ignore_eos": True,
        "max_completion_tokens": 4, "max_tokens": 4,
    }),
    "openai-agents": (RESPONSES, {
        "input": [USER], "max_output_tokens": 4, "prompt_cache_retention": "24h", "text": {"verbosity": "medium"},
        "include": [], "reasoning": {"effort": "low", "summary": "detailed"}, "truncation": "auto",
    }),
    "litellm's bridge to responses": (RESPONSES, {
        "input": [USER], "max_output_tokens": 4, "include": ["reasoning.encrypted_content"],
    }),
    "litellm's bridge to chat": (CHAT, {"messages": [USER], "max_tokens": 4, "reasoning_effort": "medium"}),
    "pydantic-ai": (CHAT, {"messages": [USER], "max_completion_tokens": 4, "prompt_cache_key": "k", "verbosity": "low"}),
    "llm and older ones": (CHAT, {"messages": [USER], "max_tokens": 4, "functions": [], "function_call": "auto"}),
    "vLLM's own": (COMPLETION, {
        "prompt": "A fox", "max_tokens": 4, "min_tokens": 2, "top_k": -1, "seed": -1, "skip_special_tokens": True,
        "use_beam_search": False, "add_special_tokens": True, "stop": "", "ignore_eos": False,
    }),
}  # fmt: skip


@pytest.mark.parametrize("client", BODIES)
def test_it_is_answered(running: Server, client: str) -> None:
    path, body = BODIES[client]
    if path == RESPONSES and "max_output_tokens" not in body:
        body = {**body, "max_output_tokens": 4}
    answer = post(running, path, body, **(ANTHROPIC if path.startswith(MESSAGES) else {}))
    assert answer.status_code == 200, answer.text
    kinds = [event.get("type") for event in events(answer)]
    if path.startswith(MESSAGES) and body.get("stream"):
        assert kinds[0] == "message_start" and kinds[-1] == "message_stop"
    elif path == RESPONSES and body.get("stream"):
        assert kinds[0] == "response.created" and kinds[-1] in ("response.completed", "response.incomplete")


def test_lists_of_prompts(running: Server) -> None:
    """Choices are counted through, each prompt's together; a prompt's answer is the one that it gets alone."""
    prompts = ["There was once a", "A fox"]
    alone = [post(running, COMPLETION, {"prompt": one, "max_tokens": 5}).json() for one in prompts]
    whole = post(running, COMPLETION, {"prompt": prompts, "max_tokens": 5, "n": 2, "best_of": 2}).json()
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2, 3]
    assert [choice["text"] for choice in whole["choices"]] == [a["choices"][0]["text"] for a in alone for _ in range(2)]
    assert whole["usage"]["prompt_tokens"] == sum(one["usage"]["prompt_tokens"] for one in alone)
    assert whole["usage"]["completion_tokens"] == 20
    streamed = ["", "", "", ""]
    for chunk in events(post(running, COMPLETION, {"prompt": prompts, "max_tokens": 5, "n": 2, "stream": True})):
        streamed[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert streamed == [choice["text"] for choice in whole["choices"]]
    refused = post(running, COMPLETION, {"prompt": ["a"] * 129})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "prompt"


def test_a_completion_begins_with_its_space(running: Server) -> None:
    """Prompt and text are one, whole or streamed; and a stop word is looked for in it as it is."""
    asked = {"prompt": "There was once a", "max_tokens": 5, "logprobs": 1}
    choice = post(running, COMPLETION, asked).json()["choices"][0]
    assert choice["text"].startswith(" ") and choice["text"] == "".join(choice["logprobs"]["tokens"])
    chunks = [event["choices"][0] for event in events(post(running, COMPLETION, {**asked, "stream": True}))]
    assert "".join(chunk["text"] for chunk in chunks) == choice["text"]
    offsets = [at for chunk in chunks if chunk["logprobs"] for at in chunk["logprobs"]["text_offset"]]
    assert offsets == choice["logprobs"]["text_offset"] and len(set(offsets)) == 5
    word = choice["text"].split()[1]
    stopped = post(running, COMPLETION, {**asked, "stop": [word]}).json()["choices"][0]
    assert stopped["text"] == choice["text"][: choice["text"].index(word)]


def test_how_likely_a_prompt_is(running: Server) -> None:
    """lm-eval's loglikelihood: the prompt comes back, each of its tokens with what the model would have said."""
    asked = {"temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    whole = post(running, COMPLETION, {"prompt": "There was once a", "max_tokens": 4, "logprobs": 1}).json()["choices"][
        0
    ]
    tokens = post(running, "/tokenize", {"prompt": "There was once a" + whole["text"]}).json()["tokens"]
    found = post(running, COMPLETION, {**asked, "prompt": [tokens, tokens[:3]]}).json()
    told, short = (choice["logprobs"] for choice in found["choices"])
    assert found["choices"][0]["text"].startswith("There was once a" + whole["text"])
    assert len(told["token_logprobs"]) == len(tokens) + 1 and len(short["tokens"]) == 4
    assert told["token_logprobs"][0] is None and told["top_logprobs"][0] is None
    assert told["token_logprobs"][-5:-1] == pytest.approx(whole["logprobs"]["token_logprobs"], abs=0.1)
    assert told["top_logprobs"][-5:-1] == [
        {t: v} for t, v in zip(told["tokens"][-5:-1], told["token_logprobs"][-5:-1], strict=True)
    ]
    assert found["usage"]["prompt_tokens"] == len(tokens) + 3 and found["usage"]["completion_tokens"] == 2
    only = post(running, COMPLETION, {**asked, "prompt": "A fox", "max_tokens": 0}).json()
    assert only["choices"][0]["text"] == "A fox" and only["usage"]["completion_tokens"] == 0
    assert post(running, COMPLETION, {**asked, "prompt": "A fox", "stream": True}).json()["error"]["param"] == "echo"


def test_what_load_generators_want(running: Server) -> None:
    """As many tokens as they say, although the model would rather end; and usage in every chunk."""
    ends = {token: 100 for token in GOES_ON}
    body = {
        "messages": [USER], "max_tokens": 9, "logit_bias": ends, "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }  # fmt: skip
    for fields, count in (({}, 1), ({"min_tokens": 4}, 5), ({"ignore_eos": True}, 9)):
        *chunks, last = events(post(running, CHAT, {**body, **fields}))
        assert last["usage"]["completion_tokens"] == count and last["choices"] == []
        assert [chunk["usage"]["completion_tokens"] for chunk in chunks if chunk["usage"]] == list(range(1, count + 1))
        assert len({chunk["created"] for chunk in [*chunks, last]}) == 1


def test_a_conversation_that_is_too_long(running: Server) -> None:
    """Clients that know these words make room and go on."""
    text = "fox " * 3000
    for path, body, field in (
        (CHAT, {"messages": [{"role": "user", "content": text}]}, "messages"),
        (COMPLETION, {"prompt": text}, "prompt"),
        (RESPONSES, {"input": text}, "input"),
    ):
        answer = post(running, path, body)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", field)
        assert "this model's maximum context length is 2048 tokens" in error["message"]
    answer = post(running, MESSAGES, {"max_tokens": 4, "messages": [{"role": "user", "content": text}]})
    assert answer.json()["error"]["message"].startswith("prompt is too long: ")
    assert "tokens > 2048 maximum" in answer.json()["error"]["message"]
    refused = post(running, CHAT, {"messages": [USER], "temperature": "hot"}).json()["error"]
    assert refused["param"] == "temperature"


def test_anthropic_s_formats_and_beginnings(running: Server) -> None:
    form = {"type": "json_schema", "schema": SCHEMA}
    for fields in ({"output_config": {"format": form, "effort": "low"}}, {"output_format": form}):
        found = post(running, MESSAGES, {"max_tokens": 40, "messages": [USER], **fields}).json()
        assert json.loads(found["content"][0]["text"])["at"] in ("river", "wood")
    begun = {"role": "assistant", "content": "There was once a"}
    plain = post(running, "/tokenize", {"messages": [USER, begun]}).json()["count"]
    asked = {"messages": [USER, begun], "continue_final_message": True, "add_generation_prompt": False}
    assert post(running, "/tokenize", asked).json()["count"] < plain
    counted = post(running, f"{MESSAGES}/count_tokens", {"messages": [USER, begun]}).json()["input_tokens"]
    assert counted == post(running, "/tokenize", asked).json()["count"]
    goes_on = post(running, MESSAGES, {"max_tokens": 4, "messages": [USER, begun]}).json()["content"][0]["text"]
    assert goes_on == post(running, CHAT, {**asked, "max_tokens": 4}).json()["choices"][0]["message"]["content"]
    assert goes_on.startswith(" ")


def test_what_is_tokenized(running: Server) -> None:
    plain = post(running, "/tokenize", {"messages": [USER]}).json()["count"]
    tools = [{"type": "function", "function": {"name": "find_fox", "parameters": SCHEMA}}]
    assert post(running, "/tokenize", {"messages": [USER], "tools": tools}).json()["count"] > plain
    developer = {"role": "developer", "content": "You tell of hens."}
    system = {**developer, "role": "system"}
    both = [
        post(running, "/tokenize", {"messages": [message, USER]}).json()["tokens"] for message in (developer, system)
    ]
    assert both[0] == both[1]
    assert post(running, "/tokenize", {"prompt": "A fox", "add_special_tokens": False}).json()["count"]
    assert post(running, "/tokenize", {"prompt": "A fox", "fox": 1}).status_code == 400


def test_who_asks_where_and_with_which_name(running: Server) -> None:
    hello = httpx.get(running.url, timeout=TIMEOUT_S)
    assert hello.json()["name"] == "Hippo MPI" and hello.json()["openapi"] == "/openapi.json"
    (model,) = httpx.get(f"{running.url}/v1/models", timeout=TIMEOUT_S).json()["data"]
    assert model["max_model_len"] == 2048 and model["created"] > 1.7e9
    for path, meant in (
        ("/chat/completions", CHAT),
        ("/v1/v1/messages", MESSAGES),
        ("/models", "/v1/models"),
        ("/fox", "GET / describes"),
    ):
        lost = post(running, path, {})
        assert lost.status_code == 404 and meant in lost.json()["error"]["message"]
    names = set()
    for answer in (
        hello,
        lost,
        post(running, CHAT, {}),
        post(running, CHAT, {"messages": [USER], "max_tokens": 2, "stream": True}),
    ):
        assert answer.headers["x-request-id"] == answer.headers["request-id"]
        names.add(answer.headers["x-request-id"])
    assert len(names) == 4
    whole = post(running, MESSAGES, {"messages": [USER], "max_tokens": 2})
    assert whole.json()["id"].removeprefix("msg_") == whole.headers["request-id"].removeprefix("req_")


def test_a_held_back_call_sends_no_empty_chunks(running: Server) -> None:
    tools = [{"type": "function", "function": {"name": "find_fox", "parameters": SCHEMA}}]
    body = {"messages": [USER], "tools": tools, "tool_choice": "required", "stream": True, "max_tokens": 80}
    deltas = [chunk["choices"][0]["delta"] for chunk in events(post(running, CHAT, body))]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert [delta for delta in deltas[1:-1] if not delta] == []
    assert any("tool_calls" in delta for delta in deltas)


@pytest.mark.slow
def test_keys_in_every_client_s_header() -> None:
    with server("--ranks", "1", env={"HIPPO_API_KEYS": "ours"}) as found:
        for headers, status in (
            ({"authorization": "Bearer ours"}, 200),
            ({"authorization": "bearer ours"}, 200),
            ({"x-api-key": "ours"}, 200),
            ({"api-key": "ours"}, 200),
            ({"x-api-key": "theirs", "authorization": "Bearer ours"}, 200),
            ({"x-api-key": "theirs", "authorization": "Bearer theirs"}, 401),
            ({}, 401),
        ):
            answer = httpx.get(f"{found.url}/v1/models", headers=headers, timeout=TIMEOUT_S)
            assert answer.status_code == status, headers
            assert answer.headers["x-request-id"]
