"""Bytes of a model's files from one host straight to another, by an address that the hostfile names. Loads no MLX.

The host that has them lends: it listens where only its neighbor's packets arrive, on a port of the system's choice, as
long as its program runs. Each connection begins with a proof by both ends that they know the sync's key, which ssh has
brought. What follows isn't encrypted, as a ring's data aren't; but each piece is signed.
"""

from __future__ import annotations

import contextlib
import hmac
import ipaddress
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence

from hippo_mpi.cluster.sync.frames import PIECE_BYTES, FrameError, Frames
from hippo_mpi.cluster.sync.model_files import check_name
from hippo_mpi.errors import UserError
from hippo_mpi.views.spans import Span

Address = tuple[str, int]
Reader = Callable[[str, Span], tuple[bytearray, str]]
"""Returns a piece of a file, and its SHA-256."""
_NONCE_BYTES = _PROOF_BYTES = 32
_MAX_STRANGERS = 16  # that haven't proved yet who they are; others wait
_PROOF_S = 5.0  # for a connection, and as long again for a caller's proof; a lender has twice that, for it may be busy
_SILENCE_S = 10.0  # in the middle of a piece
_IDLE_S = 600.0  # between pieces
_RETRY_S = 0.1


class LinkError(Exception):
    """A host can't be reached directly, or the link to it fails."""


class NotLentError(Exception):
    """The other host can be reached, and says why it can't lend that piece."""


def addresses_beside(own: Iterable[str], others: Iterable[str]) -> dict[str, list[str]]:
    """Return the addresses at which this host lends, and for each the addresses of others that are in its network.

    Args:
        own: this host's addresses for data, as the hostfile has them.
        others: those of other hosts; where one is a neighbor's, this host's end of the cable counts, too.
    """
    found: dict[str, list[str]] = {address: [] for address in own if not ipaddress.ip_address(address).is_loopback}
    for other in others:
        with contextlib.suppress(OSError), socket.socket(_family(other), socket.SOCK_DGRAM) as asking:
            asking.setsockopt(socket.SOL_SOCKET, socket.SO_DONTROUTE, 1)
            asking.connect((other, 9))  # sends nothing
            address = asking.getsockname()[0]
            if not ipaddress.ip_address(address).is_loopback:
                found.setdefault(address, []).append(other)
    return found


class Lender:
    """Lends pieces to whoever knows the key.

    Args:
        key: of the sync.
        read: where pieces come from.
    """

    def __init__(self, key: bytes, read: Reader) -> None:
        self._key, self._read = key, read
        self._strangers = threading.Semaphore(_MAX_STRANGERS)

    def listen(self, address: str) -> int:
        """Lend at an address, until the process ends; return the port.

        Raises:
            OSError: it isn't this host's.
        """
        listener = socket.create_server((address, 0), family=_family(address))
        threading.Thread(target=self._accept, args=[listener], daemon=True).start()
        port: int = listener.getsockname()[1]
        return port

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                caller, _ = listener.accept()
            except OSError:  # such as too many open files
                time.sleep(_RETRY_S)
                continue
            self._strangers.acquire()  # all hosts of a sync may call at the same time
            threading.Thread(target=self._lend, args=[caller], daemon=True).start()

    def _lend(self, caller: socket.socket) -> None:
        with caller, contextlib.suppress(OSError, FrameError):
            try:
                ends_s = time.monotonic() + _PROOF_S
                nonces = _read(caller, _NONCE_BYTES, ends_s) + secrets.token_bytes(_NONCE_BYTES)
                caller.sendall(nonces[_NONCE_BYTES:] + _sign(self._key, "lender", nonces))
                if not hmac.compare_digest(_read(caller, _PROOF_BYTES, ends_s), _sign(self._key, "borrower", nonces)):
                    return
            finally:
                self._strangers.release()
            frames, session = Frames(caller.fileno(), caller.fileno(), _IDLE_S), _sign(self._key, "pieces", nonces)
            while True:
                asked, _ = frames.receive()
                try:
                    span = int(asked["start"]), int(asked["stop"])
                    if not 0 <= span[0] <= span[1] <= span[0] + PIECE_BYTES:
                        raise UserError(f"bytes {span[0]:,} to {span[1]:,} are no piece")
                    name = check_name(asked["name"])
                    data, digest = self._read(name, span)
                except (UserError, OSError, KeyError, ValueError, TypeError) as error:
                    frames.send({"error": str(error)})
                    continue
                frames.send({"digest": digest, "signed": _sign_piece(session, name, span, digest)}, data)


class Borrower:
    """Borrows pieces, over connections that are kept for the next piece.

    Args:
        on_bytes: called for all that arrives.
    """

    def __init__(self, on_bytes: Callable[[], None]) -> None:
        self._on_bytes = on_bytes
        self._links: dict[tuple[Address, ...], tuple[socket.socket, Frames, bytes]] = {}

    def borrow(self, lender: Sequence[Address], key: bytes, name: str, span: Span) -> tuple[bytearray, str]:
        """Return a piece, and its SHA-256 as the lender has signed it; whether that is so isn't looked at.

        Args:
            lender: its addresses, the best first.
            key: of the sync.
            name: of the file.
            span: the piece.

        Raises:
            LinkError: no address of the lender answers, or the link fails.
            NotLentError: the lender doesn't have it.
        """
        place = tuple(lender)
        if place not in self._links:
            self._links[place] = self._call(place, key)
        link, frames, session = self._links[place]
        try:
            frames.send({"name": name, "start": span[0], "stop": span[1]})
            answer, data = frames.receive()
            if "error" in answer:
                raise NotLentError(str(answer["error"]))
            digest, signed = str(answer.get("digest")), str(answer.get("signed"))
            if not hmac.compare_digest(signed.encode(), _sign_piece(session, name, span, digest).encode()):
                raise FrameError("a piece that the lender hasn't signed")
        except FrameError as error:
            self._links.pop(place)
            link.close()
            raise LinkError(str(error)) from None
        return data, digest

    def _call(self, lender: Iterable[Address], key: bytes) -> tuple[socket.socket, Frames, bytes]:
        why = "it lends at no address"
        for address in lender:
            link = None
            try:
                link = socket.create_connection(address, _PROOF_S)
                link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                nonces, ends_s = secrets.token_bytes(_NONCE_BYTES), time.monotonic() + 2 * _PROOF_S
                link.sendall(nonces)
                nonces += _read(link, _NONCE_BYTES, ends_s)
                if not hmac.compare_digest(_read(link, _PROOF_BYTES, ends_s), _sign(key, "lender", nonces)):
                    raise OSError("somebody else listens there")
                link.sendall(_sign(key, "borrower", nonces))
                frames = Frames(link.fileno(), link.fileno(), _SILENCE_S, self._on_bytes)
                return link, frames, _sign(key, "pieces", nonces)
            except OSError as error:
                if link:
                    link.close()
                why = f"{address[0]}: {error.strerror or error}"
            self._on_bytes()
        raise LinkError(why)


def read_addresses(found: object) -> list[Address]:
    """Return addresses and ports that another process says.

    Raises:
        ValueError, TypeError: they are none.
    """
    return [(str(ipaddress.ip_address(address)), _port(port)) for address, port in found]  # type: ignore[attr-defined]


def _port(number: object) -> int:
    if type(number) is not int or not 0 < number < 65_536:
        raise ValueError("no port")
    return number


def _sign(key: bytes, side: str, said: bytes) -> bytes:
    return hmac.digest(key, side.encode() + said, "sha256")


def _sign_piece(session: bytes, name: str, span: Span, digest: str) -> str:
    return _sign(session, "piece", f"{name}/{span[0]}/{span[1]}/{digest}".encode()).hex()


def _read(link: socket.socket, count: int, ends_s: float) -> bytes:
    """Return exactly so many bytes.

    Raises:
        OSError: they don't come in time.
    """
    data = b""
    while len(data) < count:
        link.settimeout(max(1e-3, ends_s - time.monotonic()))
        got = link.recv(count - len(data))
        if not got:
            raise OSError("it has hung up")
        data += got
    return data


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET
