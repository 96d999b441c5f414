"""Pieces straight from host to host: who is let in, what is believed, and which link is taken; all in one process."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from hippo_mpi.cluster.sync import direct
from hippo_mpi.cluster.sync.direct import Borrower, Lender, LinkError, NotLentError, addresses_beside, read_addresses
from hippo_mpi.cluster.sync.frames import PIECE_BYTES
from hippo_mpi.cluster.sync.links import Links
from hippo_mpi.cluster.sync.pieces import Piece
from hippo_mpi.cluster.sync.site import RefusalError, Site
from hippo_mpi.errors import UserError
from hippo_mpi.views.spans import Span

KEY = bytes(range(32))
DATA = os.urandom(3 << 20)


def read(name: str, span: Span) -> tuple[bytearray, str]:
    if name != "f":
        raise UserError(f"{name} is damaged there")
    data = bytearray(DATA[slice(*span)])
    return data, hashlib.sha256(data).hexdigest()


@pytest.fixture
def port() -> int:
    return Lender(KEY, read).listen("127.0.0.1")


def borrowed(port: int, key: bytes = KEY, name: str = "f", span: Span = (5, 3 << 20)) -> tuple[bytearray, str]:
    return Borrower(lambda: None).borrow([("127.0.0.1", port)], key, name, span)


# ---- two hosts


def test_pieces_over_one_connection(port: int) -> None:
    told: list[None] = []
    borrower = Borrower(lambda: told.append(None))
    for span in ((5, 3 << 20), (0, 1)):
        data, digest = borrower.borrow([("127.0.0.1", port)], KEY, "f", span)
        assert data == DATA[slice(*span)] and digest == hashlib.sha256(data).hexdigest() and told
    with pytest.raises(NotLentError, match="g is damaged there"):
        borrower.borrow([("127.0.0.1", port)], KEY, "g", (0, 1))
    for name, span in (("../f", (0, 1)), ("f", (0, PIECE_BYTES + 1)), ("f", (5, 2))):
        with pytest.raises(NotLentError, match="no"):
            borrower.borrow([("127.0.0.1", port)], KEY, name, span)
    assert len(borrower._links) == 1


def test_who_does_not_know_the_key_gets_nothing(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor keeps others from it; and who calls is told nothing by a stranger that listens."""
    monkeypatch.setattr(direct, "_PROOF_S", 0.3)
    strangers = [socket.create_connection(("127.0.0.1", port)) for _ in range(direct._MAX_STRANGERS // 2)]
    for stranger in strangers:
        stranger.sendall(bytes(32))
        assert len(stranger.recv(64, socket.MSG_WAITALL)) == 64
    strangers[0].sendall(bytes(32) + b'\0\0\0\x30\0\0\0\0{"name": "f", "start": 0, "stop": 9}            ')
    assert borrowed(port)[0] == DATA[5:]
    with pytest.raises(LinkError, match="somebody else listens there"):
        borrowed(port, bytes(32))
    for stranger in strangers:
        stranger.settimeout(30)
        with contextlib.suppress(ConnectionResetError):  # what it said wasn't read
            assert not stranger.recv(1)
        stranger.close()


def test_strangers_who_say_nothing_keep_nobody_out(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for as long as they have to prove who they are."""
    monkeypatch.setattr(direct, "_PROOF_S", 1.0)
    with contextlib.ExitStack() as stack:
        for _ in range(direct._MAX_STRANGERS):
            stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        assert borrowed(port)[0] == DATA[5:]


def test_many_hosts_may_call_at_the_same_time(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over links on which a proof takes a while."""
    sign, count = direct._sign, 4 * direct._MAX_STRANGERS

    def slow(key: bytes, side: str, said: bytes) -> bytes:
        if side == "borrower":
            time.sleep(0.05)
        return sign(key, side, said)

    monkeypatch.setattr(direct, "_sign", slow)
    with ThreadPoolExecutor(count) as pool:
        found = list(pool.map(lambda _: borrowed(port, span=(0, 9))[0], range(count)))
    assert found == [bytearray(DATA[:9])] * count


def between(port: int, change: Callable[[bytearray], None]) -> int:
    """A machine in the middle, which changes what the lender says."""
    listener = socket.create_server(("127.0.0.1", 0))

    def pass_on(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)

    def serve() -> None:
        with listener, listener.accept()[0] as caller, socket.create_connection(("127.0.0.1", port)) as lender:
            threading.Thread(target=pass_on, args=[caller, lender], daemon=True).start()
            caller.sendall(lender.recv(64, socket.MSG_WAITALL))
            answer = bytearray()
            while len(answer) < 1 << 20:
                answer += lender.recv(1 << 16)
            change(answer)
            with contextlib.suppress(OSError):
                caller.sendall(answer)
            pass_on(lender, caller)

    threading.Thread(target=serve, daemon=True).start()
    return int(listener.getsockname()[1])


def test_a_byte_that_flips_on_the_way(port: int) -> None:
    """The digest is the lender's own, whatever comes with it."""

    def flip(answer: bytearray) -> None:
        answer[1 << 19] ^= 1

    data, digest = borrowed(between(port, flip))
    assert digest == hashlib.sha256(DATA[5:]).hexdigest() != hashlib.sha256(data).hexdigest()

    def forge(answer: bytearray) -> None:
        place = answer.index(b'"digest": "') + 11
        answer[place] = ord("1") if answer[place] == ord("0") else ord("0")

    with pytest.raises(LinkError, match="hasn't signed"):
        borrowed(between(port, forge))


def test_links_that_end_or_fall_silent(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "_SILENCE_S", 0.2)
    with pytest.raises(LinkError, match="nothing moved"):
        borrowed(between(port, lambda answer: time.sleep(2)))
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        free = nobody.getsockname()[1]
    with pytest.raises(LinkError, match=r"127.0.0.1: Connection refused"):
        borrowed(free)
    with pytest.raises(LinkError, match="no address"):
        Borrower(lambda: None).borrow([], KEY, "f", (0, 1))
    assert Borrower(lambda: None).borrow([("127.0.0.1", free), ("127.0.0.1", port)], KEY, "f", (0, 1))[0] == DATA[:1]


@pytest.mark.parametrize("found", [5, [["mini2", 80]], [["10.0.0.1", 0]], [["10.0.0.1", 65536]], [["10.0.0.1", True]], [["10.0.0.1"]]])  # fmt: skip
def test_addresses_that_are_none(found: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        read_addresses(found)


def test_nobody_lends_on_a_loopback() -> None:
    assert addresses_beside(["127.0.0.1"], ["127.0.0.1"]) == {}
    assert addresses_beside(["10.205.0.1"], ["240.0.0.1"]) == {"10.205.0.1": []}


# ---- which link


class Fake(Site):
    """A host in this process: lends at one address, beside another, and borrows as it is told."""

    def __init__(self, name: str, own: str, beside: str, *says: dict[str, Any]) -> None:
        self.name, self._own, self._beside, self.says, self.asked = name, own, beside, [*says], []  # type: ignore[var-annotated]

    def ask(self, header: dict[str, Any], data: Any = b"") -> tuple[dict[str, Any], bytearray]:
        if header["op"] == "lend":
            if not self._own:
                raise RefusalError("'lend' is nothing that can be asked")
            return {"lends": [["10.1.0.9", 9, []], [self._own, 4000, [self._beside]]]}, bytearray()
        self.asked.append(header["from"])
        return self.says.pop(0) if self.says else {"is_good": True}, bytearray()


PIECE = Piece("f", 0, 8, (0,), (1, 2))


def test_the_cable_that_both_are_on_and_the_fastest_of_them() -> None:
    goal = Fake("a", "10.0.1.1", "10.0.1.2")
    sites = [goal, Fake("b", "10.0.1.2", "10.0.1.1"), Fake("c", "10.0.2.2", "10.0.2.1")]
    links = Links(sites, [["10.0.1.1", "10.0.2.1"], ["10.0.1.2"], []], pytest.fail)
    assert [links.bring(PIECE, [1, 2], 0) for _ in range(2)] == [1, 2]  # whose pace isn't known comes first
    assert goal.asked == [[("10.0.1.2", 4000)], [("10.0.2.2", 4000)]]
    links._paces = {(1, 0): 2e-6, (2, 0): 1e-6}
    assert links.bring(PIECE, [1, 2], 0) == 2
    assert links.bring(PIECE, [], 0) is None


def test_links_that_fail_are_told_once_and_not_used_again() -> None:
    told: list[str] = []
    goal = Fake(
        "a", "10.0.1.1", "10.0.1.2", {"is_good": False, "link": "silent\x1b"}, {"not_lent": "damaged"}, {}, {}, {}
    )
    sites = [goal, Fake("b", "10.0.1.2", "10.0.1.1"), Fake("c", "10.0.1.3", "10.0.1.1"), Fake("old", "", "")]
    links = Links(sites, [["10.0.1.1"], ["10.0.1.2"], ["10.0.1.3"], ["10.0.1.4"]], told.append)
    assert links.bring(PIECE, [1, 2], 0) is None and len(goal.asked) == 2
    assert told == [r"no direct way from b to a (silent\x1b): the rest goes through this machine, by ssh"]
    assert links.bring(PIECE, [1, 2, 3], 0) is None and len(goal.asked) == 5
    assert told[1:] == [
        "no direct way from c to a (f doesn't arrive as it is sent): the rest goes through this machine, by ssh"
    ]
    assert links.bring(PIECE, [1, 2, 3], 0) is None and len(goal.asked) == 5


def test_without_addresses_in_the_hostfile_nobody_listens() -> None:
    sites = [Fake("a", "10.0.1.1", ""), Fake("b", "10.0.1.2", "")]
    assert Links(sites, [[], []], pytest.fail).bring(PIECE, [1], 0) is None
