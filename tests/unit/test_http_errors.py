"""What went wrong, in the shape of each API, with the request's name in the headers."""

from __future__ import annotations

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.testclient import TestClient

from hippo_mpi.errors import ContextError, FieldError, RankError
from hippo_mpi.serving.api.http_errors import HANDLERS
from hippo_mpi.serving.api.request_ids import RequestIds

CHAT, MESSAGES = "/v1/chat/completions", "/v1/messages"


def client_of(error: Exception) -> TestClient:
    """A client of endpoints that fail so."""

    async def fail(_: Request) -> Response:
        raise error

    app = Starlette(routes=[Route(CHAT, fail), Route(MESSAGES, fail)], exception_handlers=HANDLERS)
    app.add_middleware(RequestIds)
    return TestClient(app, raise_server_exceptions=False)


@pytest.mark.parametrize(
    ("error", "status", "code", "param"),
    [
        (FieldError("top_k", "top_k must be less"), 400, None, "top_k"),
        (ContextError(5000, 2048), 400, "context_length_exceeded", "messages"),
        (RankError("the ranks are gone"), 503, None, None),
        (ZeroDivisionError("oh"), 500, None, None),
    ],
)
def test_errors_in_openai_s_shape(error: Exception, status: int, code: str | None, param: str | None) -> None:
    answer = client_of(error).get(CHAT)
    found = answer.json()["error"]
    assert (answer.status_code, found["code"], found["param"]) == (status, code, param)
    assert answer.headers["x-request-id"] == answer.headers["request-id"]
    assert found["message"] != "oh"


def test_errors_in_anthropic_s_shape() -> None:
    answer = client_of(ContextError(5000, 2048)).get(MESSAGES)
    assert answer.json()["error"]["message"].startswith("prompt is too long: 5000 tokens > 2048 maximum")
    assert client_of(ZeroDivisionError()).get(MESSAGES).json()["error"]["type"] == "api_error"
    assert (
        client_of(ZeroDivisionError()).get("/messages").json()["error"]["message"].endswith(f"did you mean {MESSAGES}?")
    )
    lost = client_of(ZeroDivisionError()).get("/fox", headers={"anthropic-version": "2023-06-01"})
    assert lost.json()["error"]["type"] == "not_found_error"
