"""Length-prefixed frames on a TCP connection."""

from __future__ import annotations

import socket
import struct

_LENGTH = struct.Struct("<I")
_MAX_FRAME_BYTES = 1 << 24


def framed(data: bytes) -> bytes:
    """Return `data` with its length in front."""
    return _LENGTH.pack(len(data)) + data


def read_frame(connection: socket.socket) -> bytes | None:
    """Return one frame's data; None when the connection closed."""
    head = _read_exactly(connection, _LENGTH.size)
    if head is None:
        return None
    (length,) = _LENGTH.unpack(head)
    return _read_exactly(connection, length) if length <= _MAX_FRAME_BYTES else None


def _read_exactly(connection: socket.socket, count: int) -> bytes | None:
    data = b""
    while len(data) < count:
        piece = connection.recv(count - len(data))
        if not piece:
            return None
        data += piece
    return data
