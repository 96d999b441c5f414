"""A front that is killed: the next one goes on with every stream that a client has the id of, each token once."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests import ranks
from tests.servers import GOES_ON, MODEL, SERVE, Server

pytestmark = pytest.mark.slow
BEFORE_DEATH = 12  # events that a client gets
STORY = [{"role": "user", "content": "Tell me of a fox and a hen."}]
# 0, 2: greedy and drawn; 1, 3: what a grammar or stop words hold back, and several answers at once.
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "Once upon a time", "max_tokens": 70, "logit_bias": GOES_ON, "temperature": 0},
    "/v1/chat/completions": {
        "messages": STORY, "max_completion_tokens": 60, "temperature": 1.0, "seed": 3, "n": 2, "logit_bias": GOES_ON,
        "logprobs": True, "top_logprobs": 2, "stream_options": {"include_usage": True},
    },
    "/v1/messages": {"messages": STORY, "max_tokens": 70, "temperature": 0.8, "stop_sequences": ["zebra"]},
    "/v1/responses": {"input": "Tell me of a fox and a hen.", "max_output_tokens": 70, "temperature": 0.8},
}  # fmt: skip
PASSING = {"created", "created_at", "cached_tokens", "input_tokens", "cache_read_input_tokens"}
ROUNDED = {"logprob", "top_logprobs"}  # otherwise by steps of other rows


@contextlib.contextmanager
def journaled(folder: Path, *options: str, env: dict[str, str] | None = None) -> Iterator[Server]:
    command = [SERVE, "--port", "0", "--journal", str(folder / "journal"), "--seed", "5", *options]
    with ranks.single(command, env=env) as running:
        found = Server(running)
        found.await_ready()
        below = found.rank_pids()
        yield found
        if running.process.poll() is None:
            running.process.terminate()
            assert running.wait(20) == 0, running.err
        assert not ranks.await_end(below)


def kill(running: Server) -> None:
    """End the front as the system would when it is out of memory."""
    running.running.process.kill()
    running.running.wait(20)


class Stream:
    """A client of a stream, which notes the events and their numbers."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any] | str] = []
        self.numbers: list[int] = []
        self.id = ""
        self.unnumbered = ""

    def read(self, answer: httpx.Response) -> None:
        """Note what comes, until the end, or the connection breaks."""
        number: int | None = None
        with contextlib.suppress(httpx.HTTPError):
            for line in answer.iter_lines():
                if line.startswith("id: "):
                    number = int(line[4:])
                elif line.startswith("data: ") and number is not None:
                    self._note(number, line[6:])
                    number = None
                elif line.startswith("data: "):
                    self.unnumbered += line

    def _note(self, number: int, data: str) -> None:
        found = data if data == "[DONE]" else json.loads(data)
        if isinstance(found, dict):
            head = found.get("message") or found.get("response") or found
            self.id = self.id or head.get("id", "")
        self.numbers.append(number)
        self.events.append(found)

    def lasting(self) -> Any:
        """The events, choice by choice, but for what is of one request only, and for what a cache happened to have."""

        def choice_of(event: Any) -> int:
            choices = event.get("choices") if isinstance(event, dict) else None
            return int(choices[0]["index"]) if choices else len(self.events)

        is_of_choices = isinstance(self.events[0], dict) and "choices" in self.events[0]
        events = sorted(self.events, key=choice_of) if is_of_choices else self.events
        return without_passing(json.loads(json.dumps(events).replace(self.id, "ID")))


def without_passing(found: Any) -> Any:
    if isinstance(found, dict):
        return {name: without_passing(value) for name, value in found.items() if name not in PASSING | ROUNDED}
    return [without_passing(one) for one in found] if isinstance(found, list) else found


def post(running: Server, url: str, stream: Stream, **extra: Any) -> None:
    body = {"model": MODEL, "stream": True, **BODIES[url], **extra}
    with httpx.stream("POST", running.url + url, json=body, timeout=90) as answer:
        assert answer.status_code == 200, answer.read()
        stream.read(answer)


def test_every_api_s_stream_goes_on_after_the_front_was_killed(tmp_path: Path) -> None:
    undisturbed = {url: Stream() for url in BODIES}
    broken = {url: Stream() for url in BODIES}
    with journaled(tmp_path) as running, ThreadPoolExecutor(len(BODIES)) as pool:
        list(pool.map(lambda url: post(running, url, undisturbed[url]), BODIES))
        reading = [pool.submit(post, running, url, broken[url]) for url in BODIES]
        ends = threading.Event()
        while any(len(stream.events) < BEFORE_DEATH for stream in broken.values()):
            assert not ends.wait(0.005) and not any(one.done() for one in reading)
        kill(running)
        for one in reading:
            one.result(30)
    with journaled(tmp_path) as running, ThreadPoolExecutor(len(BODIES)) as pool:

        def fetch(url: str) -> None:
            stream = broken[url]
            assert stream.numbers == list(range(len(stream.numbers)))
            assert len(stream.events) < len(undisturbed[url].events)
            headers = {"Last-Event-ID": str(stream.numbers[-1])}
            with httpx.stream("GET", f"{running.url}{url}/{stream.id}", headers=headers, timeout=90) as answer:
                assert answer.status_code == 200, answer.read()
                stream.read(answer)

        list(pool.map(fetch, BODIES))
    for url, stream in broken.items():
        assert stream.numbers == list(range(len(stream.numbers)))
        assert stream.lasting() == undisturbed[url].lasting(), url


def test_a_server_that_ends_says_how_to_go_on(tmp_path: Path) -> None:
    """A stream's error has no number; what is to be stored is finished by the next server though nobody asks; an answer
    of which nobody has the id isn't."""
    goes_on = {"max_tokens": 400, "logit_bias": GOES_ON, "temperature": 1.0}
    with journaled(tmp_path, "--ranks", "1") as running, ThreadPoolExecutor(3) as pool:
        stream, stored = Stream(), Stream()
        bodies = {"/v1/completions": stream, "/v1/chat/completions": stored}
        extras = {
            "/v1/completions": goes_on,
            "/v1/chat/completions": {"store": True, "n": 1, "logprobs": False, "top_logprobs": 0},
        }
        reading = [pool.submit(post, running, url, into, **extras[url]) for url, into in bodies.items()]
        whole = {"model": MODEL, "prompt": "A fox", **goes_on, "store": True}
        ending = pool.submit(httpx.post, running.url + "/v1/completions", json=whole, timeout=90)
        running.await_status(
            lambda status: status["requests"] == 3 and len(stream.events) > 3 and len(stored.events) > 3
        )
        running.running.process.terminate()
        for one in reading:
            one.result(30)
        assert ending.result(30).status_code == 503
        assert running.running.wait(20) == 0
        assert "the server is shutting down; GET /v1/completions/" in stream.unnumbered
        assert stream.id in stream.unnumbered
    with journaled(tmp_path, "--ranks", "1") as running:
        assert "resuming 2 requests of the previous server" in running.running.err
        again = httpx.get(f"{running.url}/v1/chat/completions/{stored.id}", timeout=90).json()
        text = "".join(
            event["choices"][0]["delta"].get("content") or "" for event in stored.events if "choices" in event
        )
        assert again["usage"]["completion_tokens"] == 60
        assert again["choices"][0]["message"]["content"].startswith(text)
