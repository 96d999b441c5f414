"""Who may ask: pages of other origins, other keys' prompts, clients that hide that they have gone; on real servers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.servers import GOES_ON, MODEL, Server, server

pytestmark = pytest.mark.slow

COMPLETION, JSON = "/v1/completions", "application/json"
WORDS = [
    "fox",
    "hen",
    "bear",
    "cow",
    "dog",
    "cat",
    "river",
    "barn",
    "mill",
    "red",
    "old",
    "lantern",
    "apple",
    "snow",
    "owl",
    "night",
    "hill",
    "tree",
    "song",
    "boat",
]
SECRET = " ".join(WORDS[(7 * i + i * i) % 20] for i in range(80))


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    admins = tmp_path_factory.mktemp("keys") / "admins"
    admins.write_text("# who may change the model\nroot\n")
    options = ("--ranks", "1", "--allow-origin", "http://here.example", "--max-queue", "0", "--max-batch-size", "8")
    options += ("--journal", str(admins.parent / "journal"), "--admin-key-file", str(admins))
    with server(*options, env={"HIPPO_API_KEYS": "alice,mallory"}) as found:
        yield found


def post(running: Server, path: str = COMPLETION, **headers: str) -> httpx.Response:
    asked = json.dumps({"prompt": "A fox", "max_tokens": 1}).encode()
    given = {"Content-Type": JSON, "Authorization": "Bearer alice"} | {
        k.replace("_", "-"): v for k, v in headers.items()
    }
    return httpx.post(running.url + path, content=asked, headers=given, timeout=60)


def test_pages_of_other_origins(running: Server) -> None:
    """They are refused whether or not the browser asks first; and a name that was rebound to this address isn't ours."""
    for origin in ("http://evil.example", "null", "http://here.example.evil.example", "https://127.0.0.1.evil.example"):
        refused = post(running, Origin=origin)
        assert refused.status_code == 403 and "--allow-origin" in refused.json()["error"]["message"], origin
    for host in ("evil.example:8080", "evil.example", "127.0.0.1.evil.example", "[::2]:80", "localhost.evil.example"):
        refused = post(running, Host=host)
        assert refused.status_code == 403 and "--allow-host" in refused.json()["error"]["message"], host
    assert post(running, Host="evil.example", Origin="http://evil.example").status_code == 403
    port = running.url.rpartition(":")[2]
    for host in (f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}", "LOCALHOST", "localhost."):
        assert post(running, Host=host).status_code == 200, host
    assert post(running, Origin=running.url).status_code == 200
    allowed = post(running, Origin="http://here.example")
    assert allowed.headers["access-control-allow-origin"] == "http://here.example"


def test_bodies_that_a_page_may_send_without_asking(running: Server) -> None:
    for kind in (
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=application/json",
        "",
    ):
        for path in (COMPLETION, "/tokenize", "/admin/model", "/v1/messages"):
            refused = post(running, path, Content_Type=kind)
            assert refused.status_code == 415, (kind, path)
            assert "Content-Type: application/json" in refused.json()["error"]["message"]
    assert post(running, Content_Type="Application/JSON; charset=utf-8").status_code == 200


def cached(running: Server, key: str, prompt: str, **fields: Any) -> int:
    asked = {"prompt": prompt, "max_tokens": 1, **fields}
    headers = {"Authorization": f"Bearer {key}"}
    answer = httpx.post(running.url + COMPLETION, json=asked, headers=headers, timeout=60)
    assert answer.status_code == 200, answer.text
    return int(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])


def test_what_other_keys_have_asked(running: Server) -> None:
    assert cached(running, "alice", SECRET) == 0
    assert cached(running, "mallory", SECRET) == 0
    guess = " ".join(SECRET.split()[:40]) + " and then what nobody has said"
    assert cached(running, "mallory", guess) > 0, "of its own"
    assert cached(running, "alice", SECRET) > 0
    assert cached(running, "alice", SECRET, cache_salt="of one of its users") == 0
    assert cached(running, "alice", SECRET, cache_salt="of one of its users") > 0
    assert cached(running, "mallory", SECRET, cache_salt="of one of its users") == 0
    for salt in ("", 5, ["a"], "x" * 300):
        asked = {"prompt": "A fox", "max_tokens": 1, "cache_salt": salt}
        refused = httpx.post(running.url + COMPLETION, json=asked, headers={"x-api-key": "alice"}, timeout=60)
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "cache_salt"
    messages = {"messages": [{"role": "user", "content": "A fox"}], "max_tokens": 1, "cache_salt": "a"}
    for path in ("/v1/messages", "/v1/chat/completions"):
        assert (
            httpx.post(running.url + path, json=messages, headers={"x-api-key": "alice"}, timeout=60).status_code == 200
        )


def test_one_key_can_t_take_every_place(running: Server) -> None:
    def endless(key: str, **fields: Any) -> Any:
        return running.client(key).completions.create(
            model=MODEL, prompt="A fox", max_tokens=1900, temperature=2.0, logit_bias=GOES_ON, stream=True, **fields
        )

    streams = [endless("mallory") for _ in range(4)]
    with pytest.raises(openai.RateLimitError, match="this key has 4 requests running or waiting"):
        endless("mallory")
    with pytest.raises(
        openai.BadRequestError, match="n asks for 5 answers at once; the limit of this key is 4"
    ) as refused:
        endless("alice", n=5)
    assert refused.value.param == "n"
    assert cached(running, "alice", "A hen") == 0
    for stream in streams:
        stream.close()
    running.await_status(lambda status: status["requests"] == 0)
    endless("mallory", n=4).close()
    running.await_status(lambda status: status["requests"] == 0)


def test_answers_that_go_on_alone_keep_their_places(running: Server) -> None:
    """And what ends them needs neither a place nor a body."""
    headers = {"x-api-key": "mallory"}
    long = {"type": "object", "properties": {"a": {"type": "string", "minLength": 1500}}, "required": ["a"]}
    asked = {
        "input": "A fox", "max_output_tokens": 1900, "background": True,
        "text": {"format": {"type": "json_schema", "name": "long", "schema": long}},
    }  # fmt: skip

    def begin() -> httpx.Response:
        return httpx.post(f"{running.url}/v1/responses", json=asked, headers=headers, timeout=60)

    begun = [begin() for _ in range(4)]
    assert [answer.status_code for answer in begun] == [200] * 4
    refused = begin()
    assert refused.status_code == 429 and "this key has" in refused.json()["error"]["message"]
    for answer in begun:
        url = f"{running.url}/v1/responses/{answer.json()['id']}/cancel"
        assert httpx.post(url, headers=headers, timeout=60).status_code == 200
    running.await_status(lambda status: status["requests"] == 0)
    assert cached(running, "mallory", "A cow") == 0


def test_who_may_change_the_model(running: Server) -> None:
    def load(key: str) -> int:
        asked, headers = {"model": MODEL}, {"Authorization": f"Bearer {key}"}
        return httpx.post(f"{running.url}/admin/model", json=asked, headers=headers, timeout=60).status_code

    assert [load(key) for key in ("nobody", "alice", "root")] == [401, 403, 200]
    assert cached(running, "root", "A fox") == 0
    assert "other users may read the keys in" in running.running.err
