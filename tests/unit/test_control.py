"""The watch thread and the handshake: no half frame, no stranger and no full disk holds them up."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from hippo_mpi.errors import RankError
from hippo_mpi.transport.frames import FrameReader, framed
from hippo_mpi.transport.handshake import await_callers, dial
from hippo_mpi.transport.world import World

LEFT_ALONE = """
import os, socket, struct, sys, time
os.environ["HIPPO_STATUS_FILE"] = "/nonexistent/folder/status"
from hippo_mpi.transport.control import Control, Peer
from hippo_mpi.transport.frames import FrameReader
from hippo_mpi.transport.world import World, write_status
control = Control(World(0, 1, "none", "here", "127.0.0.1"), 5.0, 1.0)
ours, theirs = socket.socketpair()
control.on_end = write_status
control._peers[1], control._readers[1], control._star[1] = Peer("rank 1 (there)", time.monotonic()), FrameReader(ours), ours
theirs.sendall(bytes.fromhex(sys.argv[1]))
control.idle()
time.sleep(10)
"""


@pytest.mark.parametrize("sent", [b"", struct.pack("<I", 200) + b'{"type": "beat"'], ids=["nothing", "half-a-frame"])
def test_a_silent_rank_ends_us(sent: bytes) -> None:
    """Nor does it matter that the status can't be written down."""
    found = subprocess.run([sys.executable, "-c", LEFT_ALONE, sent.hex()], capture_output=True, text=True, timeout=30)
    assert found.returncode == 3, found.stderr
    assert "error: rank 1 (there) answered last " in found.stderr


@pytest.mark.slow
def test_nobody_reads_what_went_wrong() -> None:
    """A full pipe doesn't keep a process that must end."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with pytest.raises(BlockingIOError):
        while True:
            os.write(writing, bytes(1 << 16))
    os.set_blocking(writing, True)
    running = subprocess.Popen([sys.executable, "-c", LEFT_ALONE, ""], stderr=writing)
    try:
        assert running.wait(30) == 3
    finally:
        running.kill()
        os.close(reading)
        os.close(writing)


def test_a_rank_that_is_alone_is_watched() -> None:
    code = LEFT_ALONE.partition("ours, theirs")[0] + "control.progress('computing step 1')\ntime.sleep(10)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert (found.returncode, found.stderr) == (3, "error: no rank got on for 1 s: rank 0 (here) is computing step 1\n")


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def test_frames_come_in_pieces(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    reader = FrameReader(ours, max_bytes=100)
    sent = framed(b"first") + framed(b"") + framed(b"third")
    got = []
    for byte in sent:
        theirs.sendall(bytes([byte]))
        if (frame := reader.read()) is not None:
            got.append(frame)
    assert got == [b"first", b"", b"third"]
    theirs.sendall(framed(b"last") + b"beyond")
    assert reader.read() == b"last"
    assert ours.recv(10) == b"beyond"  # whoever reads next finds it
    theirs.sendall(struct.pack("<I", 101))
    with pytest.raises(OSError, match="101 bytes, 100 at most"):
        reader.read()


def test_a_closed_connection_has_no_frames(pair: tuple[socket.socket, socket.socket]) -> None:
    pair[1].close()
    with pytest.raises(OSError, match="closed"):
        FrameReader(pair[0]).read()


WORLD = World(0, 3, "ring", "here", "127.0.0.1")
NAMES = ["rank 0 (here)", "rank 1 (here)", "rank 2 (there)"]
EXPECTED = {("ring", 2), ("star", 1), ("star", 2)}


def test_strangers_hold_nobody_up() -> None:
    """Some say nothing, some dribble, some lie; the ranks come behind them and are known."""
    key = b"key"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        strangers = [socket.create_connection(("127.0.0.1", port)) for _ in range(120)]
        for stranger in strangers[::3]:
            stranger.sendall(struct.pack("<I", 1 << 24))
        for stranger in strangers[1::3]:
            stranger.sendall(framed(b'{"kind": "star", "rank": 1, "proof": "0"}'))
        me = {"host": "here", "address": "127.0.0.1", "port": port}
        connections = []

        def call() -> None:
            for kind, rank in EXPECTED:
                caller = World(rank, 3, "ring", "here", "127.0.0.1")
                connections.append(dial(me, caller, key, kind, 5.0))

        thread = threading.Thread(target=call)
        thread.start()
        found = await_callers(listener, EXPECTED, key, WORLD, NAMES, 10.0)
        thread.join()
        assert found.keys() == EXPECTED
        for connection in (*strangers, *connections, *found.values()):
            connection.close()


def test_who_does_not_come_is_named_in_time() -> None:
    """A stranger's bytes, one at a time, don't lengthen the wait."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as stranger,
    ):
        stranger.sendall(struct.pack("<I", 1000))
        threading.Timer(0.3, stranger.sendall, [b"x"]).start()
        began_s = time.monotonic()
        with pytest.raises(
            Exception, match=r"waited in vain for control connections of rank 1 \(here\), rank 2 \(there\)"
        ):
            await_callers(listener, EXPECTED, b"key", WORLD, NAMES, 0.6)
        assert time.monotonic() - began_s < 5


def test_an_end_that_waits_in_vain_has_a_deadline() -> None:
    """Even while the interpreter's lock is held, as MLX and MPI do: no thread could end it."""
    code = (
        "import ctypes\nfrom hippo_mpi.transport.world import end_within\nend_within(0.3, 'in vain')\n"
        "ctypes.PyDLL(None).sleep(20)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=15)
    assert (found.returncode, found.stderr) == (3, "error: in vain\n")


def test_an_older_stranger_gives_way_in_the_same_moment() -> None:
    """It has just said something when its place is taken."""
    with socket.create_server(("127.0.0.1", 0), backlog=300) as listener, contextlib.ExitStack() as stack:
        strangers = [stack.enter_context(socket.create_connection(listener.getsockname())) for _ in range(250)]
        ended = threading.Event()
        for stranger in strangers:
            stranger.sendall(struct.pack("<I", 4000))

        def dribble() -> None:
            while not ended.wait(0.001):
                for stranger in strangers:
                    with contextlib.suppress(OSError):
                        stranger.send(b"x")

        thread = threading.Thread(target=dribble)
        thread.start()
        try:
            with pytest.raises(RankError, match="waited in vain"):
                await_callers(listener, EXPECTED, b"key", WORLD, NAMES, 1.0)
        finally:
            ended.set()
            thread.join()
