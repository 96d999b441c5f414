"""Length-prefixed frames on a TCP connection."""

from __future__ import annotations

import socket
import struct

LENGTH = struct.Struct("<I")
"""Of what is in front of a frame's data: their length in bytes."""
_MAX_FRAME_BYTES = 1 << 24


def framed(data: bytes) -> bytes:
    """Return `data` with its length in front."""
    return LENGTH.pack(len(data)) + data


def read_frame(connection: socket.socket) -> bytes | None:
    """Wait for one frame and return its data; None if the connection is closed or the frame is too long."""
    head = _read_exactly(connection, LENGTH.size)
    if head is None:
        return None
    (length,) = LENGTH.unpack(head)
    return _read_exactly(connection, length) if length <= _MAX_FRAME_BYTES else None


def _read_exactly(connection: socket.socket, count: int) -> bytes | None:
    data = b""
    while len(data) < count:
        piece = connection.recv(count - len(data))
        if not piece:
            return None
        data += piece
    return data


class FrameReader:
    """Reads frames that arrive in pieces without ever blocking, and no byte beyond the frame being read.

    Args:
        connection: read from while data is there.
        max_bytes: longest frame to accept.
    """

    def __init__(self, connection: socket.socket, max_bytes: int = _MAX_FRAME_BYTES) -> None:
        self._connection, self._max_bytes = connection, max_bytes
        self._data = bytearray()
        self._end = LENGTH.size  # of the head, then of the frame

    def read(self) -> bytes | None:
        """Return a frame's data once all of it has arrived; None until then.

        Raises:
            OSError: the connection is closed or broken, or the frame is too long.
        """
        while len(self._data) < self._end:
            try:
                piece = self._connection.recv(self._end - len(self._data), socket.MSG_DONTWAIT)
            except BlockingIOError:
                return None
            if not piece:
                raise ConnectionResetError("closed")
            self._data += piece
            if len(self._data) == LENGTH.size:
                self._end += self._length()
        data = bytes(self._data[LENGTH.size :])
        self._data.clear()
        self._end = LENGTH.size
        return data

    def _length(self) -> int:
        (length,) = LENGTH.unpack(self._data)
        if length > self._max_bytes:
            raise ConnectionResetError(f"received a frame of {length:,} bytes; the maximum is {self._max_bytes:,}")
        return int(length)
