"""Anything at all, sent to a server: no status 500, no hang, no rank that dies."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hippo_mpi.errors import DesyncError, UserError
from hippo_mpi.parallel.step_plan import StepPlan, decode, encode
from hippo_mpi.serving.api.openapi import openapi_object
from tests.servers import JSON, MODEL, Server, server

TIMEOUT_S = 30
QUIET = [
    HealthCheck.too_slow,
    HealthCheck.filter_too_much,
    HealthCheck.data_too_large,
    HealthCheck.function_scoped_fixture,
]
SCHEMA = schemathesis.openapi.from_dict(openapi_object([MODEL]))
POSTS = [
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/tokenize",
]


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    with server("--max-tokens", "4", "--max-batch-size", "4") as found:
        pids = found.rank_pids()
        yield found
        assert found.rank_pids() == pids, "a rank died of what was sent"
        assert found.client().completions.create(model=MODEL, prompt="A fox", max_tokens=3).choices[0].text


def post(running: Server, path: str, content: bytes, **headers: str) -> httpx.Response:
    answer = httpx.post(running.url + path, content=content, headers={**JSON, **headers}, timeout=TIMEOUT_S)
    assert answer.status_code in (200, 400, 401, 404, 405, 408, 413, 429), (path, content[:300], answer.text)
    if answer.status_code != 200:
        assert answer.json()["error"]["message"]
    return answer


def short(body: Any) -> Any:
    """The same request, but for an answer that doesn't take long."""
    if isinstance(body, dict):
        body = {
            **body,
            **{name: 3 for name in ("max_tokens", "max_completion_tokens", "max_output_tokens") if name in body},
        }
        if isinstance(body.get("n"), int) and body["n"] > 2:
            body["n"] = 2
    return body


@pytest.mark.slow
@pytest.mark.timeout(400)
@SCHEMA.parametrize()
@settings(max_examples=60, deadline=None, suppress_health_check=QUIET)
def test_whatever_the_schema_allows_or_not(case: Any, running: Server) -> None:
    """Bodies that fit the API's own description, and ones that don't."""
    if isinstance(case.body, dict):
        case.body = short(case.body)
    answer = case.call(base_url=running.url, timeout=TIMEOUT_S)
    assert answer.status_code < 500 or (answer.status_code == 503 and "ready" in case.path), answer.text
    if case.meta and case.meta.generation.mode.is_positive and case.body is not None and answer.status_code == 400:
        # What the description allows may still be too much for the model, or no schema that the grammar takes.
        assert answer.json()["error"]["message"]


FIELDS = [
    "model", "messages", "prompt", "input", "max_tokens", "stream", "stream_options", "n", "stop", "seed", "temperature",
    "top_p", "top_k", "min_p", "logit_bias", "logprobs", "top_logprobs", "tools", "tool_choice", "response_format",
    "thinking", "reasoning", "reasoning_effort", "text", "chat_template_kwargs", "parallel_tool_calls",
    "system", "stop_sequences", "instructions", "max_output_tokens", "presence_penalty", "repetition_penalty",
]  # fmt: skip
ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from([MODEL, "user", "text"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.text(max_size=8) | st.sampled_from(["role", "content", "type", "text", "function", "name"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
MESSAGES = st.just([{"role": "user", "content": "a fox"}])


@pytest.mark.slow
@given(
    path=st.sampled_from(POSTS),
    body=st.dictionaries(st.sampled_from(FIELDS), ANYTHING, max_size=6),
    messages=st.none() | MESSAGES,
)
@settings(max_examples=300, deadline=None, suppress_health_check=QUIET)
def test_bodies_of_anything(running: Server, path: str, body: dict[str, Any], messages: Any) -> None:
    if messages:
        body = {"max_tokens": 2, **body, "messages": messages}
    post(running, path, json.dumps(short(body)).encode())


@pytest.mark.slow
@given(path=st.sampled_from(POSTS), content=st.binary(max_size=200))
@settings(max_examples=60, deadline=None, suppress_health_check=QUIET)
def test_bodies_that_are_no_json(running: Server, path: str, content: bytes) -> None:
    post(running, path, content)


@pytest.mark.slow
@given(st.binary(min_size=1, max_size=300))
@settings(max_examples=60, deadline=None, suppress_health_check=QUIET)
def test_connections_that_are_no_http(running: Server, data: bytes) -> None:
    host, port = running.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=TIMEOUT_S) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        try:
            while connection.recv(4096):
                pass
        except ConnectionError:
            pass


@given(
    st.binary(max_size=80)
    | st.builds(
        lambda head, rest: struct.pack("<IBHHH", *head) + rest,
        st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 255), *[st.integers(0, 2**16 - 1)] * 3),
        st.binary(max_size=80),
    )
)
def test_steps_of_any_bytes(wire: bytes) -> None:
    """A step, or one clear error; what is read says the same when it is written."""
    try:
        plan = decode(wire)
    except DesyncError:
        return
    assert isinstance(plan, StepPlan) and decode(encode(plan)) == plan


@given(st.dictionaries(st.sampled_from(FIELDS), ANYTHING))
def test_bodies_are_read_or_refused(body: dict[str, Any]) -> None:
    from hippo_mpi.engine.request import SamplingParams
    from hippo_mpi.protocols.anthropic_messages import read_messages_body
    from hippo_mpi.protocols.openai_requests import CHAT, COMPLETION, read_body
    from hippo_mpi.protocols.openai_responses import read_responses_body

    for read in (
        lambda: read_body(CHAT, body, SamplingParams()),
        lambda: read_body(COMPLETION, body, SamplingParams()),
        lambda: read_messages_body(body, SamplingParams()),
        lambda: read_responses_body(body, SamplingParams()),
    ):
        try:
            read()
        except UserError as error:
            assert "\n" not in str(error)
