"""What is known of a Linux machine beyond what every host says: outputs of its commands, and files, read.

What can't be read is unknown (None), never absent. All parsers are pure, and none of them raises.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

# Ends of links to containers and virtual machines, as what runs these calls them.
_GUEST_PORT = re.compile(r"(veth|vnet|tap|tun|fwpr|fwln|lxc|cali|macvtap)")
# What slows down for heat; fans, and limits of power that somebody has set, are other cooling devices.
_SLOWED = re.compile(r"(thermal-)?(cpufreq|devfreq)-|Processor$|cpu")
_SET_BY_PROGRAMS = "x86_pkg_temp"  # whose trips only tell thermald that the temperature has changed
_IDLE_ACTIONS = (
    "suspend",
    "hibernate",
    "hybrid-sleep",
    "suspend-then-hibernate",
    "sleep",
    "poweroff",
    "halt",
    "reboot",
)
_IDLE_TIME = "30min"  # logind's own


@dataclass(frozen=True)
class LinuxBridge:
    """A bridge that is on.

    Args:
        name: of it.
        ports: those that have a link, but none to containers and virtual machines on the host itself.
        has_stp: whether the spanning tree protocol keeps packets from going round.
    """

    name: str
    ports: tuple[str, ...]
    has_stp: bool


@dataclass(frozen=True)
class LinuxFacts:
    """What one Linux machine says of itself.

    Args:
        bridges: None: unknown.
        idle: what logind does with it when nobody types, and after which time; None: nothing, or unknown.
        is_on_battery: None: it has none, or that is unknown.
        heat: what says now that heat slows it down.
    """

    bridges: tuple[LinuxBridge, ...] | None = None
    idle: tuple[str, str] | None = None
    is_on_battery: bool | None = None
    heat: tuple[str, ...] = ()


def read_linux(outputs: Mapping[str, str]) -> LinuxFacts:
    """Read what the probe's commands have printed, by their names."""
    return LinuxFacts(
        _bridges(outputs.get("links", "")),
        _idle(outputs.get("sleep", "")),
        _is_on_battery(outputs.get("supplies", "")),
        _heat(outputs.get("heat", "")),
    )


def _bridges(text: str) -> tuple[LinuxBridge, ...] | None:
    """Read `ip -j -d link`."""
    try:
        links = [one for one in json.loads(text) if "ifname" in one]
        found = []
        for one in links:
            about = one.get("linkinfo", {})
            if about.get("info_kind") == "bridge" and "UP" in one["flags"]:
                ports = [
                    str(port["ifname"])
                    for port in links
                    if port.get("master") == one["ifname"] and "LOWER_UP" in port["flags"]
                ]
                outward = tuple(port for port in ports if not _GUEST_PORT.match(port))
                found.append(LinuxBridge(str(one["ifname"]), outward, bool(about["info_data"]["stp_state"])))
        return tuple(found)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _idle(text: str) -> tuple[str, str] | None:
    """Read lines of logind.conf, of which the last one counts, and whether systemd is kept from sleeping."""
    said = dict(re.findall(r"^\s*(IdleAction|IdleActionSec)\s*=\s*(\S+)", text, re.MULTILINE))
    action = said.get("IdleAction", "")
    is_masked = "masked" in text.split() and action not in ("poweroff", "halt", "reboot")
    return (action, said.get("IdleActionSec", _IDLE_TIME)) if action in _IDLE_ACTIONS and not is_masked else None


def _is_on_battery(text: str) -> bool | None:
    """Read uevent files of power supplies, each line behind its file's name; a mouse has a battery of its own."""
    supplies = defaultdict[str, dict[str, str]](dict)
    for path, name, value in re.findall(r"^(.*?)/uevent:POWER_SUPPLY_(\w+)=(.*)$", text, re.MULTILINE):
        supplies[path][name] = value
    batteries = [one for one in supplies.values() if one.get("TYPE") == "Battery" and one.get("SCOPE") != "Device"]
    if not batteries:
        return None
    is_fed = any(one.get("TYPE") in ("Mains", "USB") and one.get("ONLINE") == "1" for one in supplies.values())
    return not is_fed and any(one.get("STATUS") == "Discharging" for one in batteries)


def _heat(text: str) -> tuple[str, ...]:
    """Read files of /sys/class/thermal, each line behind its file's name.

    Only what is so now: counters of throttling are of all the time since the machine was started.
    """
    things = defaultdict[str, dict[str, str]](dict)
    for thing, name, value in re.findall(r"^(\w+)/(\w+):(.*)$", text, re.MULTILINE):
        things[thing][name] = value.strip()
    steps: dict[str, tuple[int, str]] = {}
    found = []
    for one in things.values():
        kind, step = one.get("type", ""), _whole(one.get("cur_state"))
        if _SLOWED.match(kind) and step > 0:
            steps[kind] = max(steps.get(kind, (0, "")), (step, one.get("max_state", "?")))
        degrees = _whole(one.get("temp"))
        trips = [
            _whole(one.get(name.replace("_type", "_temp")))
            for name, trip in one.items()
            if name.startswith("trip_point_") and trip in ("passive", "hot")
        ]
        limit = min((trip for trip in trips if trip > 0), default=0)
        if 0 < limit <= degrees and kind != _SET_BY_PROGRAMS:
            found.append(f"{kind} is at {degrees / 1000:.0f} °C, and heat slows it from {limit / 1000:.0f} on")
    return (*(f"{kind} is slowed by {step} of {most} steps" for kind, (step, most) in steps.items()), *found)


def _whole(text: str | None) -> int:
    return int(text) if text and re.fullmatch(r"-?\d{1,9}", text) else 0
