"""Answers that a server with a journal keeps: fetched by their id, by whoever has asked, as long as that was asked for."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.servers import GOES_ON, MODEL, Server, server

pytestmark = pytest.mark.slow
KEY, OTHER = "first-key", "second-key"
ASKED: Any = [{"role": "user", "content": "Tell me of a fox."}]
LONG: dict[str, Any] = {
    "prompt": "A fox",
    "max_tokens": 1900,
    "stream": True,
    "logit_bias": GOES_ON,
    "temperature": 2.0,
}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    journal = tmp_path_factory.mktemp("kept") / "journal"
    with server("--ranks", "1", "--journal", str(journal), env={"HIPPO_API_KEYS": f"{KEY},{OTHER}"}) as found:
        yield found


def get(running: Server, path: str, key: str = KEY, method: str = "GET", **headers: str) -> tuple[int, Any]:
    """(status, JSON object, or text)."""
    headers = {"Authorization": f"Bearer {key}", **headers}
    answer = httpx.request(method, running.url + path, headers=headers, timeout=60)
    return answer.status_code, answer.json() if "json" in answer.headers["content-type"] else answer.text


def events(text: str) -> list[tuple[str, str]]:
    """(id, data) of each event."""
    found = []
    for event in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in event.splitlines() if not line.startswith(":"))
        if fields:
            found.append((fields.get("id", ""), fields["data"]))
    return found


def test_a_stored_chat_until_it_is_deleted(running: Server) -> None:
    chat = running.client(KEY).chat.completions
    answer = chat.create(model=MODEL, messages=ASKED, max_tokens=10, n=2, temperature=0.9, seed=3, store=True)
    assert chat.retrieve(answer.id) == answer
    with pytest.raises(openai.NotFoundError, match="no answer with id"):
        running.client(OTHER).chat.completions.retrieve(answer.id)
    assert get(running, f"/v1/completions/{answer.id}")[0] == 404, "it is no completion"
    with pytest.raises(openai.NotFoundError):
        running.client(OTHER).chat.completions.delete(answer.id)
    assert chat.delete(answer.id).deleted
    with pytest.raises(openai.NotFoundError):
        chat.retrieve(answer.id)


def test_what_is_not_to_be_stored(running: Server) -> None:
    """A whole answer is nowhere; a stream is there for a while, as its client may have missed the end of it."""
    client = running.client(KEY)
    chat = client.chat.completions.create(model=MODEL, messages=ASKED, max_tokens=3)
    response = client.responses.create(model=MODEL, input="A fox", max_output_tokens=3, store=False)
    assert response.to_dict()["store"] is False
    for url, name in (("chat/completions", chat.id), ("responses", response.id)):
        assert get(running, f"/v1/{url}/{name}")[0] == 404
    body = {"model": MODEL, "max_tokens": 5, "messages": ASKED, "stream": True}
    for url in ("/v1/messages", "/v1/chat/completions"):
        text = httpx.post(running.url + url, json=body, headers={"x-api-key": KEY}, timeout=60).text
        sent = events(text)
        assert [number for number, _ in sent] == [str(number) for number in range(len(sent))]
        first = json.loads(sent[0][1])
        name = first["message"]["id"] if "message" in first else first["id"]
        status, again = get(running, f"{url}/{name}?stream=true&starting_after=2")
        assert status == 200 and events(again) == sent[3:]
        assert events(get(running, f"{url}/{name}", **{"Last-Event-ID": "2"})[1]) == sent[3:]
        status, nothing = get(running, f"{url}/{name}?stream=true&starting_after={len(sent) - 1}")
        assert status == 200
        assert nothing == (": no further events\n\n" if "messages" in url else f"id: {len(sent) - 1}\ndata: [DONE]\n\n")
        assert get(running, f"{url}/{name}")[1]["id"] == name
        assert get(running, f"{url}/{name}", OTHER)[0] == 404


def test_a_response_is_stored_unless_that_is_refused(running: Server) -> None:
    client = running.client(KEY).responses
    response = client.create(model=MODEL, input="A fox", max_output_tokens=12, temperature=0)
    assert client.retrieve(response.id).output_text == response.output_text
    all_events = list(client.create(model=MODEL, input="A fox", max_output_tokens=12, temperature=0, stream=True))
    name = all_events[0].response.id  # type: ignore[union-attr]
    assert list(client.retrieve(name, stream=True, starting_after=4)) == all_events[5:]
    client.delete(name)
    with pytest.raises(openai.NotFoundError):
        client.retrieve(name)


def test_responses_in_the_background(running: Server) -> None:
    client = running.client(KEY).responses
    response = client.create(model=MODEL, input="A fox", max_output_tokens=10, background=True)
    assert response.status == "queued" and response.background
    ends = time.monotonic() + 60
    while (found := client.retrieve(response.id)).status in ("queued", "in_progress"):
        assert time.monotonic() < ends
        time.sleep(0.05)
    assert found.status in ("completed", "incomplete") and found.output_text
    with pytest.raises(openai.BadRequestError, match="must be stored, so store can't be false"):
        client.create(model=MODEL, input="A fox", background=True, store=False)


def test_a_response_in_the_background_needs_no_client(running: Server) -> None:
    """Neither at its beginning nor for its stream; until it is cancelled."""
    client = running.client(KEY).responses
    stream = client.create(
        model=MODEL, input="A fox", max_output_tokens=1900, background=True, stream=True, temperature=2.0,
    )  # fmt: skip
    name = next(iter(stream)).response.id  # type: ignore[union-attr]
    stream.close()
    time.sleep(0.5)
    if client.retrieve(name).status == "in_progress":  # it may have ended by itself
        assert client.cancel(name).status == "cancelled"
    running.await_status(lambda status: status["requests"] == 0)
    sync = client.create(model=MODEL, input="A fox", max_output_tokens=2)
    with pytest.raises(openai.BadRequestError, match="only background responses"):
        client.cancel(sync.id)


def test_a_stream_ends_with_its_client(running: Server) -> None:
    """As where nothing is kept: the others are what people stop who have read enough."""
    stream = running.client(KEY).completions.create(model=MODEL, **LONG)
    name = next(iter(stream)).id
    stream.close()
    running.await_status(lambda status: status["requests"] == 0)
    assert get(running, f"/v1/completions/{name}")[0] == 404


@pytest.mark.parametrize(
    ("query", "line"),
    [
        ("stream=perhaps", "stream must be true or false, not 'perhaps'"),
        ("stream=true&starting_after=-1", "starting_after must be the number of an event, not '-1'"),
        ("starting_after=3", "starting_after needs stream=true"),
    ],
)
def test_wrong_questions(running: Server, query: str, line: str) -> None:
    response = running.client(KEY).responses.create(model=MODEL, input="A fox", max_output_tokens=2)
    status, found = get(running, f"/v1/responses/{response.id}?{query}")
    assert status == 400 and found["error"]["message"] == line


def test_a_client_that_comes_back_in_time_and_one_that_does_not(tmp_path: Any) -> None:
    with server("--ranks", "1", "--journal", str(tmp_path / "journal"), "--reconnect", "2") as running:
        stream = running.client().completions.create(model=MODEL, n=8, **LONG)
        name = next(iter(stream)).id
        stream.close()
        request = urllib.request.Request(f"{running.url}/v1/completions/{name}?stream=true")
        with urllib.request.urlopen(request, timeout=60) as answer:
            time.sleep(2.5)
            assert running.status()["requests"] == 8
            assert answer.readline() == b"id: 0\n"
        running.await_status(lambda status: status["requests"] == 0)
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(request, timeout=60)
