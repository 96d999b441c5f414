"""What a rank says of itself: in every beat, and at its end. No MLX."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec


class RankStatus(msgspec.Struct, frozen=True, omit_defaults=True):
    """What changes while a rank works; sums since it was started.

    Attributes:
        busy_s: seconds of work.
        cache_bytes: of its KV caches.
        num_hops, hop_s: messages with arrays that it received, and seconds that they took.
        peak_resident_bytes: of its process.
        num_in_flight: steps on their way around the ring; None but on rank 0.
    """

    busy_s: float
    cache_bytes: int
    num_hops: int
    hop_s: float
    peak_resident_bytes: int
    num_in_flight: int | None = None


@dataclass(frozen=True)
class RankStatistics:
    """A rank's layers [start, stop) and memory, at its end."""

    host: str
    layers: tuple[int, int]
    weight_bytes: int
    peak_memory_bytes: int
    peak_resident_bytes: int
