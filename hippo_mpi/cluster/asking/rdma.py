"""Whether Macs can use RDMA over Thunderbolt, and the one reason why not. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass

from hippo_mpi.cluster.asking.macos import MacFacts

_FIRST_VERSION = (26, 2)
_FAST_GBPS = 80  # Thunderbolt 5; 4 has 40


@dataclass(frozen=True)
class NoRdma:
    """Why a Mac has no RDMA.

    Args:
        why: in words; also if it isn't known.
        is_final: no setting changes it.
        is_too_old: its macOS has none.
        is_off: it only has to be switched on.
    """

    why: str
    is_final: bool = False
    is_too_old: bool = False
    is_off: bool = False


def has_thunderbolt_5(mac: MacFacts) -> bool | None:
    """Return True if its ports are Thunderbolt 5, as they or its chip say; None: unknown."""
    ports = mac.ports or ()
    rates = [rate for port in ports for rate in (port.idle_gbps, port.linked_gbps) if rate]
    if max(rates, default=0) >= _FAST_GBPS:
        return True
    if any(port.idle_gbps for port in ports):
        return False
    chip = re.match(r"Apple M(\d+)(?: (Pro|Max|Ultra))?$", mac.chip or "")
    if not chip:
        return None
    generation, kind = int(chip[1]), chip[2]
    if kind is None:
        return False if generation <= 5 else None
    return generation >= (3 if kind == "Ultra" else 4)


def why_no_rdma(mac: MacFacts) -> NoRdma | None:
    """Return why a Mac has no RDMA; None: it has, and it is on."""
    fast = has_thunderbolt_5(mac)
    if fast is False:
        return NoRdma("its Thunderbolt 4 has no RDMA", is_final=True)
    version = re.match(r"(\d+)(?:\.(\d+))?", mac.version or "")
    if version and (int(version[1]), int(version[2] or 0)) < _FIRST_VERSION:
        return NoRdma(f"macOS {mac.version} has no RDMA, which begins with 26.2", is_too_old=True)
    if fast is None or not version:
        return NoRdma("it is not known whether it has Thunderbolt 5 and macOS 26.2")
    if mac.rdma is not True:
        is_off = mac.rdma is False
        return NoRdma("its RDMA is off" if is_off else "it is not known whether its RDMA is on", is_off=is_off)
    return None
