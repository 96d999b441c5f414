"""Several starts at the same moment on one machine: none may notice the others."""

from __future__ import annotations

import contextlib
import socket
import sys
import threading

import pytest

from tests import ranks
from tests.servers import SERVE, Server

LIMIT_S = 100.0
RUN = [sys.executable, "-m", "hippo_mpi.run", "--max-tokens", "8", "--start-timeout", "60"]
SERVER = [SERVE, "--port", "0", "--start-timeout", "60"]


def start_together(num_servers: int, num_runs: int) -> None:
    """Start servers and runs, and see that all come up on their first try and answer alike."""
    with contextlib.ExitStack() as stack:
        begun = [stack.enter_context(ranks.single(SERVER)) for _ in range(num_servers)]
        runs = [stack.enter_context(ranks.single(RUN)) for _ in range(num_runs)]
        servers = [Server(running) for running in begun]
        assert [run.wait(LIMIT_S) for run in runs] == [0] * num_runs, [run.err for run in runs]
        assert len({run.out for run in runs}) == 1
        for server in servers:
            server.await_ready()
            assert "hippo_restarts 0.0" in server.get("/metrics")
        for server in servers:
            server.running.process.terminate()
            assert server.running.wait(20) == 0, server.running.err


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a machine has one loopback address")
def test_a_stranger_on_the_rings_ports() -> None:
    """Who connects to every port of a start, before any rank does, isn't taken for a rank."""
    first, ended = ranks.consecutive_ports(2), threading.Event()

    def knock() -> None:
        while not ended.wait(0.005):
            for port in (first, first + 1):
                with contextlib.suppress(OSError):
                    knocked.append(socket.create_connection(("127.0.0.1", port)))

    knocked: list[socket.socket] = []
    stranger = threading.Thread(target=knock)
    stranger.start()
    try:
        with ranks.single([*RUN, "--starting-port", str(first)]) as run:
            assert run.wait(LIMIT_S) == 0, run.err
    finally:
        ended.set()
        stranger.join()
        for connection in knocked:
            connection.close()


@pytest.mark.slow
def test_six_at_once() -> None:
    start_together(3, 3)
