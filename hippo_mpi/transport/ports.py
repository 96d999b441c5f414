"""Ports for the ranks of this machine, held until MLX has bound them.

A port that was merely found free may be taken by another start before its rank binds it. So a start holds its ports: it
binds them exclusively, and then sets the options with which they can be bound again by a process that asks for it, as
MLX's ring does. An exclusive bind by another start fails at any time.
"""

from __future__ import annotations

import random
import socket
import sys
from types import TracebackType

from hippo_mpi.errors import LaunchError

# Below the ports that systems give to outgoing connections, and below mlx.launch's own 32323.
FIRST, LAST = 10_000, 32_000
THIS_MACHINE = "127.0.0.1"
"""The host name, and the address, of ranks on mlx.launch's own machine in a hostfile."""
_TRIES, _MAX_COUNT = 1_000, 1_000
_random = random.SystemRandom()  # processes forked from one parent must not pick the same numbers


def new_loopback() -> str:
    """Return a loopback address that hardly anybody else uses, for a ring among this machine's ranks only.

    MLX takes whoever connects first for the next rank, without authentication. On Linux all of 127.0.0.0/8 is loopback;
    elsewhere only 127.0.0.1 is.
    """
    if sys.platform != "linux":
        return THIS_MACHINE
    return ".".join(["127", *(str(_random.randrange(1, 255)) for _ in range(3))])


class HeldPorts:
    """Consecutive local TCP ports, held by this process until `close`; `first` is the lowest.

    Args:
        count: how many.

    Raises:
        LaunchError: there aren't that many free ports in a row.
    """

    def __init__(self, count: int) -> None:
        self._sockets: list[socket.socket] = []
        if count > _MAX_COUNT:
            raise LaunchError(f"{count:,} ranks on this machine exceed the limit of {_MAX_COUNT}")
        for _ in range(_TRIES):
            self.first = _random.randrange(FIRST, LAST - count)
            try:
                for port in range(self.first, self.first + count):
                    self._hold(port)
                return
            except OSError:
                self.close()
        raise LaunchError(f"no {count} consecutive free ports between {FIRST} and {LAST}")

    def _hold(self, port: int) -> None:
        holder = socket.socket()
        self._sockets.append(holder)
        holder.bind(("", port))  # fails if anybody has bound it, with whatever options
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what Linux requires before MLX may bind it
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # and macOS

    def close(self) -> None:
        """Release the ports."""
        for holder in self._sockets:
            holder.close()
        self._sockets.clear()

    def __enter__(self) -> HeldPorts:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()
