"""Times messages around the ring: rank 0 sends and times them, every other rank passes them on."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from hippo_mpi.transport.channel import Channel

SIZES_BYTES = (8, 64, 512, 4 << 10, 8 << 10, 64 << 10, 512 << 10, 4 << 20, 64 << 20)
_SMALL_BYTES = 1 << 20
_NUM_SMALL, _NUM_LARGE = 200, 5
_MAX_MESSAGE_S = 2.0  # sizes whose messages would take longer, over a slow link, are left out


@dataclass(frozen=True)
class Hop:
    """Times of a message from one rank to the next, including its announcement on the control socket."""

    size_bytes: int
    median_s: float
    p95_s: float


def echo(channel: Channel) -> None:
    """Pass messages on, up to and including one without a header."""
    while True:
        message = channel.receive()
        message.wait()
        channel.send(message.header, message.arrays)
        if not message.header:
            return


def time_ring(
    channel: Channel,
    num_ranks: int,
    progress: Callable[[str], None],
    sizes_bytes: Sequence[int] = SIZES_BYTES,
    num_small: int = _NUM_SMALL,
) -> list[Hop]:
    """Send messages of growing size round the ring and time them; every other rank must be in `echo`.

    Args:
        channel: rank 0's.
        num_ranks: hops in a round.
        progress: told what is being timed.
        sizes_bytes: of the messages, in growing order.
        num_small: how many of up to 1 MiB are sent of each size.

    Returns:
        Times of one hop for each size.
    """
    hops: list[Hop] = []
    for size in sizes_bytes:
        if hops and hops[-1].median_s * size / hops[-1].size_bytes > _MAX_MESSAGE_S and size > _SMALL_BYTES:
            break
        progress(f"timing messages of {size} bytes")
        message = mx.zeros((size // 4,), mx.float32)
        mx.eval(message)
        times = []
        for _ in range(num_small if size <= _SMALL_BYTES else _NUM_LARGE):
            began = time.perf_counter()
            channel.send(b"ring", [message])
            channel.receive().wait()
            times.append((time.perf_counter() - began) / num_ranks)
        times.sort()
        hops.append(Hop(size, statistics.median(times), times[len(times) * 95 // 100]))
    channel.send(b"", [])
    channel.receive()
    return hops
