"""Links between machines, as people report them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Link:
    """A link between machines: seconds of latency, including the receiver's wake-up, and bytes per second."""

    latency_s: float
    bytes_per_s: float
    name: str = ""


# TCP through MLX's ring as users report it, not the cable's nominal rate. Measure yours with hippo_mpi.benchmark.
LINKS = [
    Link(300e-6, 16e9 / 8, "thunderbolt4"),
    Link(300e-6, 30e9 / 8, "thunderbolt5"),
    Link(300e-6, 9.4e9 / 8, "10gbe"),
    Link(3e-3, 0.5e9 / 8, "wifi"),
]
