"""What Linux machines say of bridges, sleep and heat: real shells over trees of files, random bridges, and odd answers."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hippo_mpi.cluster.asking import probe
from hippo_mpi.cluster.asking.facts import Probed
from hippo_mpi.cluster.asking.linux import LinuxBridge, LinuxFacts, read_linux
from hippo_mpi.cluster.doctor.checks import diagnose
from tests.unit.test_checks import healthy

SUSPENDS = "[Login]\n#IdleAction=ignore\nIdleAction=suspend\n"
OUTLET = "POWER_SUPPLY_NAME=AC\nPOWER_SUPPLY_TYPE=Mains\nPOWER_SUPPLY_ONLINE="
BATTERY = "POWER_SUPPLY_NAME=BAT0\nPOWER_SUPPLY_TYPE=Battery\nPOWER_SUPPLY_STATUS="
SUPPLIES, THERMAL, LOGIND = "sys/class/power_supply", "sys/class/thermal", "etc/systemd/logind.conf"


def read(tree: dict[str, str], folder: Path) -> LinuxFacts:
    """What the probe's own commands bring back from a tree of files; a link leads to /dev/null."""
    for name, content in tree.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content == "/dev/null":
            path.symlink_to(content)
        else:
            path.write_text(content)
    printed = {}
    for name in ("sleep", "supplies", "heat"):
        script = probe.COMMANDS["Linux"][name][-1]
        assert script.startswith("cd /")
        ended = subprocess.run(["sh"], input=f"cd {folder}{script[4:]}", capture_output=True, text=True, timeout=30)
        assert ended.returncode == 0, ended
        printed[name] = ended.stdout
    return read_linux(printed)


def device(number: int, kind: str, step: int) -> dict[str, str]:
    folder = f"{THERMAL}/cooling_device{number}"
    return {f"{folder}/type": f"{kind}\n", f"{folder}/cur_state": f"{step}\n", f"{folder}/max_state": "10\n"}


def zone(kind: str, trip: str, degrees: int, limit: int) -> dict[str, str]:
    found = {
        "type": kind,
        "temp": str(1000 * degrees),
        "trip_point_0_type": trip,
        "trip_point_0_temp": str(1000 * limit),
    }
    return {f"{THERMAL}/thermal_zone0/{name}": f"{value}\n" for name, value in found.items()}


TREES: dict[str, tuple[dict[str, str], str, str]] = {
    "suspends": ({LOGIND: SUSPENDS}, "sleeps", "logind is told to suspend once nobody has typed for 30min"),
    "another file counts": (
        {LOGIND: "IdleAction=ignore\n", "run/systemd/logind.conf.d/9.conf": " IdleAction = hibernate\nIdleActionSec=5min\n"},
        "sleeps", "told to hibernate once nobody has typed for 5min",
    ),
    "switches itself off, though it can't sleep": (
        {LOGIND: "IdleAction=poweroff\n", "etc/systemd/system/sleep.target": "/dev/null"}, "sleeps", "told to poweroff",
    ),
    "is on its battery": (
        {f"{SUPPLIES}/AC/uevent": f"{OUTLET}0\n", f"{SUPPLIES}/BAT0/uevent": f"{BATTERY}Discharging\n", LOGIND: SUSPENDS},
        "sleeps", "it runs on its battery",
    ),
    "has but a battery": ({f"{SUPPLIES}/BAT0/uevent": f"{BATTERY}Discharging\n"}, "sleeps", "it runs on its battery"),
    "is slowed down": ({**device(0, "Fan", 1), **device(1, "Processor", 3), **device(2, "Processor", 4)}, "hot", "Processor is slowed by 4 of 10 steps"),
    "an ARM board is": (device(0, "thermal-cpufreq-0", 1), "hot", "thermal-cpufreq-0 is slowed by 1 of 10 steps"),
    "is too hot": (zone("acpitz", "passive", 96, 95), "hot", "acpitz is at 96 °C, and heat slows it from 95 on"),
}  # fmt: skip


def judged(linux: LinuxFacts) -> list[tuple[str, str, str]]:
    hosts = healthy(3)
    facts = hosts[1].facts
    assert facts is not None
    hosts[1] = replace(hosts[1], facts=replace(facts, linux=linux))
    return [(one.check, one.host, one.found) for one in diagnose(hosts)]


@pytest.mark.parametrize("name", TREES)
def test_sleep_and_heat_are_named(name: str, tmp_path: Path) -> None:
    tree, check, found = TREES[name]
    ((said_check, host, said),) = judged(read(tree, tmp_path))
    assert (said_check, host) == (check, "mini1") and found in said


WELL: dict[str, dict[str, str]] = {
    "nothing is there": {},
    "systemd's own settings": {LOGIND: "#IdleAction=suspend\n#IdleActionSec=30min\n"},
    "a later file": {"usr/lib/systemd/logind.conf": SUSPENDS, "etc/systemd/logind.conf.d/a.conf": "IdleAction=lock\n"},
    "it can't sleep": {LOGIND: SUSPENDS, "etc/systemd/system/suspend.target": "/dev/null"},
    "a notebook at an outlet": {f"{SUPPLIES}/AC/uevent": f"{OUTLET}1\n", f"{SUPPLIES}/BAT0/uevent": f"{BATTERY}Discharging\n"},
    "a mouse": {f"{SUPPLIES}/hid/uevent": f"{BATTERY}Discharging\nPOWER_SUPPLY_SCOPE=Device\n"},
    "fans and limits": {**device(0, "Fan", 3), **device(1, "TCC Offset", 7), **device(2, "Processor", 0)},
    "warm": zone("acpitz", "passive", 94, 95),
    "trips that thermald sets": zone("x86_pkg_temp", "passive", 60, 59),
    "trips that say nothing": zone("acpitz", "passive", 40, 0),
    "a fan's trip": zone("acpitz", "active", 60, 50),
}  # fmt: skip


@pytest.mark.parametrize("name", WELL)
def test_machines_that_are_well(name: str, tmp_path: Path) -> None:
    assert judged(read(WELL[name], tmp_path)) == []


# ---- bridges


def with_bridges(counts: Sequence[int], has_stp: Sequence[bool]) -> list[Probed]:
    """A host for each bridge, with so many ports."""
    hosts = next(found for found in map(healthy, range(100)) if len(found) == 6)
    for number, (count, stp) in enumerate(zip(counts, has_stp, strict=True)):
        facts = hosts[number].facts
        assert facts is not None
        bridge = LinuxBridge("br0", tuple(f"eth{port}" for port in range(count)), stp)
        hosts[number] = replace(hosts[number], facts=replace(facts, linux=LinuxFacts((bridge,))))
    return hosts


def test_random_bridges() -> None:
    """Random graphs whose cables all lead from bridge to bridge: a ring is named, a tree isn't."""
    num_rings = 0
    for seed in range(300):
        draw = random.Random(seed)
        count = draw.randrange(2, 7)
        cables = [(node, draw.randrange(node)) for node in range(1, count)]  # a tree, and perhaps a cable more
        for _ in range(has_ring := draw.randrange(2)):
            cables.append(tuple(draw.sample(range(count), 2)))
        num_rings += has_ring
        hosts = with_bridges([sum(node in ends for ends in cables) for node in range(count)], [False] * count)
        found = [(one.check, one.weight) for one in diagnose(hosts)]
        assert found == [("bridge-loop", "warning")] * has_ring, (seed, cables)
    assert 100 < num_rings < 200


def test_a_spanning_tree_opens_a_ring() -> None:
    assert [one.host for one in diagnose(with_bridges([2, 2, 2], [True, False, False]))] == []
    (finding,) = diagnose(with_bridges([3, 3, 3, 3], [True, False, False, False]))
    assert (finding.check, finding.host) == ("bridge-loop", "mini1")
    assert "sudo ip link set dev br0 type bridge stp_state 1;" in finding.fix
    assert diagnose(with_bridges([4], [False])) == []  # a switch


LINKS: list[dict[str, Any]] = [
    {"ifname": "br0", "flags": ["UP", "LOWER_UP"], "linkinfo": {"info_kind": "bridge", "info_data": {"stp_state": 0}}},
    {"ifname": "eth0", "flags": ["UP", "LOWER_UP"], "master": "br0"},
    {"ifname": "eth1", "flags": ["UP"], "master": "br0"},
    {"ifname": "vnet3", "flags": ["UP", "LOWER_UP"], "master": "br0", "linkinfo": {"info_kind": "tun"}},
    {"ifname": "br1", "flags": [], "linkinfo": {"info_kind": "bridge", "info_data": {"stp_state": 1}}},
]


def test_bridges_of_linux() -> None:
    assert read_linux({"links": json.dumps(LINKS)}).bridges == (LinuxBridge("br0", ("eth0",), False),)


@pytest.mark.parametrize(
    "text", ["", "{", "7", "[1]", "[{}]", '[{"ifname": "br0", "linkinfo": {"info_kind": "bridge"}}]', "\x00/uevent:="]
)
def test_what_can_not_be_read_is_unknown(text: str) -> None:
    found = read_linux(dict.fromkeys(("links", "sleep", "supplies", "heat"), text))
    assert found in (LinuxFacts(), LinuxFacts(bridges=()))
