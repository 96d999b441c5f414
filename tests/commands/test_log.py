"""What a server says of its requests, starts and changes of models: to its log, and to clients that wait."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest

from hippo_mpi.config.bundled import BUNDLED_MODEL, DEFAULT_PROMPT
from hippo_mpi.serving.api.audit_log import key_id
from tests import ranks
from tests.servers import GOES_ON, JSON, SERVE, Server, server

pytestmark = pytest.mark.slow

FIRST, OTHER = "story-3m", "story-draft"
KEY = "sk-fox-and-hen"
ASKED: Any = [{"role": "user", "content": DEFAULT_PROMPT}]
WHEN = r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "
MADE = r"first token \d+\.\d\d s, \d+\.\d tok/s, total \d+\.\d\d s"


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    options = ("--catalogue", str(BUNDLED_MODEL.parent), "--model", FIRST, "--max-batch-size", "2", "--max-queue", "4")
    with server(*options, env={"HIPPO_API_KEYS": KEY}) as found:
        yield found


def await_line(running: Server, pattern: str) -> str:
    """Return a line of the log from its level on, when there is one that matches to its end."""
    pattern = f"{WHEN}({pattern})$"
    for _ in range(600):
        if found := re.search(pattern, running.running.err, re.M):
            return found[1]
        with pytest.raises(subprocess.TimeoutExpired):
            running.running.process.wait(0.05)
    raise AssertionError(f"{pattern!r} is not in {running.running.err}")


def endless(running: Server, model: str = FIRST, max_tokens: int = 900) -> Any:
    return running.client(KEY).completions.create(
        model=model, prompt="A fox", max_tokens=max_tokens, temperature=2.0, logit_bias=GOES_ON, stream=True
    )


def test_a_line_per_request_however_it_ends(running: Server) -> None:
    client, key = running.client(KEY), rf", key {key_id(KEY)}"
    whole = client.chat.completions.create(model=FIRST, messages=ASKED, max_tokens=5)
    line = rf"INFO POST /v1/chat/completions 200, {FIRST}, prompt \d+ tokens \(0 cached\), answer 5 tokens, length, "
    await_line(running, rf"{line}{MADE}, id \S*{whole.id}{key}")
    with ThreadPoolExecutor(3) as pool:
        for choices in pool.map(lambda n: list(stream(client, n)), (1, 2, 3)):
            assert choices
    for count in (1, 2, 3):
        await_line(running, rf"INFO POST /v1/completions 200, {FIRST}, .*, answer {7 * count} tokens, length, {MADE}.*")
    messages = anthropic.Anthropic(base_url=running.url, api_key=KEY, max_retries=0).messages
    messages.create(model=FIRST, messages=ASKED, max_tokens=6)
    await_line(
        running, rf"INFO POST /v1/messages 200, {FIRST}, .*, answer 6 tokens, length, {MADE}, id \S*msg_\w+{key}"
    )
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model=FIRST, prompt="A fox", extra_body={"frequency": "secret"})
    await_line(running, rf"INFO POST /v1/completions 400, total \S+ s.*{key}")
    with pytest.raises(openai.AuthenticationError):
        running.client("wrong-key").models.list()
    await_line(running, rf"INFO GET /v1/models 401, total .*, key {key_id('wrong-key')}")
    with pytest.raises(urllib.error.HTTPError):
        running.get("/v1/nowhere%0a2026?key=secret")
    await_line(running, r"INFO GET /v1/nowhere%0a2026 404, total \S+ s.*")
    assert "/ready" not in running.running.err, "what is polled"
    for hidden in (KEY, "wrong-key", "secret", "fox", "Once"):
        assert hidden not in running.running.err


def stream(client: openai.OpenAI, count: int) -> Any:
    return client.completions.create(
        model=FIRST, prompt="A hen", max_tokens=7, n=count, stream=True, logit_bias=GOES_ON, temperature=1.0
    )


def test_clients_that_go_away_and_one_too_many(running: Server) -> None:
    streams = [endless(running) for _ in range(6)]
    next(iter(streams[0]))
    with pytest.raises(openai.RateLimitError):
        endless(running)
    await_line(running, r"INFO POST /v1/completions 429, total .*")
    assert running.status()["requests"] == 6
    running.await_status(lambda status: (status["running"], status["waiting"]) == (2, 4))
    for one in streams:
        one.close()
    await_line(running, rf"INFO POST /v1/completions 200, {FIRST}, .*, answer [1-9]\d* tokens, client gone, {MADE}.*")
    body = json.dumps({"prompt": "A fox", "max_tokens": 900, "temperature": 2.0, "logit_bias": GOES_ON}).encode()
    request = urllib.request.Request(f"{running.url}/v1/completions", body, {"x-api-key": KEY, **JSON})
    with pytest.raises(TimeoutError):
        urllib.request.urlopen(request, timeout=0.5)
    await_line(running, rf"INFO POST /v1/completions 499, {FIRST}, .*, client gone, .*")
    running.await_status(lambda status: status["requests"] == 0)


@pytest.mark.slow
def test_who_waits_for_another_model_hears_why(running: Server) -> None:
    """A running answer, then clients for another model: the log, /ready and the streams say what happens."""
    first = endless(running, max_tokens=200)
    next(iter(first))
    body = {"model": OTHER, "prompt": "A hen", "max_tokens": 4, "stream": True, "logit_bias": GOES_ON}

    def wait(_: int) -> str:
        return httpx.post(f"{running.url}/v1/completions", json=body, headers={"x-api-key": KEY}, timeout=60).text

    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(wait, 0)]
        why = f"{OTHER} is next, after 1 answer of {FIRST}"
        running.await_status(lambda status: status["state"] == f"ready; {why}")
        assert list(first)[-1].choices[0].finish_reason == "length"
        running.await_status(lambda status: str(status["state"]).startswith(f"loading {OTHER} ("))
        waiting.append(pool.submit(wait, 1))
        texts = [one.result(60) for one in waiting]
    for text, comment in zip(texts, (why, rf"loading {OTHER} \(\d+ s\)"), strict=True):
        assert re.match(rf": {comment}\n\n", text), text
        assert text.endswith("data: [DONE]\n\n")
    lines = [
        await_line(running, rf"INFO {OTHER} requested: {why}"),
        await_line(running, rf"INFO switching from {FIRST} to {OTHER}; 1 request waits for it"),
        await_line(running, rf"INFO loaded {OTHER} in \d+\.\d s: \S+ layer 0, \S+ layer 1; 2 requests wait"),
    ]
    places = [running.running.err.index(line) for line in lines]
    assert places == sorted(places)


@pytest.mark.slow
def test_a_restart_is_logged(running: Server) -> None:
    os.kill(running.rank_pids()[1], signal.SIGKILL)
    await_line(running, r"WARNING the ranks failed \(rank 1 \(\S+\) died.*\); restarting them")
    running.await_status(lambda status: status["ready"] and status["restarts"] == 1)
    await_line(running, r"INFO loaded \S+ in \d+\.\d s: \S+ layers? .*; no request waits")


@pytest.mark.slow
def test_a_level() -> None:
    """What scripts wait for is said at every level; nothing else below the level, nothing twice."""
    with server("--ranks", "1", "--log-level", "error") as found:
        found.client().models.list()
        with socket.create_connection(("127.0.0.1", int(found.url.rpartition(":")[2]))) as strange:
            strange.sendall(b"\x00 HTTP\r\n\r\n")
            strange.recv(100)
        found.running.await_output("INFO ready", "stderr")
        lines = found.running.err.splitlines()
    assert [line[20:].split("http")[0] for line in lines] == ["INFO listening on ", "INFO ready"]
    with ranks.single([SERVE, "--log-level", "loud"]) as refused:
        assert refused.wait() == 2
        assert "argument --log-level: invalid choice: 'loud'" in refused.err


def test_the_log_goes_into_files_of_a_size(tmp_path: Path) -> None:
    """All lines are there once, in order, those of child processes, too; the oldest file is dropped."""
    log = tmp_path / "log"
    log.write_text("of before\n")
    code = f"""
import logging, os, subprocess, sys, time
from pathlib import Path
from hippo_mpi.serving import logs
logs._MAX_FILE_BYTES = 20_000
logs.set_up_logging("info")
logs.log_to(Path({str(log)!r}))
child = subprocess.Popen(["sh", "-c", "read x; echo from a child >&2"], stdin=subprocess.PIPE)
for number in range(1_200):
    logging.getLogger("hippo_mpi.x").info("%d %s", number, "x" * 60)
logging.shutdown()
time.sleep(1)
child.communicate(b"x")
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    files = [log, *(log.with_name(f"log.{number}") for number in range(1, 5))]
    assert {*tmp_path.iterdir()} == {*files}
    text = "".join(file.read_text() for file in reversed(files))
    numbers = [int(found) for found in re.findall(r" INFO (\d+) x", text)]
    assert numbers == [*range(numbers[0], 1_200)] and "of before" not in text
    assert text.endswith("from a child\n")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a small disk")
def test_a_log_file_on_a_full_disk_loses_nothing_of_before(tmp_path: Path) -> None:
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=100k", "none", str(tmp_path)], capture_output=True
    ).returncode:
        pytest.skip("can't mount a tmpfs here")
    try:
        log, older = tmp_path / "log", tmp_path / "log.1"
        older.write_text("older\n")
        code = f"""
import logging, time
from pathlib import Path
from hippo_mpi.serving import logs
logs._MAX_FILE_BYTES = 60_000
logs.set_up_logging("info")
logs.log_to(Path({str(log)!r}))
for number in range(900):
    logging.getLogger("hippo_mpi.x").info("%d %s", number, "x" * 60)
time.sleep(1)
"""
        subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
        assert older.read_text() == "older\n" and " INFO 0 x" in log.read_text()
        assert {path.name for path in tmp_path.iterdir()} == {"log", "log.1"}
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_log_file_that_cannot_be_written(tmp_path: Path) -> None:
    with ranks.single([SERVE, "--ranks", "1", "--log-file", str(tmp_path)]) as refused:
        assert refused.wait() == 2
        assert refused.err == f"error: --log-file {tmp_path}: Is a directory\n"


def test_nobody_reads_the_log() -> None:
    """Who logs goes on when stderr is a pipe that is full."""
    code = "import logging; from hippo_mpi.serving.logs import set_up_logging; set_up_logging('info')\n"
    code += "for _ in range(20_000): logging.getLogger('hippo_mpi.x').info('x' * 100)\nprint('through')"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"through\n"
            assert process.wait(30) == 0
        finally:
            process.kill()
