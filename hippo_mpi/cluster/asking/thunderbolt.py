"""The Thunderbolt ports of a Mac, and what hangs on them: read from `system_profiler` and `networksetup`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

RDMA_SERVICE = 64087
"""Id of a service that a Mac seems to offer at a port only while its RDMA is on."""
_MAX_DEPTH = 8  # a chain of Thunderbolt devices has at most six
_SPEED = re.compile(r"(Up to )?(\d{1,4}) Gb/s")


@dataclass(frozen=True)
class Neighbor:
    """A Mac that a port sees.

    Args:
        domain: id of the other side's port.
        name: what it calls itself, such as Mac Studio.
        behind: the dock or hub in between; None: none is.
        offers_rdma: whether it offers RDMA there.
    """

    domain: str
    name: str
    behind: str | None = None
    offers_rdma: bool = False


@dataclass(frozen=True)
class Port:
    """A Thunderbolt port.

    Args:
        receptacle: its number, as System Information has it.
        domain: an id that no other port has; None: unknown.
        interface: its network interface; None: unknown.
        linked_gbps: rate of the cable that is plugged in, in Gbit/s; None: none is, or unknown.
        idle_gbps: what the port can, as it says while nothing is plugged in; None: unknown.
        neighbors: Macs that it sees.
        devices: docks, disks and the like that it sees.
    """

    receptacle: str
    domain: str | None = None
    interface: str | None = None
    linked_gbps: int | None = None
    idle_gbps: int | None = None
    neighbors: tuple[Neighbor, ...] = ()
    devices: tuple[str, ...] = ()


def read_hardware_ports(text: str) -> dict[str, str] | None:
    """Return the interfaces of `networksetup -listallhardwareports`, by the names of their ports; None: unknown."""
    return dict(re.findall(r"^Hardware Port: (.+)\nDevice: (\S+)", text, re.MULTILINE)) or None


def read_ports(text: str, hardware_ports: dict[str, str] | None) -> tuple[Port, ...] | None:
    """Return the ports of `system_profiler SPThunderboltDataType -json`, by number; None: unknown."""
    try:
        buses = json.loads(text)["SPThunderboltDataType"]
        found = [port for bus in buses for port in _ports_of(bus, hardware_ports or {})]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return tuple(sorted(found, key=lambda port: (len(port.receptacle), port.receptacle)))


def _ports_of(bus: dict[str, Any], hardware_ports: dict[str, str]) -> Iterator[Port]:
    """Read a bus: one port on Apple's own chips, and none for what is built in."""
    tag = next((bus[key] for key in sorted(bus) if re.fullmatch(r"receptacle_\d+_tag", key)), None)
    if tag is None or "receptacle_id_key" not in tag:
        return
    receptacle = str(tag["receptacle_id_key"])
    speed = _SPEED.match(str(tag.get("current_speed_key", "")))
    rate = int(speed[2]) if speed else None
    is_idle = bool(speed and speed[1]) or tag.get("receptacle_status_key") == "receptacle_no_devices_connected"
    neighbors, devices = _items_of(bus, None, 0)
    yield Port(
        receptacle,
        _text(bus.get("domain_uuid_key")),
        hardware_ports.get(f"Thunderbolt {receptacle}"),
        None if is_idle else rate,
        rate if is_idle else None,
        tuple(neighbors),
        tuple(devices),
    )


def _items_of(item: dict[str, Any], behind: str | None, depth: int) -> tuple[list[Neighbor], list[str]]:
    """Return the Macs and the devices below a bus or device."""
    neighbors: list[Neighbor] = []
    devices: list[str] = []
    for one in item.get("_items") or () if depth < _MAX_DEPTH else ():
        name = str(one.get("_name") or one.get("device_name_key") or "a device")
        if domain := _text(one.get("domain_uuid_key")):
            neighbors.append(Neighbor(domain, name, behind, _offers_rdma(one)))
            continue
        devices.append(name)
        below = _items_of(one, name, depth + 1)
        neighbors += below[0]
        devices += below[1]
    return neighbors, devices


def _offers_rdma(item: dict[str, Any]) -> bool:
    services = item.get("services_title") or ()
    return any(str(one.get("protocol_id", "")) == str(RDMA_SERVICE) for one in services if isinstance(one, dict))


def _text(value: Any) -> str | None:
    return value.upper() if isinstance(value, str) and value else None
