"""The line that a request leaves in the log, whatever a client puts into it and however the application ends."""

from __future__ import annotations

import asyncio
import logging

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from hippo_mpi.engine.request import Request as EngineRequest
from hippo_mpi.engine.request import SamplingParams, Timings
from hippo_mpi.serving.api.access import Access, AccessRules
from hippo_mpi.serving.api.request_log import Answered, RequestLog
from hippo_mpi.serving.supervision.answer import Answer

KEY_ID = "2c70e12b7a0646f9"  # the beginning of the SHA-256 of "key"


def line_of(app: Starlette, caplog: pytest.LogCaptureFixture, path: str, **headers: str) -> tuple[str, str]:
    """Return (level, line) of one request."""

    async def ask() -> None:
        transport = httpx.ASGITransport(
            RequestLog(app, Access(AccessRules()).key_of),
            raise_app_exceptions=False,
        )
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            await client.get(path, headers=headers)

    caplog.clear()
    with caplog.at_level(logging.DEBUG, "hippo_mpi"):
        asyncio.run(ask())
    (record,) = [record for record in caplog.records if record.name.startswith("hippo_mpi")]
    return record.levelname, record.getMessage()


def answer(timings: Timings, outcome: str) -> Answer:
    return Answer(EngineRequest(0, [1, 2], SamplingParams()), timings, "m", outcome=outcome)


def application() -> Starlette:
    async def echo(request: Request) -> Response:
        return Response(headers={"x-request-id": request.headers["x-request-id"]})

    async def fail(request: Request) -> Response:
        raise ValueError("a text of somebody")

    async def answer_twice(request: Request) -> Response:
        first = Timings(0.0, 1.0, 3.0, prompt_tokens=2, cached_tokens=1, token_ids=[5] * 5)
        other = Timings(0.0, 2.0, 5.0, prompt_tokens=2, token_ids=[5] * 5)
        outcome = "error: said 'a text of somebody'" if "error" in request.query_params else "length"
        request.state.answered = Answered("cmpl-1", "m", [answer(first, "stop"), answer(other, outcome)])
        return Response(headers={"x-request-id": "r1"})

    routes = [Route("/echo", echo), Route("/fail", fail), Route("/answer", answer_twice), Route("/ready", echo)]
    return Starlette(routes=routes)


def test_what_a_client_may_put_into_a_line(caplog: pytest.LogCaptureFixture) -> None:
    level, line = line_of(application(), caplog, "/echo", **{"x-request-id": 'a b", key x', "x-api-key": "key"})
    assert level == "INFO"
    assert line.startswith("GET /echo 200, total 0.0") and line.endswith(f' s, id a?b"??key?x, key {KEY_ID}')
    _, line = line_of(application(), caplog, "/no%0a2026-11-25?key=secret")
    assert line.startswith("GET /no%0a2026-11-25 404, total ") and "secret" not in line


def test_what_is_polled_and_what_fails(caplog: pytest.LogCaptureFixture) -> None:
    assert line_of(application(), caplog, "/ready", **{"x-request-id": "a"})[0] == "DEBUG"
    level, line = line_of(application(), caplog, "/fail")
    assert level == "WARNING" and line.startswith("GET /fail 500, total ") and "somebody" not in line


def test_several_answers_of_one_request(caplog: pytest.LogCaptureFixture) -> None:
    level, line = line_of(application(), caplog, "/answer")
    assert level == "INFO" and line.endswith(", id r1/cmpl-1")
    assert ", m, prompt 2 tokens (1 cached), answer 10 tokens, stop/length, first token -" in line  # of another clock
    assert ", 2.0 tok/s, " in line
    level, line = line_of(application(), caplog, "/answer?error=1")
    assert level == "WARNING" and ", answer 10 tokens, error, " in line and "somebody" not in line
