"""One end of a link that is measured: listens or calls, then sends, receives, or answers. See `far_end`."""

from __future__ import annotations

import array
import fcntl
import hashlib
import hmac
import os
import platform
import queue
import secrets
import socket
import struct
import threading
import time
from typing import Any

from hippo_mpi.cluster.programs.far_end import contents_of, counters, serve

CONNECT_S = 5.0
WAIT_S = 8.0  # for the other end to call
_SILENT_S = 5.0  # of a connection
_PROOF_S = 2.0
_PIECE_BYTES = 1 << 20
_MAX_STRANGERS = 16
_WARM_UP = 0.2  # share of the time that isn't counted: windows grow, buffers fill
_listeners: dict[int, socket.socket] = {}


def main() -> None:
    """Obey, until standard input ends."""
    serve(_handle)


def _handle(question: dict[str, Any]) -> dict[str, Any]:
    do = question["do"]
    if do == "interfaces":
        return {name: _kind_of(name) for name in counters()} if platform.system() == "Linux" else {}
    if do == "counters":
        return dict(counters())
    if do == "listen":
        listener = socket.create_server((question["address"], 0), family=_family(question["address"]))
        port: int = listener.getsockname()[1]
        _listeners[port] = listener
        return {"port": port}
    if do == "accept":
        with _listeners.pop(question["port"]) as listener:
            sockets = _accepted(listener, question["token"].encode(), question["streams"])
    else:
        sockets = [_called(question) for _ in range(question["streams"])]
    try:
        done: dict[str, Any] = _ROLES[question["role"]](sockets, question)
        return done
    finally:
        for one in sockets:
            one.close()


def _family(address: str) -> int:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


# ---- who may take part: both ends prove that they know the token, which ssh has brought


def _proof(token: bytes, side: bytes, nonce: bytes) -> bytes:
    return hmac.new(token, side + nonce, hashlib.sha256).hexdigest().encode()


def _called(question: dict[str, Any]) -> socket.socket:
    """Call the other end.

    Not from a given address of our own: the ring leaves that to the system, too.
    """
    one = socket.create_connection((question["address"], question["port"]), question.get("connect_s", CONNECT_S))
    one.settimeout(CONNECT_S)
    token, nonce = question["token"].encode(), secrets.token_hex(32).encode()
    one.sendall(nonce)
    theirs, their_nonce = _read(one, 64), _read(one, 64)
    if not hmac.compare_digest(theirs, _proof(token, b"listener", nonce)):
        raise OSError("somebody else listens there")
    one.sendall(_proof(token, b"caller", their_nonce))
    return _ready(one)


def _accepted(listener: socket.socket, token: bytes, count: int) -> list[socket.socket]:
    """Return so many connections of the other end; strangers are sent away."""
    proved: queue.Queue[socket.socket] = queue.Queue()
    found: list[socket.socket] = []
    listener.settimeout(0.02)
    ends_s = time.monotonic() + WAIT_S
    slots = threading.Semaphore(_MAX_STRANGERS)
    while len(found) < count:
        if time.monotonic() > ends_s:
            raise OSError(f"nobody called within {WAIT_S:.0f} s")
        if slots.acquire(timeout=0.02):  # else the other end waits, too, until strangers have to go
            try:
                one, _ = listener.accept()
            except OSError:  # nobody yet
                slots.release()
            else:
                threading.Thread(target=_admit, args=(one, token, proved, slots), daemon=True).start()
        while not proved.empty():
            found.append(proved.get())
    return found


def _admit(one: socket.socket, token: bytes, proved: queue.Queue[socket.socket], slots: threading.Semaphore) -> None:
    try:
        one.settimeout(_PROOF_S)
        nonce = secrets.token_hex(32).encode()
        one.sendall(_proof(token, b"listener", _read(one, 64)) + nonce)
        if not hmac.compare_digest(_read(one, 64), _proof(token, b"caller", nonce)):
            raise OSError("a stranger")
        proved.put(_ready(one))
    except OSError:
        one.close()
    finally:
        slots.release()


def _ready(one: socket.socket) -> socket.socket:
    one.settimeout(_SILENT_S)
    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return one


def _read(one: socket.socket, count: int) -> bytes:
    data = bytearray(count)
    _read_into(one, data)
    return bytes(data)


def _read_into(one: socket.socket, data: bytearray) -> None:
    view = memoryview(data)
    while view:
        number = one.recv_into(view)
        if not number:
            raise OSError("the other end has hung up")
        view = view[number:]


# ---- what is done with the connections


def _ping(sockets: list[socket.socket], question: dict[str, Any]) -> dict[str, Any]:
    """Time round trips; return their seconds, fewer than asked for if they take too long."""
    one, data = sockets[0], bytearray(question["size"])
    times: list[float] = []
    ends_s = time.monotonic() + question["seconds"]
    while len(times) < question["count"] and time.monotonic() < ends_s:
        began_s = time.perf_counter()
        one.sendall(data)
        _read_into(one, data)
        times.append(round(time.perf_counter() - began_s, 7))
    return {"times": times}


def _echo(sockets: list[socket.socket], question: dict[str, Any]) -> dict[str, Any]:
    data = bytearray(question["size"])
    try:
        while True:
            _read_into(sockets[0], data)
            sockets[0].sendall(data)
    except OSError:
        return {}


def _send(sockets: list[socket.socket], question: dict[str, Any]) -> dict[str, Any]:
    """Send by all connections until the other end has enough."""
    ends_s = time.monotonic() + question["seconds"] + _SILENT_S

    def send(one: socket.socket) -> None:
        data = bytes(_PIECE_BYTES)
        try:
            while time.monotonic() < ends_s:
                one.sendall(data)
        except OSError:
            pass

    _in_threads(send, sockets)
    return {}


def _receive(sockets: list[socket.socket], question: dict[str, Any]) -> dict[str, Any]:
    """Receive by all connections for some time; return bytes per second while all of them were flowing."""
    seconds = question["seconds"]
    pieces: list[list[tuple[float, int]]] = [[] for _ in sockets]

    def receive(one: socket.socket) -> None:
        mine, data = pieces[sockets.index(one)], bytearray(_PIECE_BYTES)
        try:
            while not mine or mine[-1][0] - mine[0][0] < seconds:
                number = one.recv_into(data)
                if not number:
                    return
                mine.append((time.monotonic(), number))
        except OSError:
            pass

    _in_threads(receive, sockets)
    if not all(pieces):
        raise OSError("the other end sends nothing")
    begins_s = max(one[0][0] for one in pieces) + _WARM_UP * seconds
    ends_s = min(one[-1][0] for one in pieces)
    if ends_s - begins_s < seconds / 4:
        raise OSError("the other end has fallen silent")
    counted = sum(number for one in pieces for at_s, number in one if begins_s < at_s <= ends_s)
    return {"bytes_per_s": counted / (ends_s - begins_s)}


def _in_threads(work: Any, sockets: list[socket.socket]) -> None:
    threads = [threading.Thread(target=work, args=(one,), daemon=True) for one in sockets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


_ROLES: dict[str, Any] = {"ping": _ping, "echo": _echo, "send": _send, "receive": _receive}


# ---- what kind of link an interface of Linux is


def _kind_of(name: str) -> dict[str, Any]:
    """Return an interface's kind, and the bits per second that it has agreed on; None: unknown."""
    folder = f"/sys/class/net/{name}"
    driver = os.path.basename(os.path.realpath(f"{folder}/device/driver"))
    if name.startswith("thunderbolt") or driver == "thunderbolt-net":
        return {"kind": "thunderbolt", "bits_per_s": None}
    if name.startswith("wl") or os.path.isdir(f"{folder}/wireless") or f"{name}:" in contents_of("/proc/net/wireless"):
        return {"kind": "wifi", "bits_per_s": None}
    if name == "lo" or name.startswith(("tun", "wg", "tailscale", "utun")):
        return {"kind": "other", "bits_per_s": None}
    speed = _ethernet_speed(name)
    return {"kind": "ethernet" if speed else "other", "bits_per_s": speed}


def _ethernet_speed(name: str) -> int | None:
    """Ask the driver (ETHTOOL_GSET of SIOCETHTOOL)."""
    settings = array.array("B", struct.pack("I", 1) + bytes(40))
    request = struct.pack("16sP", name.encode()[:15], settings.buffer_info()[0])
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
            fcntl.ioctl(one, 0x8946, request)
    except OSError:
        return None
    low, high = struct.unpack_from("H", settings, 12)[0], struct.unpack_from("H", settings, 28)[0]
    megabits = high << 16 | low
    return None if megabits in (0, 0xFFFF, 0xFFFFFFFF) else megabits * 1_000_000
