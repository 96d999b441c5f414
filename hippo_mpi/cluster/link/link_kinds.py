"""What kinds of links give, and which kind each interface of a host is. What can't be told has no expectation."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hippo_mpi.cluster.asking.facts import Probed, printed

_WIRED_S, _MOST_WIRED_S = 0.4e-3, 2e-3  # usual round trips, and what is too long
_MAX_BITS_PER_S = 1e15  # of what a host may say
_TCP_SHARE = 0.94  # of an Ethernet link's rate: what headers leave
_LEAST_ETHERNET, _LEAST_THUNDERBOLT = 0.8, 0.25  # of a link's rate: below is slow


@dataclass(frozen=True)
class LinkKind:
    """What a kind of link gives to TCP in one direction, in bits per second, and its round trips, in seconds.

    Args:
        name: for people.
        usual_bits_per_s: as users report it.
        least_bits_per_s: below that something is wrong.
        usual_s: a round trip of a small message.
        most_s: above that something is wrong.
    """

    name: str
    usual_bits_per_s: float
    least_bits_per_s: float
    usual_s: float
    most_s: float


WIFI = LinkKind("Wi-Fi", 0.5e9, 0.2e9, 5e-3, 20e-3)
_USUAL_THUNDERBOLT = {20e9: 9e9, 40e9: 16.4e9, 80e9: 30e9, 120e9: 30e9}  # by the link's rate


def ethernet(bits_per_s: float) -> LinkKind:
    """Return what Ethernet of a rate gives."""
    name = f"{bits_per_s / 1e9:g} GbE" if bits_per_s >= 1e9 else f"{bits_per_s / 1e6:g} Mbit/s Ethernet"
    return LinkKind(name, _TCP_SHARE * bits_per_s, _LEAST_ETHERNET * bits_per_s, _WIRED_S, _MOST_WIRED_S)


def thunderbolt(bits_per_s: float) -> LinkKind:
    """Return what Thunderbolt of a rate gives, which is far less than the rate."""
    usual = _USUAL_THUNDERBOLT.get(bits_per_s, 0.4 * bits_per_s)
    name = f"Thunderbolt {bits_per_s / 1e9:g} Gb/s"
    return LinkKind(name, usual, _LEAST_THUNDERBOLT * bits_per_s, _WIRED_S, _MOST_WIRED_S)


def slower_of(one: LinkKind | None, other: LinkKind | None) -> LinkKind | None:
    """Return the kind of a link with such ends."""
    return min((kind for kind in (one, other) if kind), key=lambda kind: kind.usual_bits_per_s, default=None)


def kinds_of(host: Probed, told: Mapping[str, Any]) -> dict[str, LinkKind]:
    """Return the kinds of a host's interfaces, by name.

    Args:
        host: with what macOS says of its ports.
        told: what Linux says of its interfaces: "kind" and "bits_per_s".
    """
    if host.facts and host.facts.system == "Darwin":
        texts = printed(host.raw.get("outputs", {}))
        return macos_kinds(*(texts.get(name, "") for name in ("ports", "addresses", "thunderbolt")))
    found = ((name, _linux_kind(about)) for name, about in told.items() if isinstance(about, dict))
    return {name: kind for name, kind in found if kind}


def _linux_kind(about: Mapping[str, Any]) -> LinkKind | None:
    rate = about.get("bits_per_s")
    if not isinstance(rate, int) or not 0 < rate < _MAX_BITS_PER_S:
        rate = None
    if about.get("kind") == "wifi":
        return WIFI
    if about.get("kind") == "thunderbolt":
        return thunderbolt(rate or 40e9)
    return ethernet(rate) if about.get("kind") == "ethernet" and rate else None


def macos_kinds(ports: str, addresses: str, buses: str) -> dict[str, LinkKind]:
    """Read `networksetup -listallhardwareports`, `ifconfig -a`, and `system_profiler SPThunderboltDataType -json`."""
    names = dict(re.findall(r"Hardware Port: (.+)\nDevice: (\S+)", ports))
    media = dict(re.findall(r"^(\w+): flags=(?:.*\n(?:\s.*\n)*?)\s+media: .*?\((\d+(?:\.\d+)?G?)base", addresses + "\n",
                            re.MULTILINE | re.IGNORECASE))  # fmt: skip
    receptacles = _receptacle_rates(buses)
    found = {}
    for name, device in names.items():
        receptacle = re.fullmatch(r"Thunderbolt (\d+)", name)
        if name == "Wi-Fi":
            found[device] = WIFI
        elif receptacle and receptacle[1] in receptacles:
            found[device] = thunderbolt(receptacles[receptacle[1]])
        elif name == "Thunderbolt Bridge" and receptacles:
            found[device] = thunderbolt(min(receptacles.values()))
        elif device in media:
            rate = media[device].upper()
            found[device] = ethernet(float(rate.rstrip("G")) * (1e9 if rate.endswith("G") else 1e6))
    return found


def _receptacle_rates(text: str) -> dict[str, float]:
    """Return the bits per second of each receptacle that has a cable, by its number."""
    found = {}
    try:
        for bus in json.loads(text)["SPThunderboltDataType"]:
            tag = bus.get("receptacle_1_tag", {})
            rate = re.fullmatch(r"(\d+) Gb/s", str(tag.get("current_speed_key", "")))  # "Up to" is no cable's
            if rate:
                found[str(tag.get("receptacle_id_key"))] = float(rate[1]) * 1e9
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    return found
