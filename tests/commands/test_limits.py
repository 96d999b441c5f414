"""What a server bears: many requests of one key, slow headers, pages of other origins, bodies that cost much."""

from __future__ import annotations

import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from hippo_mpi.serving.api.http_protocol import HEADERS_S
from tests.servers import GOES_ON, JSON, MODEL, Server, server

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    options = ("--requests-per-minute", "6", "--tokens-per-minute", "600", "--allow-origin", "http://here.example")
    with server(*options, env={"HIPPO_API_KEYS": "first,second,third,fourth"}) as found:
        yield found


def ask(running: Server, key: str, max_tokens: int = 2) -> None:
    running.client(key).completions.create(
        model=MODEL, prompt="A fox", max_tokens=max_tokens, temperature=2.0, logit_bias=GOES_ON
    )


@pytest.mark.slow
def test_each_key_has_its_own_rate(running: Server) -> None:
    for _ in range(6):
        ask(running, "first")
    with pytest.raises(openai.RateLimitError, match="rate limit of requests or tokens per minute") as refused:
        ask(running, "first")
    assert 1 <= int(refused.value.response.headers["retry-after"]) <= 10
    ask(running, "second")


def test_counting_tokens_counts(running: Server) -> None:
    for number in range(7):
        asked = {"messages": [{"role": "user", "content": "A fox"}]}
        path = ("/tokenize", "/v1/messages/count_tokens")[number % 2]
        answer = httpx.post(running.url + path, json=asked, headers={"x-api-key": "fourth"}, timeout=30)
        assert answer.status_code == (200 if number < 6 else 429), answer.text


@pytest.mark.slow
def test_tokens_count_too(running: Server) -> None:
    ask(running, "third", 1000)
    with pytest.raises(openai.RateLimitError) as refused:
        ask(running, "third")
    assert 5 <= int(refused.value.response.headers["retry-after"]) <= 60


def test_origins(running: Server) -> None:
    def allowed(origin: str) -> str | None:
        request = urllib.request.Request(f"{running.url}/v1/chat/completions", method="OPTIONS")
        for name, value in (("Origin", origin), ("Access-Control-Request-Method", "POST")):
            request.add_header(name, value)
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return str(answer.headers["access-control-allow-origin"])
        except urllib.error.HTTPError:
            return None

    assert allowed("http://here.example") == "http://here.example"
    assert allowed("http://elsewhere.example") is None


@pytest.mark.slow
def test_headers_that_never_end(running: Server) -> None:
    """Connections that dribble are closed, the first request on them or a later one; others are served meanwhile."""
    host, port = running.url.removeprefix("http://").split(":")
    whole = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"

    def ends_after(first: bytes) -> float:
        with socket.create_connection((host, int(port))) as slow:
            slow.settimeout(30)
            if first:
                slow.sendall(first)
                assert b"200 OK" in slow.recv(4096)
            began = time.monotonic()
            dribbling = threading.Event()

            def dribble() -> None:
                for byte in b"GET /health HTTP/1.1\r\nX-Slow: " + b"a" * 100:
                    if dribbling.wait(0.5):
                        return
                    try:
                        slow.sendall(bytes([byte]))
                    except OSError:
                        return

            thread = threading.Thread(target=dribble)
            thread.start()
            try:
                while slow.recv(4096):
                    pass
            except ConnectionError:
                pass
            finally:
                dribbling.set()
                thread.join()
            return time.monotonic() - began

    took: list[float] = []
    threads = [threading.Thread(target=lambda f=first: took.append(ends_after(f))) for first in (b"", whole)]
    for thread in threads:
        thread.start()
    assert running.get("/health") == {"status": "ok"}
    for thread in threads:
        thread.join()
    assert len(took) == 2
    assert all(HEADERS_S - 1 < one < HEADERS_S + 5 for one in took), took


@pytest.mark.slow
def test_huge_headers(running: Server) -> None:
    request = urllib.request.Request(f"{running.url}/health", headers={"X-Long": "a" * (1 << 20)})
    with pytest.raises((urllib.error.HTTPError, urllib.error.URLError, ConnectionError)):
        urllib.request.urlopen(request, timeout=10)
    assert running.get("/health") == {"status": "ok"}


@pytest.fixture(scope="module")
def small() -> Iterator[Server]:
    with server("--ranks", "1", "--max-schema-bytes", "1M", "--max-choices", "3", "--max-body-bytes", "600K") as found:
        yield found


FOR_EVER = {"type": "string", "allOf": [{"pattern": f"(a|b|[c-z])*x.{{{i}}}y{i}.*"} for i in range(17)]}
"""llguidance compiles it for many minutes."""
SCHEMA_OF = {
    "/v1/chat/completions": (
        "response_format",
        {"type": "json_schema", "json_schema": {"name": "x", "schema": FOR_EVER}},
    ),
    "/v1/messages": ("output_config", {"format": {"type": "json_schema", "schema": FOR_EVER}}),
    "/v1/responses": ("text", {"format": {"type": "json_schema", "name": "x", "schema": FOR_EVER}}),
}


def refusal(running: Server, path: str, body: dict[str, Any], param: str | None = None) -> str:
    """What a body gets with status 400, of the field `param` if that is given."""
    request = urllib.request.Request(running.url + path, json.dumps(body).encode(), JSON)
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=60)
    assert refused.value.code == 400
    error = json.loads(refused.value.read())["error"]
    assert param in (None, error.get("param"))
    return str(error["message"])


@pytest.mark.slow
def test_schemas_that_take_too_long(small: Server) -> None:
    """A field of each API, whole or streamed: others go on meanwhile, and the next time it is refused at once."""
    slowest_s, over, messages = 0.0, threading.Event(), [{"role": "user", "content": "A fox?"}]

    def look() -> None:
        nonlocal slowest_s
        while not over.wait(0.1):
            began_s = time.monotonic()
            small.get("/health")
            slowest_s = max(slowest_s, time.monotonic() - began_s)

    looking = threading.Thread(target=look)
    looking.start()
    try:
        for path, (field, value) in SCHEMA_OF.items():
            asked = {"input": "A fox?"} if path.endswith("responses") else {"messages": messages, "max_tokens": 3}
            for is_stream in (False, True):
                why = refusal(small, path, {**asked, field: value, "stream": is_stream})
                assert why == f"{field}: compiling the schema takes longer than 5 s: simplify it"
        properties = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(3000)}}
        held = {"type": "json_schema", "json_schema": {"name": "x", "schema": properties}}
        asked = {"messages": messages, "n": 3, "max_tokens": 9, "response_format": held}
        with ThreadPoolExecutor(1) as pool:  # seconds, and then too complex for llguidance after the first token
            large = pool.submit(refusal, small, "/v1/chat/completions", asked)
            while not large.done():
                small.client().completions.create(model=MODEL, prompt="A fox", max_tokens=3)
        assert "can no longer follow its schema: Parser Error: Current row has" in large.result()
    finally:
        over.set()
        looking.join()
    assert slowest_s < 3  # on a busy machine


def test_limits_of_a_body(small: Server) -> None:
    assert refusal(small, "/v1/completions", {"prompt": ["a", "b"], "n": 2}, "prompt") == (
        "n times the number of prompts is at most 3 (--max-choices), not 4"
    )
    messages = [{"role": "user", "content": "A fox?"}]
    for path, asked in (("/v1/completions", {"prompt": "a"}), ("/v1/chat/completions", {"messages": messages})):
        assert refusal(small, path, {**asked, "n": 4}, "n") == "n is at most 3 (--max-choices), not 4"
    request = urllib.request.Request(
        f"{small.url}/v1/completions", json.dumps({"prompt": "a" * 700_000}).encode(), JSON
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=60)
    assert refused.value.code == 413
