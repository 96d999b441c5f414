"""Frames on a program's standard streams, or a socket: a line of JSON, and bytes of a file behind it. Loads no MLX."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import struct
import time
from collections.abc import Callable
from typing import Any

PIECE_BYTES = 16 << 20
"""The most bytes of a file in a frame."""
MARK = b"hippo-sync-begins\n"
"""What comes before it is no frame, but what a shell prints at each login."""
_LENGTHS = struct.Struct(">II")
_MAX_HEADER_BYTES = 32 << 20  # the pieces of a model of a terabyte
_READ_BYTES = 1 << 20
_MAX_NOISE_BYTES = 1 << 20

Data = bytes | bytearray
Header = dict[str, Any]


class FrameError(Exception):
    """The other side has ended, is silent, or says what is no frame."""


class Frames:
    """Frames that come from one descriptor and go to another.

    Args:
        source: to read from.
        sink: to write to.
        silence_s: without a byte, after which the other side counts as gone.
        on_bytes: called for all that arrives.
    """

    def __init__(self, source: int, sink: int, silence_s: float, on_bytes: Callable[[], None] = lambda: None) -> None:
        self._source, self._sink, self._silence_ms, self._on_bytes = source, sink, silence_s * 1000, on_bytes
        self._polls = select.poll(), select.poll()
        self._polls[0].register(source, select.POLLIN)
        self._polls[1].register(sink, select.POLLOUT)
        for descriptor in (source, sink):
            os.set_blocking(descriptor, False)
            with contextlib.suppress(OSError, AttributeError):  # no pipe, or not on Linux
                fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, _READ_BYTES)

    def send(self, header: Header, data: Data = b"") -> None:
        """Send a frame.

        Raises:
            FrameError: the other side doesn't take it.
        """
        line = json.dumps(header).encode()
        for part in (_LENGTHS.pack(len(line), len(data)) + line, data):
            self.write(part)

    def write(self, data: Data) -> None:
        """Send bytes as they are.

        Raises:
            FrameError: the other side doesn't take them.
        """
        left = memoryview(data)
        while left:
            try:
                left = left[os.write(self._sink, left) :]
            except BlockingIOError:
                self._wait(1)
            except OSError as error:
                raise FrameError(f"the connection ended ({error.strerror})") from None

    def receive(self) -> tuple[Header, bytearray]:
        """Return the next frame's header and data.

        Raises:
            FrameError: there is none.
        """
        header_bytes, data_bytes = _LENGTHS.unpack(self._read(_LENGTHS.size))
        if header_bytes > _MAX_HEADER_BYTES or data_bytes > PIECE_BYTES:
            raise FrameError(f"a frame of {header_bytes:,} and {data_bytes:,} bytes")
        try:
            header = json.loads(self._read(header_bytes))
        except (ValueError, RecursionError):
            raise FrameError("a frame that is no JSON") from None
        if not isinstance(header, dict):
            raise FrameError("a frame that is no object")
        return header, self._read(data_bytes)

    def await_mark(self) -> None:
        """Read up to the mark, for as long as a silence may last.

        Raises:
            FrameError: it doesn't come.
        """
        seen, ends_s = bytearray(), time.monotonic() + self._silence_ms / 1000
        while not seen.endswith(MARK):
            seen += self._read(1)
            if len(seen) > _MAX_NOISE_BYTES or time.monotonic() > ends_s:
                raise FrameError("its shell prints without end")

    def _read(self, count: int) -> bytearray:
        data = bytearray(count)
        left = memoryview(data)
        while left:
            try:
                got = os.readv(self._source, [left[:_READ_BYTES]])
            except BlockingIOError:
                self._wait(0)
                continue
            except OSError as error:
                raise FrameError(f"the connection ended ({error.strerror})") from None
            if not got:
                raise FrameError("the connection ended")
            left = left[got:]
            self._on_bytes()
        return data

    def _wait(self, side: int) -> None:
        if not self._polls[side].poll(self._silence_ms):
            raise FrameError(f"nothing moved for {self._silence_ms / 1000:.0f} s")
