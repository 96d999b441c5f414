"""hippo_mpi.serve: the API as OpenAI's own client sees it, its limits, and its ways to start."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest

from hippo_mpi.config.bundled import BUNDLED_MODEL, DEFAULT_PROMPT
from tests import ranks
from tests.servers import GOES_ON, JSON, MODEL, SERVE, Server, server
from tests.small_disk import fill, small_disk

ASKED = [{"role": "user", "content": DEFAULT_PROMPT}]
NAMED: Any = {
    "type": "json_schema",
    "json_schema": {
        "name": "it",
        "schema": {"type": "object", "properties": {"secret": {"type": "string"}}, "required": ["secret"]},
    },
}


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    with server("--max-batch-size", "4", "--max-queue", "4") as found:
        yield found


@pytest.fixture(scope="module")
def wanted() -> str:
    """What hippo_mpi.generate answers."""
    with ranks.single([str(ranks.BIN / "hippo_mpi.generate"), "--max-tokens", "40"]) as generate:
        assert generate.wait() == 0
        return generate.out.removesuffix("\n")


def test_the_same_answer_as_generate(running: Server, wanted: str) -> None:
    answer = running.client().chat.completions.create(model=MODEL, messages=ASKED, max_tokens=40)
    assert answer.choices[0].message.content == wanted
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 40
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 40


def test_a_stream_comes_token_by_token(running: Server, wanted: str) -> None:
    chunks = list(
        running.client().chat.completions.create(
            model=MODEL, messages=ASKED, max_tokens=40, stream=True, stream_options={"include_usage": True}
        )
    )
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks[:-1]]
    assert "".join(texts) == wanted
    assert len([text for text in texts if text]) > 20
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 40


@pytest.mark.slow
def test_completions_choices_seeds_and_logprobs(running: Server) -> None:
    def ask(**options: Any) -> Any:
        return running.client().completions.create(
            model=MODEL, prompt="Once upon a time", max_tokens=12, temperature=1.0, n=2, **options
        )

    first, again = ask(seed=5), ask(seed=5)
    assert [choice.text for choice in first.choices] == [choice.text for choice in again.choices]
    assert first.choices[0].text != first.choices[1].text
    told = ask(seed=5, logprobs=2).choices[0].logprobs
    assert len(told.token_logprobs) == 12
    assert "".join(told.tokens) == first.choices[0].text
    streamed = ["", ""]
    for chunk in ask(seed=5, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == [choice.text for choice in first.choices]


@pytest.mark.slow
def test_answers_that_are_json(running: Server) -> None:
    """A grammar, not a request to the model: this one knows no JSON."""
    schema = {
        "type": "object", "required": ["hero", "age"], "additionalProperties": False,
        "properties": {"hero": {"enum": ["fox", "hen"]}, "age": {"type": "integer", "minimum": 1, "maximum": 99}},
    }  # fmt: skip
    asked: Any = {"type": "json_schema", "json_schema": {"name": "story", "schema": schema}}
    client = running.client()
    for temperature in (0.0, 1.0):
        answer = client.chat.completions.create(
            model=MODEL, messages=ASKED, response_format=asked, temperature=temperature, max_tokens=100
        )
        found = json.loads(answer.choices[0].message.content or "")
        assert found["hero"] in ("fox", "hen") and 1 <= found["age"] <= 99
        assert answer.choices[0].finish_reason == "stop"
    asked["json_schema"]["schema"] = {"type": "fairy"}
    with pytest.raises(openai.BadRequestError, match="response_format: Invalid type: fairy"):
        client.chat.completions.create(model=MODEL, messages=ASKED, response_format=asked)


@pytest.mark.slow
def test_stop_words_and_cached_prompts(running: Server, wanted: str) -> None:
    word = wanted.split()[6]
    answer = running.client().chat.completions.create(model=MODEL, messages=ASKED, stop=[word], max_tokens=200)
    assert answer.choices[0].message.content == wanted[: wanted.index(word)]
    assert answer.choices[0].finish_reason == "stop"
    longer = [{"role": "user", "content": f"{DEFAULT_PROMPT} The fox lives by the river and has a red coat."}]
    for _ in range(2):
        answer = running.client().chat.completions.create(model=MODEL, messages=longer, max_tokens=2)
    assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
    assert (answer.usage.prompt_tokens_details.cached_tokens or 0) > 0


@pytest.mark.parametrize(
    ("body", "line"),
    [
        ({"messages": ASKED, "frequency": 1}, "unknown field 'frequency'"),
        ({"messages": ASKED, "temperature": "hot"}, "temperature must be a number from 0 to 100, not 'hot'"),
        ({"messages": []}, "messages must be a list of objects with role and content"),
        ({"messages": ASKED, "n": 0.5}, "n must be a whole number from 1 to 16, not 0.5"),
        ({"messages": ASKED, "n": 0}, "n must be a whole number from 1 to 16, not 0"),
        ({"messages": ASKED, "stream": 1}, "stream must be true or false, not 1"),
        ({"messages": ASKED, "stop": ["x"] * 17}, "stop can have up to 16 strings of up to 256 characters"),
        ({"messages": ASKED, "logit_bias": {"5": 1e39}}, "numbers from -10000 to 10000"),
        ({"messages": ASKED, "logit_bias": {"5000": 1}, "stream": True}, "token 5000 is not in the vocabulary"),
        ({"messages": [{"role": "fox", "content": "x"}]}, "role must be one of system, developer, user, assistant"),
        ({"messages": ASKED, "stream_options": {"include_usage": True}}, "stream_options must be"),
        ({"messages": [{"role": "user", "content": "fox " * 3000}]}, "but this model's maximum context length is"),
        (
            {"messages": ASKED, "tools": [{"type": "function"}]},
            "tools must be a list of objects with the type function",
        ),
        ([], "the body must be a JSON object"),
    ],
)
def test_bad_bodies_are_refused_in_openai_s_shape(running: Server, body: Any, line: str) -> None:
    request = urllib.request.Request(f"{running.url}/v1/chat/completions", json.dumps(body).encode(), JSON)
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=10)
    assert refused.value.code == 400
    error = json.loads(refused.value.read())["error"]
    assert line in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.slow
def test_anthropic_s_client(running: Server, wanted: str) -> None:
    client = anthropic.Anthropic(base_url=running.url, api_key="none", max_retries=0)
    asked: Any = [{"role": "user", "content": [{"type": "text", "text": DEFAULT_PROMPT}]}]
    answer = client.messages.create(model=MODEL, messages=asked, max_tokens=40)
    assert [block.text for block in answer.content if block.type == "text"] == [wanted]
    assert (answer.stop_reason, answer.usage.output_tokens) == ("max_tokens", 40)
    word = wanted.split()[6]
    with client.messages.stream(model=MODEL, messages=asked, max_tokens=99, stop_sequences=["never", word]) as stream:
        assert "".join(stream.text_stream) == wanted[: wanted.index(word)]
        last = stream.get_final_message()
    assert (last.stop_reason, last.stop_sequence) == ("stop_sequence", word)
    with pytest.raises(anthropic.BadRequestError, match="temperature must be a number from 0 to 100"):
        client.messages.create(model=MODEL, messages=asked, max_tokens=4, extra_body={"temperature": -1})
    with pytest.raises(anthropic.NotFoundError, match="does not exist"):
        client.messages.create(model="other", messages=asked, max_tokens=4)


@pytest.mark.slow
def test_responses(running: Server, wanted: str) -> None:
    client = running.client()
    answer = client.responses.create(model=MODEL, input=DEFAULT_PROMPT, max_output_tokens=40)
    assert answer.output_text == wanted
    assert (answer.status, answer.usage and answer.usage.output_tokens) == ("incomplete", 40)
    asked: Any = [{"role": "user", "content": [{"type": "input_text", "text": DEFAULT_PROMPT}]}]
    with client.responses.stream(model=MODEL, input=asked, max_output_tokens=400) as stream:
        texts = [event.delta for event in stream if event.type == "response.output_text.delta"]
        whole = stream.get_final_response()
    assert len(texts) > 20 and "".join(texts) == whole.output_text
    assert whole.output_text.startswith(wanted) and whole.status == "completed"
    with pytest.raises(openai.BadRequestError, match="previous_response_id must be null here"):
        client.responses.create(model=MODEL, input="x", previous_response_id="resp_1")


def test_models_tokens_and_metrics(running: Server) -> None:
    client = running.client()
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "hippo-mpi"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(model="other", messages=ASKED)
    request = urllib.request.Request(f"{running.url}/tokenize", json.dumps({"prompt": "a fox"}).encode(), JSON)
    with urllib.request.urlopen(request, timeout=10) as answer:
        found = json.loads(answer.read())
    assert found["count"] == len(found["tokens"]) > 0
    assert running.get("/health") == {"status": "ok"}
    assert [rank["layers"] for rank in running.status()["ranks"]] == [[0, 6], [6, 12]]
    client.completions.create(model=MODEL, prompt="A fox", max_tokens=2)
    lines = running.get("/metrics").splitlines()
    assert any(line.startswith("hippo_generated_tokens_total ") and not line.endswith(" 0.0") for line in lines)


def test_the_dashboard_draws_what_there_is(running: Server) -> None:
    running.client().completions.create(model=MODEL, prompt="A fox", max_tokens=3)
    exported = set(re.findall(r"^(hippo_\w+)", running.get("/metrics"), re.M))
    dashboard = (Path(__file__).parents[2] / "launch" / "grafana.json").read_text()
    drawn = set(re.findall(r"\bhippo_\w+", dashboard))
    assert drawn and drawn <= exported, drawn - exported
    unseen = {name for name in exported if not name.endswith(("_created", "_sum", "_count"))} - drawn
    assert not unseen


def test_impossible_tokens_have_logprobs_that_json_can_say(running: Server) -> None:
    bias = {str(token): -10_000 for token in range(1, 1536)}
    answer = running.client().completions.create(
        model=MODEL, prompt="a fox", max_tokens=2, logprobs=5, logit_bias=bias, extra_body={"response_format": {"type": "json_object"}},
    )  # fmt: skip
    assert answer.choices[0].logprobs is not None
    assert min(value for top in answer.choices[0].logprobs.top_logprobs or [] for value in top.values()) == -9999.0


def test_who_goes_away_frees_the_place(running: Server) -> None:
    def endless(**options: Any) -> Any:
        return running.client().chat.completions.create(
            model=MODEL, messages=ASKED, max_tokens=1900, temperature=2.0, logit_bias=GOES_ON, stream=True, **options
        )

    streams = [endless() for _ in range(8)]
    for stream in streams[:4]:
        next(iter(stream))
    with pytest.raises(openai.RateLimitError) as refused:
        endless()
    assert refused.value.response.headers["retry-after"]
    for stream in streams:
        stream.close()
    running.await_status(lambda status: status["requests"] == 0)


def test_a_body_too_large_and_one_that_never_comes(running: Server) -> None:
    request = urllib.request.Request(f"{running.url}/v1/completions", b" " * (5 << 20), JSON)
    with pytest.raises((urllib.error.HTTPError, ConnectionError, urllib.error.URLError)) as refused:
        urllib.request.urlopen(request, timeout=10)
    if isinstance(refused.value, urllib.error.HTTPError):
        assert refused.value.code == 413
    host, port = running.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as slow:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        slow.sendall(head + b"Content-Length: 100\r\n\r\n{")
        assert running.get("/health") == {"status": "ok"}


@pytest.mark.slow
def test_keys_and_defaults() -> None:
    """The command line's system prompt and seed hold where a body brings none."""
    options = ("--ranks", "1", "--seed", "5", "--temp", "1.0", "--system-prompt", "You tell of hens.")
    with server(*options, env={"HIPPO_API_KEYS": "first-key, second-key"}) as found:
        chat = found.client("first-key").chat.completions
        answers = [chat.create(model=MODEL, messages=ASKED, max_tokens=20) for _ in range(2)]
        assert answers[0].choices[0].message.content == answers[1].choices[0].message.content
        own = chat.create(model=MODEL, messages=[{"role": "system", "content": "x"}, *ASKED], max_tokens=1)
        assert answers[0].usage and own.usage and answers[0].usage.prompt_tokens > own.usage.prompt_tokens
        assert "ranks" not in found.status()
        assert found.get("/health") == {"status": "ok"}
        with pytest.raises(openai.AuthenticationError, match="API key"):
            found.client("wrong").models.list()
        assert [model.id for model in found.client("second-key").models.list()] == [MODEL]
        assert "first-key" not in found.running.err


@pytest.mark.slow
def test_a_file_of_options(tmp_path: Path) -> None:
    """It holds for the front and for the ranks; the command line wins; a mistake names its line and key."""
    path = tmp_path / "hippo.yaml"
    path.write_text("ranks: 3\nmodel_name: tales\nlayer-split: [6, 6]\nstop_words: [river, hill]\ninsecure: false\n")
    with server("--config", str(path), "--ranks", "2") as found:
        assert [model.id for model in found.client().models.list()] == ["tales"]
        assert len(found.rank_pids()) == 2
        assert found.status()["ranks"][0]["layers"] == [0, 6]
    for text, line in (
        ("ranks: 2\nfox: 1\n", "line 2: unknown key 'fox'"),
        ("port: 8080\nport: 8081\n", "line 2: duplicate key 'port'"),
        ("\nport: many\n", "line 2: argument --port: 'many' is not a port, from 0 to 65535"),
        ("insecure: perhaps\n", "line 1: insecure must be true or false"),
        ("port: {a: 1}\n", "line 1: port must be a value, or a list of values"),
        ("- port\n", "line 1: expected keys and values"),
        ("a: [\n", "is not YAML"),
    ):
        path.write_text(text)
        with ranks.single([SERVE, "--config", str(path)]) as refused:
            assert refused.wait() == 2
            assert line in refused.err and refused.err.count("error:") == 1


@pytest.mark.slow
def test_the_audit_log(tmp_path: Path) -> None:
    """A line for every request, however it ends; keys and texts as digests; verified by the command."""
    log, audit = tmp_path / "audit.jsonl", str(ranks.BIN / "hippo_mpi.audit")
    with server("--ranks", "1", "--audit-log", str(log), env={"HIPPO_API_KEYS": "secret-key"}) as found:
        client = found.client("secret-key")
        client.chat.completions.create(
            model=MODEL, messages=ASKED, max_tokens=5, n=2, temperature=0.5, stop=["secret word"], response_format=NAMED
        )
        stream = client.completions.create(
            model=MODEL, prompt="A fox", max_tokens=1900, stream=True, logit_bias=GOES_ON, temperature=2.0
        )
        next(iter(stream))
        stream.close()
        found.await_status(lambda status: status["requests"] == 0)
        echoed = client.completions.create(model=MODEL, prompt="A fox", max_tokens=2, echo=True)
    first, second, third = (json.loads(line) for line in log.read_text().splitlines())
    assert [choice["outcome"] for choice in first["choices"]] == ["length", "length"]
    assert {"max_tokens": 5, "temp": 0.5}.items() < first["parameters"].items()
    assert set(first["parameters"]) == {"max_tokens", "temp", "stop_words", "grammar"}
    assert second["choices"][0]["outcome"] == "abort"
    assert (third["prompt_tokens"], third["choices"][0]["tokens"]) == (echoed.usage.prompt_tokens, 2)
    assert third["prompt_digest"] == second["prompt_digest"] and third["choices"][0]["digest"] != third["prompt_digest"]
    assert "secret" not in log.read_text() and "fox" not in log.read_text()
    for lines, code in ((log.read_text(), 0), (log.read_text().replace('"length"', '"stop"', 1), 2)):
        log.write_text(lines)
        with ranks.single([audit, "verify", str(log)]) as verify:
            assert verify.wait() == code, verify.err


@pytest.mark.slow
def test_a_disk_too_full_for_the_audit_log(tmp_path: Path) -> None:
    """Requests are answered all the same, and counted; with --audit-required they are refused until there is room."""
    with small_disk(tmp_path / "disk") as folder:
        log = folder / "audit.jsonl"
        with server("--ranks", "1", "--audit-log", str(log), "--audit-text", "--audit-required") as found:
            ask = partial(found.client().completions.create, model=MODEL, prompt="A fox " * 400, max_tokens=2)
            ask()
            filler = fill(folder)
            ask()  # nobody could know
            with pytest.raises(openai.InternalServerError, match="the audit log can't be written, and this server"):
                ask()
            assert "hippo_audit_lost_requests 1.0" in found.get("/metrics")
            assert (
                "can't be written (No space left on device): 1 request answered without being logged"
                in found.running.err
            )
            filler.unlink()
            ask()
        verify = subprocess.run([ranks.BIN / "hippo_mpi.audit", "verify", log], capture_output=True, text=True)
        assert verify.stdout.splitlines()[:2] == [
            "intact: 3 lines in 1 file",
            "line 2: 1 request not logged (No space left on device)",
        ], verify.stderr


def test_others_need_a_key() -> None:
    with ranks.single([SERVE, "--address", "0.0.0.0"]) as refused:
        assert refused.wait() == 2
        assert refused.err.startswith("error: others could reach 0.0.0.0 without an API key")


@pytest.mark.slow
def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with ranks.single([SERVE, "--port", str(port)]) as refused:
            assert refused.wait() == 2
            assert f"error: can't listen on 127.0.0.1:{port}: Address already in use" in refused.err


@pytest.mark.slow
def test_a_model_that_is_missing() -> None:
    with ranks.single([SERVE, "--model", "./nowhere"]) as refused:
        assert refused.wait() == 2
        assert refused.err == "error: no such model folder: ./nowhere\n"


@pytest.mark.slow
def test_ranks_that_refuse_to_start() -> None:
    """Their one line says why, and nobody tries again."""
    with ranks.single([SERVE, "--layer-split", "1,2,3"]) as refused:
        assert refused.wait() == 2
        lines = [line for line in refused.err.splitlines() if line.startswith("error:")]
        assert lines[0].startswith("error: layer split 1,2,3")


@pytest.mark.slow
def test_layers_of_stages() -> None:
    """With --stages, a layer split has as many numbers as there are stages of several ranks."""
    staged = [SERVE, "--ranks", "4", "--parallel", "tensor", "--stages", "2", "--check"]
    for split, code in (("8,4", 0), ("3,3,3,3", 2)):
        with ranks.single([*staged, "--layer-split", split]) as checked:
            assert checked.wait() == code, checked.err


@pytest.mark.slow
def test_inside_a_launcher(wanted: str) -> None:
    """From rank 0, without a supervisor; a signal to rank 0 ends all."""
    with ranks.ring([[SERVE, "--port", "0"]] * 2) as running:
        found = Server(running[0])
        found.await_ready()
        answer = found.client().chat.completions.create(model=MODEL, messages=ASKED, max_tokens=40)
        assert answer.choices[0].message.content == wanted
        running[0].process.terminate()
        assert running[0].wait() != 0
        assert running[1].wait() != 0


@pytest.mark.slow
def test_launch_serve() -> None:
    """start, status, restart with the options and in the folder of the start, stop; keys are never written down. A front
    that dies is started again, where it was; options that are wrong don't end a server that is right."""
    root = ranks.BIN.parent.parent
    if not (root / "launch").exists():
        pytest.skip("the tests don't run in the project's own .venv")
    keys = {**os.environ, "HIPPO_API_KEYS": "key-of-a-fox"}

    def run(*words: str, **options: Any) -> Any:
        options = {"capture_output": True, "text": True, "timeout": 100, **options}
        return subprocess.run([str(root / "launch" / "serve"), *words], **options)

    began = run("start", "--port", "0", "--model", f"./{MODEL}", "--ranks", "1", env=keys, cwd=BUNDLED_MODEL.parent)
    try:
        assert began.returncode == 0, began.stderr
        assert began.stdout.startswith("ready: http://127.0.0.1:")
        again = run("start")
        assert again.returncode == 2 and "already running" in again.stderr
        table = run("status", env=keys).stdout
        assert re.search(r"^state     ready\nURL       http://\S+\nmodel     story-3m\nuptime    0:00:\d\d\n", table)
        assert "\nrequests  0 running, 0 waiting\nrestarts  0\n" in table
        assert re.search(r"^rank  host +layers +weights .* busy +hop\n0 .* 0-11 and head ", table, re.M)
        assert "HIPPO_API_KEYS" in run("status").stdout, "without the key: no hosts"
        before = json.loads(run("status", "--json", env=keys).stdout)
        assert before["ready"] is True and len(before["ranks"]) == 1

        without_keys = run("restart")
        assert without_keys.returncode == 2 and "started with HIPPO_API_KEYS" in without_keys.stderr
        restarted = run("restart", env=keys)
        assert restarted.returncode == 0, restarted.stderr
        assert restarted.stdout.startswith("stopped\nready: http://127.0.0.1:")
        after = json.loads(run("status", "--json", env=keys).stdout)
        assert after["ranks"] == before["ranks"] and after["uptime_s"] < 60
        assert not [file for file in (root / ".serve").iterdir() if b"key-of-a-fox" in file.read_bytes()]

        url = restarted.stdout.split()[-1]
        front = int((root / ".serve" / "front").read_text())
        os.kill(front, signal.SIGKILL)
        ends = time.monotonic() + 60
        while json.loads(run("status", "--json", env=keys).stdout or "{}").get("ready") is not True or front == int(
            (root / ".serve" / "front").read_text()
        ):
            assert time.monotonic() < ends, (root / ".serve" / "log").read_text()
            time.sleep(0.2)
        assert url in run("status", env=keys).stdout
        ps = ["ps", "-ww", "-o", "args=", "-p", (root / ".serve" / "front").read_text().strip()]
        words = subprocess.run(ps, capture_output=True, text=True).stdout.split()
        assert words.count("--port") == 1 and words[words.index("--port") + 1] == url.rpartition(":")[2]

        told = run("restart", "--help")
        assert told.returncode == 0 and "exits with 3 if no server runs" in told.stdout and not told.stderr
        assert run("status", env=keys).returncode == 0, "to ask for help stops nothing"

        wrong = run("restart", "--port", "many", env=keys)
        assert wrong.returncode == 2 and "'many' is not a port" in wrong.stderr and "stopped" not in wrong.stdout
        assert run("restart", "--model", "./nowhere", env=keys).stderr == "error: no such model folder: ./nowhere\n"
        checked = run("restart", "--ranks", "1", "--layer-split", "1,2,3", "--port", "0", env=keys)
        assert checked.returncode == 2 and "layer split 1,2,3" in checked.stderr and "stopped" not in checked.stdout
        refused = run("restart", "--ranks", "1", "--max-context", "2000000000", "--port", "0", env=keys)
        assert refused.returncode == 2 and "doesn't fit" in refused.stdout + refused.stderr
        assert refused.stdout.startswith("stopped\nready: "), "the one of before"
    finally:
        ended = run("stop")
    assert ended.stdout == "stopped\n"
    time.sleep(0.1)
    assert run("status").returncode == 3
