"""A server for tests: hippo_mpi.serve in a process group of its own, and clients for it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai

from hippo_mpi.config.bundled import BUNDLED_MODEL
from tests import ranks

MODEL = "story-3m"
GOES_ON = {str(token): -100 for token in json.loads((BUNDLED_MODEL / "config.json").read_text())["eos_token_id"]}
"""A logit bias with which the bundled model never ends an answer."""
JSON = {"Content-Type": "application/json"}
SERVE = str(ranks.BIN / "hippo_mpi.serve")
FAULTS = {
    "killed": signal.SIGKILL,
    "stopped": signal.SIGSTOP,
    "raises": signal.SIGUSR1,
    "loses its links": signal.SIGUSR2,
}
"""Signals by what they make of a rank; the last two where the environment is WITH_FAULTS."""
WITH_FAULTS = {"PYTHONPATH": os.pathsep.join(str(Path(__file__).parent / name) for name in ("faults", "quick_starts"))}
_READY_S = 60


class Server:
    """A server that listens."""

    def __init__(self, running: ranks.Rank) -> None:
        self.running = running
        running.await_output("listening on http://", "stderr")
        found = re.search(r"listening on (http://\S+)", running.err)
        assert found, running.err
        self.url = found[1]

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=90)

    def get(self, path: str, headers: dict[str, str] | None = None, timeout_s: float = 10) -> Any:
        """A JSON answer, or another one's text."""
        request = urllib.request.Request(self.url + path, headers=headers or {})
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            text, is_json = answer.read().decode(), "json" in answer.headers["content-type"]
        return json.loads(text) if is_json else text

    def status(self) -> dict[str, Any]:
        """/ready, whatever its status."""
        try:
            return dict(self.get("/ready"))
        except urllib.error.HTTPError as error:
            return dict(json.loads(error.read()))

    def await_ready(self) -> None:
        self.await_status(lambda status: bool(status["ready"]))

    def await_status(self, is_reached: Callable[[dict[str, Any]], bool]) -> None:
        ends = time.monotonic() + _READY_S
        while not is_reached(self.status()):
            assert time.monotonic() < ends, f"{self.status()}: {self.running.err}"
            assert self.running.process.poll() is None, self.running.err
            time.sleep(0.05)

    def rank_pids(self) -> list[int]:
        """The ranks that it has started, rank 0 first."""
        return sorted(ranks.descendants(self.running.process.pid))


@contextlib.contextmanager
def server(*options: str, env: dict[str, str] | None = None) -> Iterator[Server]:
    """hippo_mpi.serve with ranks of its own, on a free port."""
    with ranks.single([SERVE, "--port", "0", *options], env=env) as running:
        found = Server(running)
        found.await_ready()
        try:
            yield found
        finally:
            below = found.rank_pids()
            running.process.terminate()
            assert running.wait(20) == 0, running.err
            assert not ranks.await_end(below)
