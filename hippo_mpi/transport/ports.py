"""Ports for the ranks of this machine, held until MLX has bound them.

A port that was only looked for may be taken by another start before its rank binds it. So a start holds its ports: it
binds them for itself, and then allows that somebody binds them again who asks for that, as MLX's ring does. Another
start's look at them fails, whenever it comes.
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
"""The name, and the address, with which a hostfile says that a rank runs where mlx.launch does."""
_TRIES, _MAX_COUNT = 1_000, 1_000
_random = random.SystemRandom()  # processes that were forked from one must not draw alike


def new_loopback() -> str:
    """Return an address of this machine that hardly anybody else uses, for a ring that is only for this machine's ranks.

    MLX takes whoever connects first for the next rank, and knows no proof. On Linux a whole network leads back to the
    machine; elsewhere only one address does.
    """
    if sys.platform != "linux":
        return THIS_MACHINE
    return ".".join(["127", *(str(_random.randrange(1, 255)) for _ in range(3))])


class HeldPorts:
    """So many local TCP ports in a row, this process's until `close`.

    Raises:
        LaunchError: there are none.
    """

    def __init__(self, count: int) -> None:
        self._sockets: list[socket.socket] = []
        if count > _MAX_COUNT:
            raise LaunchError(f"{count:,} ranks on this machine are too many: {_MAX_COUNT} at most")
        for _ in range(_TRIES):
            self.first = _random.randrange(FIRST, LAST - count)
            try:
                for port in range(self.first, self.first + count):
                    self._hold(port)
                return
            except OSError:
                self.close()
        raise LaunchError(f"no {count} free ports in a row between {FIRST} and {LAST}")

    def _hold(self, port: int) -> None:
        holder = socket.socket()
        self._sockets.append(holder)
        holder.bind(("", port))  # fails if anybody has it, however they bound it
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what Linux asks before MLX may bind it
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # and macOS

    def close(self) -> None:
        """Let go of them."""
        for holder in self._sockets:
            holder.close()
        self._sockets.clear()

    def __enter__(self) -> HeldPorts:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()
