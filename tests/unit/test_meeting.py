"""Ranks that call each other: no stranger, no impostor and no dead address holds them up, or is taken for a rank."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest

from hippo_mpi.errors import LaunchError, RankError
from hippo_mpi.transport import world as worlds
from hippo_mpi.transport.frames import framed, read_frame
from hippo_mpi.transport.meeting import Meeting, in_own_thread
from hippo_mpi.transport.world import Launch, control_addresses

NAMES = ["rank 0 (here)", "rank 1 (here)", "rank 2 (there)"]
EXPECTED = {("ring", 2), ("star", 1), ("star", 2)}
Place = tuple[str, int]


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    yield
    if before:
        ends_s = time.monotonic() + 5
        while len(os.listdir("/proc/self/fd")) > before and time.monotonic() < ends_s:
            time.sleep(0.02)
        assert len(os.listdir("/proc/self/fd")) == before


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0), backlog=300) as listening:
        yield listening


def place_of(listening: socket.socket) -> Place:
    return listening.getsockname()[:2]  # type: ignore[no-any-return]


def call(kind: str, rank: int, *places: Place, key: bytes = b"key", timeout_s: float = 5.0) -> socket.socket:
    """The connection of a rank that calls rank 0."""
    return in_own_thread(Meeting(key, rank, NAMES).meet([], {kind: (0, places)}, set(), timeout_s))[0][kind]


def take(listening: socket.socket, timeout_s: float = 10.0) -> dict[tuple[str, int], socket.socket]:
    """The connections of all who call rank 0."""
    return in_own_thread(Meeting(b"key", 0, NAMES).meet([listening], {}, EXPECTED, timeout_s))[1]


@contextlib.contextmanager
def calls(*places: Place) -> Iterator[list[socket.socket]]:
    """All ranks call rank 0 at these places, each at its own time."""
    made: list[socket.socket] = []
    threads = [threading.Thread(target=lambda who=who: made.append(call(*who, *places))) for who in EXPECTED]
    for thread in threads:
        thread.start()
    try:
        yield made
    finally:
        for thread in threads:
            thread.join()
        for connection in made:
            connection.close()


def close(connections: dict[tuple[str, int], socket.socket]) -> None:
    for connection in connections.values():
        connection.close()


def test_strangers_hold_nobody_up(listener: socket.socket) -> None:
    """Some say nothing, some dribble, some lie; the ranks come behind them and are known."""
    strangers = [socket.create_connection(place_of(listener)) for _ in range(120)]
    for stranger in strangers[::3]:
        stranger.sendall(struct.pack("<I", 1 << 24))
    for stranger in strangers[1::3]:
        stranger.sendall(framed(b'{"kind": "star", "rank": 1, "nonce": "0"}') + framed(b"0"))
    with calls(place_of(listener)) as made:
        found = take(listener)
        found["star", 1].sendall(b"to the one that called")
    assert found.keys() == EXPECTED and len(made) == 3
    for connection in (*strangers, *found.values()):
        connection.close()


def test_who_does_not_come_is_named_in_time(listener: socket.socket) -> None:
    """A stranger's bytes, one at a time, don't lengthen the wait."""
    with socket.create_connection(place_of(listener)) as stranger:
        stranger.sendall(struct.pack("<I", 1000))
        threading.Timer(0.3, stranger.sendall, [b"x"]).start()
        began_s = time.monotonic()
        with pytest.raises(
            RankError,
            match=r"rank 0 \(here\) got no control connections from rank 1 \(here\), rank 2 \(there\)",
        ):
            take(listener, 0.6)
        assert time.monotonic() - began_s < 5


def test_an_older_stranger_gives_way(listener: socket.socket) -> None:
    """Also in the moment in which it says something."""
    with contextlib.ExitStack() as stack:
        strangers = [stack.enter_context(socket.create_connection(place_of(listener))) for _ in range(250)]
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
            with calls(place_of(listener)):
                close(take(listener))
        finally:
            ended.set()
            thread.join()


@pytest.mark.slow
def test_the_right_one_of_several_addresses_is_found(listener: socket.socket) -> None:
    """One refuses, one never answers, one is a stranger's who answers whatever it likes, one another run's rank."""
    with contextlib.ExitStack() as stack:
        refusing = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        places = [place_of(refusing)]
        refusing.close()
        silent = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        talking = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        other_run = stack.enter_context(socket.create_server(("127.0.0.1", 0)))

        def talk() -> None:
            for _ in EXPECTED:
                connection = stack.enter_context(talking.accept()[0])
                connection.sendall(framed(b'{"nonce": "0", "proof": "0"}'))

        def answer_with_another_key() -> None:
            with contextlib.suppress(RankError):
                in_own_thread(Meeting(b"another", 0, NAMES).meet([other_run], {}, EXPECTED, 2.0))

        threads = [threading.Thread(target=one) for one in (talk, answer_with_another_key)]
        for thread in threads:
            thread.start()
        places += [place_of(one) for one in (silent, talking, other_run, listener)]
        with calls(*places):
            close(take(listener))
        for thread in threads:
            thread.join()


def test_nobody_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, socket.create_server(("127.0.0.1", 0)) as gone:
        places = place_of(silent), place_of(gone)
        gone.close()
        told = rf"no control connection to rank 0 \(here\) at 127.0.0.1:{places[0][1]}, 127.0.0.1:{places[1][1]}: "
        with pytest.raises(RankError, match=told):
            call("star", 1, *places, timeout_s=0.5)
        with pytest.raises(RankError, match=r"Connect(ion refused| call failed)"):
            call("star", 1, places[1], timeout_s=60.0)  # at once


@pytest.mark.slow
def test_what_a_rank_said_to_a_stranger_opens_nothing(listener: socket.socket) -> None:
    """Who repeats a call and its proof has no proof for the new connection; nor who knows another key."""
    said: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as relay:

        def pass_on() -> None:
            with relay.accept()[0] as caller, socket.create_connection(place_of(listener)) as called:
                for source, target in ((caller, called), (called, caller), (caller, called)):
                    frame = read_frame(source)
                    assert frame is not None
                    said.append(frame)
                    target.sendall(framed(frame))
                read_frame(called)

        threads = [threading.Thread(target=one) for one in (pass_on, lambda: call("star", 1, place_of(relay)).close())]
        for thread in threads:
            thread.start()
        with pytest.raises(RankError, match=r"from rank 2 \(there\)"):  # rank 1 has come, by way of the relay
            take(listener, 1.5)
        for thread in threads:
            thread.join()
    with socket.create_connection(place_of(listener)) as again:
        again.sendall(framed(said[0]) + framed(said[2]))
        with pytest.raises(RankError, match=r"from rank 1 \(here\), rank 2 \(there\)"):
            take(listener, 0.5)


RING = (("10.0.0.9",), ("10.0.0.1", "10.0.0.33"), ("10.0.0.5",))


def test_rank_0_is_called_where_its_packets_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three hosts, joined in pairs: rank 0 has an address towards each of the others, and one in the LAN."""
    sources = {"10.0.0.1": "10.0.0.2", "10.0.0.33": "10.0.0.34", "10.0.0.5": "192.168.1.11"}
    monkeypatch.setattr(worlds, "_source_of", sources.get)
    monkeypatch.setenv("HIPPO_CONTROL", "192.168.1.11,172.16.0.1")
    assert control_addresses(Launch("ring", 0, 3, RING)) == (
        "10.0.0.9", "10.0.0.2", "10.0.0.34", "192.168.1.11", "172.16.0.1",
    )  # fmt: skip
    assert control_addresses(Launch("ring", 1, 3, RING)) == ("10.0.0.1",)
    monkeypatch.setenv("HIPPO_CONTROL", "mini1.local")
    with pytest.raises(LaunchError, match=r"HIPPO_CONTROL: 'mini1.local' is not an IPv4 address"):
        control_addresses(Launch("ring", 0, 3, RING))


def test_a_ring_on_one_machine_is_called_by_its_own_address_only() -> None:
    ring = (("127.3.4.5",),) * 2
    assert control_addresses(Launch("ring", 0, 2, ring)) == ("127.3.4.5",)


def test_a_rank_that_starts_too_late_for_the_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX's ring gives up by itself, however long ranks may wait."""

    def init(**options: object) -> None:
        raise RuntimeError("[ring] Couldn't connect (error: 111)")

    monkeypatch.setattr("mlx.core.distributed.init", init)
    with pytest.raises(LaunchError, match=r"rank 1 couldn't reach the next rank: .*; start all ranks within 15 s"):
        worlds.connect(Launch("ring", 1, 2, (("127.0.0.1",), ("127.0.0.1",))), 60)
