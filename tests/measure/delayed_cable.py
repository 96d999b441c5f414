"""A cable with a latency between two hosts of tests/cabled_hosts.py: two TAP devices, and a process that hands on frames.

Kernels without netem have no other. Linux and root only.
"""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing
import os
import select
import statistics
import struct
import subprocess
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tests.cabled_hosts import Host

_TUNSETIFF, _TAP_WITHOUT_HEADER = 0x400454CA, 0x1002
_MAX_FRAME_BYTES = 1 << 16
_SPIN_S = 300e-6  # before a frame is due, the clock is watched: sleeps end late
_MAX_NOTED = 10_000


@dataclass(frozen=True)
class DelayedCable:
    """Its addresses, and seconds that it has taken for frames of the size that is noted."""

    addresses: tuple[str, str]
    noted: Any

    @property
    def median_s(self) -> float:
        return statistics.median(delay for delay in self.noted if delay)

    @property
    def least_s(self) -> float:
        return min(delay for delay in self.noted if delay)


@contextlib.contextmanager
def delayed_cable(one: Host, other: Host, latency_s: float, frame_bytes: int) -> Iterator[DelayedCable]:
    """Join two hosts; a frame takes `latency_s` in either direction, or longer, if this machine is busy.

    Args:
        one: end.
        other: end.
        latency_s: at least.
        frame_bytes: the frames whose delays are noted.
    """
    ends = []
    addresses = "10.206.0.1", "10.206.0.2"
    noted = multiprocessing.get_context("fork").Array("d", _MAX_NOTED)
    for host, address in zip((one, other), addresses, strict=True):
        name = f"dl{os.getpid() % 100_000}{host.number}"
        descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _TAP_WITHOUT_HEADER))
        ends.append(descriptor)
        for words in (
            ["link", "set", name, "netns", host.namespace],
            ["-n", host.namespace, "addr", "add", f"{address}/30", "dev", name],
            ["-n", host.namespace, "link", "set", name, "up"],
        ):
            subprocess.run(["ip", *words], check=True, capture_output=True)
    carrier = multiprocessing.get_context("fork").Process(
        target=_carry, args=(ends, latency_s, frame_bytes, noted), daemon=True
    )
    carrier.start()
    try:
        yield DelayedCable(addresses, noted)
    finally:
        carrier.kill()
        carrier.join()
        for descriptor in ends:
            os.close(descriptor)


def _carry(ends: list[int], latency_s: float, frame_bytes: int, noted: Any) -> None:
    underway: deque[tuple[float, int, bytes]] = deque()
    count = 0
    while True:
        left_s = underway[0][0] - time.monotonic() if underway else 1.0
        ready, _, _ = select.select(ends, [], [], max(0.0, left_s - _SPIN_S))
        for end in ready:
            with contextlib.suppress(OSError):
                while True:
                    frame = os.read(end, _MAX_FRAME_BYTES)
                    underway.append((time.monotonic() + latency_s, ends[1 - ends.index(end)], frame))
        while underway and underway[0][0] <= time.monotonic():
            due_s, end, frame = underway.popleft()
            with contextlib.suppress(OSError):
                os.write(end, frame)
            if len(frame) == frame_bytes and count < _MAX_NOTED:
                noted[count] = time.monotonic() - due_s + latency_s
                count += 1
