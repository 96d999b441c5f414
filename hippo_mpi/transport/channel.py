"""Messages between neighbours on the ring: a few bytes of header and some arrays.

A message is announced (header, shapes of its arrays) before its arrays have been computed, so that the next rank
can build its graph on them meanwhile. `RingChannel` announces over the control socket and sends the arrays over
`mx.distributed`; several arrays travel as one packed message, because two sends may overtake each other.
`LocalChannel` does the same inside one process, for tests.

Communication and computation are never part of one evaluation: arrays are evaluated before they are sent, and received
ones are evaluated (`Message.wait`) before anything that was built on them. On Apple GPUs a kernel that waits for the
network hangs the machine.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

from hippo_mpi.errors import DesyncError
from hippo_mpi.transport.control import Control
from hippo_mpi.transport.layout import Layout
from hippo_mpi.transport.world import World

_DTYPES = {
    str(dtype).removeprefix("mlx.core."): dtype
    for dtype in (
        mx.bool_, mx.uint8, mx.uint16, mx.uint32, mx.int8, mx.int16, mx.int32, mx.int64,
        mx.float16, mx.bfloat16, mx.float32, mx.complex64,
    )
}  # fmt: skip
_ALIGN = 8  # a view at an offset that isn't a multiple of the item size reads the wrong bytes
_SENT = b""  # the frame that says that the last announcement's arrays are being sent
_MAX_SENDS_IN_FLIGHT = 4  # MLX blocks the calling thread while ten tasks are active


Queue = deque[tuple[bytes, list[mx.array]]]


@dataclass
class Message:
    """An announced message; graphs may be built on `arrays` at once, but evaluated only after `wait`."""

    header: bytes
    arrays: list[mx.array]
    wait: Callable[[], None]


class Channel(Protocol):
    """Sends to the next rank of the ring and receives from the previous one."""

    def announce(self, header: bytes, arrays: Sequence[mx.array]) -> None:
        """Announce the next message; its arrays may be unevaluated, and must be delivered before the next one."""

    def deliver(self, arrays: Sequence[mx.array]) -> None:
        """Send the announced arrays, which are evaluated by now; return before they have arrived."""

    def receive(self) -> Message:
        """Wait for the next announcement from the previous rank."""

    def send(self, header: bytes, arrays: Sequence[mx.array]) -> None:
        """Announce and deliver evaluated arrays."""
        self.announce(header, arrays)
        self.deliver(arrays)


class LocalChannel(Channel):
    """A channel inside one process, for tests.

    Args:
        inbox: queue shared with the previous rank's channel.
        outbox: queue shared with the next rank's channel.
        pump: called while the inbox is empty, to make the previous rank do its next operation.
    """

    def __init__(self, inbox: Queue, outbox: Queue, pump: Callable[[], object]) -> None:
        self._inbox, self._outbox, self._pump = inbox, outbox, pump
        self._header = b""

    def announce(self, header: bytes, arrays: Sequence[mx.array]) -> None:
        """Remember the header; queue the message at once if it has no arrays."""
        self._header = header
        if not arrays:
            self._outbox.append((header, []))

    def deliver(self, arrays: Sequence[mx.array]) -> None:
        """Queue the announced message."""
        if arrays:
            self._outbox.append((self._header, list(arrays)))

    def receive(self) -> Message:
        """Return the next message, running the previous rank until there is one."""
        while not self._inbox:
            self._pump()
        return Message(*self._inbox.popleft(), wait=lambda: None)


class RingChannel(Channel):
    """A channel over `mx.distributed`; announcements, and notes that their arrays follow, use the control socket.

    If a neighbour is gone, the control connection ends this rank (`Control.fail`); nothing is raised here.
    """

    def __init__(self, world: World, control: Control, layout: Layout) -> None:
        self._world, self._control = world, control
        self._before, self._behind = layout.neighbours(world.rank)
        # A single stream for both would deadlock once two ranks send each other more than the eager limit.
        self._send_stream = mx.new_stream(mx.cpu)
        self._receive_stream = mx.new_stream(mx.cpu)
        self._in_flight: deque[mx.array] = deque()
        # Messages received with arrays, and seconds spent receiving these once they were being sent.
        self.num_hops, self.hop_s = 0, 0.0

    def announce(self, header: bytes, arrays: Sequence[mx.array]) -> None:
        """Send header and shapes over the control socket."""
        shapes = [[str(a.dtype).removeprefix("mlx.core."), *a.shape] for a in arrays]
        self._control.announce(len(header).to_bytes(2, "little") + header + json.dumps(shapes).encode())

    def deliver(self, arrays: Sequence[mx.array]) -> None:
        """Begin to send the announced arrays, as one message; wait for the oldest send if too many are in flight."""
        if not arrays:
            return
        self._control.announce(_SENT)
        payload = arrays[0] if len(arrays) == 1 else pack(arrays)
        sending = mx.distributed.send(payload, self._behind, group=self._world.group, stream=self._send_stream)
        mx.async_eval(sending)  # type: ignore[no-untyped-call]
        self._in_flight.append(sending)
        if len(self._in_flight) > _MAX_SENDS_IN_FLIGHT:
            with self._control.waiting("waiting for the next rank to take a message"):
                mx.eval(self._in_flight.popleft())

    def receive(self) -> Message:
        """Wait for the next announcement and post the receive of its arrays, which `Message.wait` completes."""
        frame = self._control.await_announcement()
        if frame == _SENT:
            raise DesyncError("the arrays of another message came before the next one was announced")
        length = int.from_bytes(frame[:2], "little")
        header, shapes = frame[2 : 2 + length], json.loads(frame[2 + length :])
        if not shapes:
            return Message(header, [], wait=lambda: None)
        if len(shapes) == 1:
            dtype, *shape = shapes[0]
            wanted, kind = tuple(shape), _DTYPES[dtype]
        else:
            wanted, kind = (sum(_padded_bytes(s) for s in shapes),), mx.uint8
        payload = mx.distributed.recv(wanted, kind, self._before, group=self._world.group, stream=self._receive_stream)
        arrays = [payload] if len(shapes) == 1 else unpack(payload, shapes)

        def wait() -> None:
            if self._control.await_announcement() != _SENT:  # sleeps until then, whereas MLX's receives spin
                raise DesyncError("a message was announced before the arrays of the one before it had come")
            began = time.perf_counter()
            mx.eval(payload)
            self.num_hops, self.hop_s = self.num_hops + 1, self.hop_s + time.perf_counter() - began
            mx.eval(arrays)

        return Message(header, arrays, wait)

    def flush(self) -> None:
        """Wait until all sends have completed."""
        while self._in_flight:
            mx.eval(self._in_flight.popleft())


def pack(arrays: Sequence[mx.array]) -> mx.array:
    """Return one evaluated uint8 array with the bytes of all arrays, each padded to a multiple of 8 bytes."""
    parts = []
    for array in arrays:
        flat = mx.contiguous(array).reshape(-1).view(mx.uint8)
        parts.append(mx.pad(flat, (0, -flat.size % _ALIGN)))
    packed = mx.concatenate(parts)
    mx.eval(packed)
    return packed


def unpack(packed: mx.array, shapes: Sequence[Sequence[str | int]]) -> list[mx.array]:
    """Return the unevaluated arrays, each described by [dtype, *shape], that `pack` made `packed` from."""
    arrays, start = [], 0
    for entry in shapes:
        dtype, shape = _DTYPES[str(entry[0])], tuple(int(n) for n in entry[1:])
        size = _num_bytes(entry)
        flat = mx.contiguous(packed[start : start + size])
        arrays.append(flat.view(dtype).reshape(shape) if size else mx.zeros(shape, dtype))
        start += _padded_bytes(entry)
    return arrays


def _num_bytes(entry: Sequence[str | int]) -> int:
    size = _DTYPES[str(entry[0])].size
    for n in entry[1:]:
        size *= int(n)
    return size


def _padded_bytes(entry: Sequence[str | int]) -> int:
    return (_num_bytes(entry) + _ALIGN - 1) // _ALIGN * _ALIGN
