"""The watch thread and the handshake: no half frame, no stranger and no full disk holds them up."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator

import pytest

from hippo_mpi.transport.frames import FrameReader, framed

LEFT_ALONE = """
import os, socket, struct, sys, time
os.environ["HIPPO_STATUS_FILE"] = "/nonexistent/folder/status"
from hippo_mpi.transport.control import Control, Peer
from hippo_mpi.transport.frames import FrameReader
from hippo_mpi.transport.world import World, write_status
control = Control(World(0, 1, "none", "here", ("127.0.0.1",)), 5.0, 1.0)
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
    assert "error: rank 1 (there) sent no heartbeat for " in found.stderr


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
    assert (found.returncode, found.stderr) == (
        3,
        "error: no rank made progress for 1 s: rank 0 (here) is computing step 1\n",
    )


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
    with pytest.raises(OSError, match="101 bytes; the maximum is 100"):
        reader.read()


def test_a_closed_connection_has_no_frames(pair: tuple[socket.socket, socket.socket]) -> None:
    pair[1].close()
    with pytest.raises(OSError, match="closed"):
        FrameReader(pair[0]).read()


@pytest.mark.slow
def test_an_end_that_waits_in_vain_has_a_deadline() -> None:
    """Even while the interpreter's lock is held, as MLX and MPI do: no thread could end it."""
    code = (
        "import ctypes\nfrom hippo_mpi.transport.world import end_within\nend_within(0.3, 'in vain')\n"
        "ctypes.PyDLL(None).sleep(20)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=15)
    assert (found.returncode, found.stderr) == (3, "error: in vain\n")
