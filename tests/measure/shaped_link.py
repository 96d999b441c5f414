"""A cable with a given latency and bandwidth: a TCP relay, for links that this machine doesn't have."""

from __future__ import annotations

import contextlib
import json
import queue
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator

from tests import ranks
from tests.ranks import Rank

_PIECE_BYTES = 1 << 16


@contextlib.contextmanager
def shaped_link(to_port: int, latency_s: float, bytes_per_s: float) -> Iterator[int]:
    """Relay local connections to `to_port`; yields the port to connect to instead."""
    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=_accept, args=(listener, to_port, latency_s, bytes_per_s), daemon=True).start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.close()


def _accept(listener: socket.socket, to_port: int, latency_s: float, bytes_per_s: float) -> None:
    with contextlib.suppress(OSError):
        while True:
            near, _ = listener.accept()
            far = _connect(to_port)
            for one in (near, far):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for source, sink in ((near, far), (far, near)):
                pieces: queue.Queue[tuple[float, bytes]] = queue.Queue()
                threading.Thread(target=_read, args=(source, pieces, latency_s, bytes_per_s), daemon=True).start()
                threading.Thread(target=_write, args=(sink, pieces), daemon=True).start()


def _connect(port: int) -> socket.socket:
    """Wait for a rank that doesn't listen yet."""
    ends = time.monotonic() + 30
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port))
        except ConnectionRefusedError:
            if time.monotonic() > ends:
                raise
            time.sleep(0.05)


def _read(
    source: socket.socket, pieces: queue.Queue[tuple[float, bytes]], latency_s: float, bytes_per_s: float
) -> None:
    free_at = 0.0
    piece = b"-"
    while piece:
        try:
            piece = source.recv(_PIECE_BYTES)
        except OSError:
            piece = b""
        free_at = max(free_at, time.monotonic()) + len(piece) / bytes_per_s
        pieces.put((free_at + latency_s, piece))


def _write(sink: socket.socket, pieces: queue.Queue[tuple[float, bytes]]) -> None:
    with contextlib.suppress(OSError):
        while True:
            due, piece = pieces.get()
            time.sleep(max(0.0, due - time.monotonic()))
            if not piece:
                sink.shutdown(socket.SHUT_WR)
                return
            sink.sendall(piece)


def run_over_link(command: str, options: list[str], preload: str, latency_s: float, bytes_per_s: float) -> Rank:
    """Rank 0 of a command, ended, on 2 ranks whose ring goes through shaped links."""
    first, second = ranks.free_ports(2)
    with contextlib.ExitStack() as stack:
        links = [stack.enter_context(shaped_link(port, latency_s, bytes_per_s)) for port in (first, second)]
        running = []
        for rank, ports in enumerate(((first, links[1]), (links[0], second))):
            hostfile = stack.enter_context(tempfile.NamedTemporaryFile("w", suffix=".json"))
            json.dump([[f"127.0.0.1:{port}"] for port in ports], hostfile)
            hostfile.flush()
            env = {"MLX_RANK": str(rank), "MLX_HOSTFILE": hostfile.name, "OPENBLAS_NUM_THREADS": "1"}
            env |= {"LD_PRELOAD": preload} if preload else {}
            pin = ["taskset", "-c", str(rank)] if sys.platform == "linux" else []
            running.append(ranks.start([*pin, str(ranks.BIN / command), *options], env))
            stack.callback(ranks.end, [running[-1]])
        if any([rank.wait(1800) for rank in running]):
            raise SystemExit(running[0].err)
        return running[0]
