"""How many connections there may be, and for how long one may refuse to take what it has asked for.

When all places are taken, a new connection gets that of one without a request, the longest silent first: connections that
only lie there keep nobody out.
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

UNREAD_S = 30.0  # that a client may read nothing of what waits for it
_LOOK_S = 1.0
_SPARE = 64  # connections that were accepted a moment ago, and have no place yet
_OTHER_DESCRIPTORS = 64 + _SPARE  # of files, ranks, logs
_NETWORK_SHARE = 2  # one client may have half of the places


class Connection(Protocol):
    """What is known of a connection."""

    address: str
    network: str  # what counts as one client

    @property
    def silent_since_s(self) -> float | None:
        """When it was answered last, or made, on time.monotonic(); None: a request or its answer is under way."""

    @property
    def unsent_bytes(self) -> int: ...

    def abort(self) -> None:
        """Close it at once, whatever is unsent."""


class Connections:
    """Those that are open.

    Args:
        most: at once.
        proxies: addresses or networks behind which there are many clients.
    """

    def __init__(self, most: int, proxies: Sequence[str] = ()) -> None:
        self._most, self._most_of_network = most, max(1, most // _NETWORK_SHARE)
        self._proxies = [ipaddress.ip_network(proxy, strict=False) for proxy in proxies]
        self._open: dict[Connection, tuple[int, float]] = {}  # bytes unsent at the last look, and since when no fewer
        self._by_network: Counter[str] = Counter()

    def admit(self, new: Connection) -> bool:
        """Find a place for a connection, that of another if need be; whether there is one."""
        if self._by_network[new.network] >= self._most_of_network and not self._is_proxy(new.address):
            rivals = [one for one in self._open if one.network == new.network]
        else:
            rivals = list(self._open) if len(self._open) >= self._most else []
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
        """It is closed; unknown ones are ignored."""
        if self._open.pop(connection, None) is not None:
            self._by_network[connection.network] -= 1
            if not self._by_network[connection.network]:
                del self._by_network[connection.network]

    async def watch(self) -> None:
        """End those that take nothing, for as long as the server lives."""
        while True:
            await asyncio.sleep(_LOOK_S)
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
            found = ipaddress.ip_address(address)
        except ValueError:
            return False
        return any(found in network for network in self._proxies)


class Listener(socket.socket):
    """A listening socket that turns away what no descriptor is kept for, also while TLS shakes hands: `Connections` isn't
    told of a connection before that.

    Args:
        listener: whose place it takes.
        most: connections at once.
    """

    def __init__(self, listener: socket.socket, most: int) -> None:
        super().__init__(fileno=listener.detach())
        self._accepted: list[socket.socket] = []
        self._most = most + _SPARE

    def accept(self) -> tuple[socket.socket, Any]:
        connection, address = super().accept()
        if len(self._accepted) >= self._most:
            self._accepted = [one for one in self._accepted if one.fileno() >= 0]  # asyncio has closed the others
        if len(self._accepted) >= self._most:
            connection.close()
            raise BlockingIOError
        self._accepted.append(connection)
        return connection, address


def room_for_connections(wanted: int) -> int:
    """Let this process open enough descriptors, if it may; returns for how many connections there are some."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + _OTHER_DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return wanted if soft == resource.RLIM_INFINITY else max(1, min(wanted, soft - _OTHER_DESCRIPTORS))
