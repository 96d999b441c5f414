"""What a server says of itself while its ranks don't get on."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
import time
import urllib.error
from pathlib import Path
from typing import Any

import pytest

from tests.servers import GOES_ON, MODEL, Server, server

pytestmark = pytest.mark.slow
STUCK = """
import os, signal, time
if "HIPPO_FRONT" in os.environ:
    released = []
    def stick(*_):
        while not released:
            time.sleep(0.1)
    signal.signal(signal.SIGUSR1, stick)
    signal.signal(signal.SIGUSR2, lambda *_: released.append(1))
"""


def ask(running: Server) -> None:
    running.client().completions.create(model=MODEL, prompt="A fox", max_tokens=150, logit_bias=GOES_ON)


@pytest.mark.parametrize("ranks", ["1", "2"])
def test_a_main_thread_that_is_stuck(tmp_path: Path, ranks: str) -> None:
    """Its process lives and beats: only the watchdog knows. /ready says so, long before the ranks are given up."""
    (tmp_path / "sitecustomize.py").write_text(STUCK)
    with server("--ranks", ranks, "--timeout", "12", env={"PYTHONPATH": str(tmp_path)}) as running:
        assert running.get("/health?deep=1") == {"status": "ok"}
        asking = threading.Thread(target=ask, args=(running,))
        asking.start()
        running.await_status(lambda status: status["running"] == 1)
        rank = running.rank_pids()[0]
        os.kill(rank, signal.SIGUSR1)
        # "said nothing" if it was caught in the middle of a message, whose lock it holds
        found = re.compile("no rank has made progress for|no heartbeat from rank 0 for")
        running.await_status(lambda status: not status["ready"] and bool(found.search(status["state"])))
        with pytest.raises(urllib.error.HTTPError, match="503"):
            running.get("/ready")
        assert running.get("/health") == {"status": "ok"}
        with contextlib.suppress(ProcessLookupError):  # the watchdog may have been first
            os.kill(rank, signal.SIGUSR2)
        running.await_ready()
        asking.join(60)
        assert running.get("/health?deep=1") == {"status": "ok"}


def test_a_rank_0_that_is_stopped() -> None:
    """It says nothing; nobody has asked for anything."""
    with server("--ranks", "1", "--timeout", "60", env={"HIPPO_API_KEYS": "fox"}) as running:
        with pytest.raises(urllib.error.HTTPError, match="401"):
            running.get("/health?deep=1")
        (rank,) = running.rank_pids()
        os.kill(rank, signal.SIGSTOP)
        try:
            running.await_status(lambda status: "no heartbeat from rank 0 for" in status["state"])
            began = time.monotonic()
            found: Any = None
            try:
                running.get("/health?deep=1", {"Authorization": "Bearer fox"}, timeout_s=30)
            except urllib.error.HTTPError as error:
                found = error.code, error.read().decode()
            assert found and found[0] == 503 and "no heartbeat from rank 0 for" in found[1]
            assert time.monotonic() - began < 30
        finally:
            os.kill(rank, signal.SIGCONT)
        running.await_ready()
