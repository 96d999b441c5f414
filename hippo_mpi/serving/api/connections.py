"""The limits of connections: their number, and how long a client may leave its answer unread.

When all places are taken, a new connection replaces the one that has been without a request for longest, so that idle
connections keep nobody out.
"""

from __future__ import annotations

import asyncio
import ipaddress
import resource
import socket
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol

UNREAD_S = 30.0  # after which a client that reads nothing of what waits for it is disconnected
_POLL_INTERVAL_S = 1.0
_MAX_PENDING = 64  # connections that were accepted, but have no place yet
_OTHER_DESCRIPTORS = 64 + _MAX_PENDING  # of files, ranks, logs
_NETWORK_DIVISOR = 2  # one client may have half of the places


class Connection(Protocol):
    """What `Connections` needs to know of a connection."""

    address: str
    network: str  # what counts as one client

    @property
    def silent_since_s(self) -> float | None:
        """When it was last answered, or opened, on time.monotonic(); None: a request or its answer is under way."""

    @property
    def unsent_bytes(self) -> int:
        """How much of its answers waits to be sent."""

    def abort(self) -> None:
        """Close it at once; what is unsent is lost."""


class Connections:
    """The open connections.

    Args:
        max_open: how many there may be at once.
        proxies: addresses or networks that stand for many clients, and may have all places.
    """

    def __init__(self, max_open: int, proxies: Sequence[str] = ()) -> None:
        self._max_open, self._max_per_network = max_open, max(1, max_open // _NETWORK_DIVISOR)
        self._proxies = [ipaddress.ip_network(proxy, strict=False) for proxy in proxies]
        self._open: dict[Connection, tuple[int, float]] = {}  # bytes unsent at the last look, since when not fewer
        self._by_network: Counter[str] = Counter()

    def admit(self, new: Connection) -> bool:
        """Find a place for a connection, if need be that of another, which is closed; return False if there is none."""
        if self._by_network[new.network] >= self._max_per_network and not self._is_proxy(new.address):
            rivals = [one for one in self._open if one.network == new.network]
        else:
            rivals = list(self._open) if len(self._open) >= self._max_open else []
        if rivals:
            silent = [(one.silent_since_s, index) for index, one in enumerate(rivals) if one.silent_since_s is not None]
            if not silent:
                return False
            gone = rivals[min(silent)[1]]
            self.remove(gone)
            gone.abort()
        self._open[new] = (0, time.monotonic())
        self._by_network[new.network] += 1
        return True

    def remove(self, connection: Connection) -> None:
        """Free the place of a closed connection; unknown ones are ignored."""
        if self._open.pop(connection, None) is not None:
            self._by_network[connection.network] -= 1
            if not self._by_network[connection.network]:
                del self._by_network[connection.network]

    async def watch(self) -> None:
        """Close connections whose clients read nothing for UNREAD_S; runs until it is cancelled."""
        while True:
            await asyncio.sleep(_POLL_INTERVAL_S)
            now = time.monotonic()
            for connection, (before, since_s) in list(self._open.items()):
                unsent = connection.unsent_bytes
                if not unsent or unsent < before:
                    since_s = now
                self._open[connection] = (unsent, since_s)
                if now - since_s > UNREAD_S:
                    connection.abort()

    def _is_proxy(self, address: str) -> bool:
        try:
            parsed = ipaddress.ip_address(address)
        except ValueError:
            return False
        return any(parsed in network for network in self._proxies)


class Listener(socket.socket):
    """A listening socket that closes connections at once for which there is no descriptor.

    It also counts those whose TLS handshake goes on: `Connections` learns of a connection only after that.

    Args:
        listener: the socket to take over.
        max_open: connections that may have a place at once.
    """

    def __init__(self, listener: socket.socket, max_open: int) -> None:
        super().__init__(fileno=listener.detach())
        self._accepted: list[socket.socket] = []
        self._max_accepted = max_open + _MAX_PENDING

    def accept(self) -> tuple[socket.socket, Any]:
        """Accept a connection.

        Raises:
            BlockingIOError: there are too many; it was closed.
        """
        connection, address = super().accept()
        if len(self._accepted) >= self._max_accepted:
            self._accepted = [one for one in self._accepted if one.fileno() >= 0]  # asyncio has closed the others
        if len(self._accepted) >= self._max_accepted:
            connection.close()
            raise BlockingIOError
        self._accepted.append(connection)
        return connection, address


def room_for_connections(wanted: int) -> int:
    """Raise the limit of descriptors as needed and permitted; return for how many connections it is enough."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + _OTHER_DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return wanted if soft == resource.RLIM_INFINITY else max(1, min(wanted, soft - _OTHER_DESCRIPTORS))
