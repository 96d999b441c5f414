"""What the doctor says of fake Macs: random clusters that are well, and faults on random hosts, one by one and in pairs."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest

from hippo_mpi.cluster.doctor.checks import NAMES, diagnose
from hippo_mpi.cluster.doctor.findings import ERROR, INFO, Finding
from hippo_mpi.cluster.hostfile import Hostfile
from tests.fake_macs.draw import ask, healthy, names_of
from tests.fake_macs.model import GIB, FakeCluster, FakeMac


@dataclass
class Scene:
    """Macs that are well, and their hostfile; faults change both."""

    cluster: FakeCluster
    hostfile: Hostfile

    def mac(self, rank: int) -> FakeMac:
        return self.cluster.macs[self.place(rank)]

    def place(self, rank: int) -> int:
        return names_of(len(self.cluster.macs)).index(self.hostfile.hosts[rank].ssh)

    @property
    def on_cables(self) -> bool:
        return bool(self.cluster.cables) and self.hostfile.backend == "ring" and len(self.hostfile.hosts) > 1

    def ports_to(self, rank: int, other: int) -> str:
        """The interface of the cable to another rank."""
        ends = {self.place(rank), self.place(other)}
        cable = next(one for one in self.cluster.cables if {mac for mac, _ in one.ends} == ends)
        receptacle = next(receptacle for mac, receptacle in cable.ends if mac == self.place(rank))
        return self.mac(rank).port(receptacle).interface

    def diagnose(self) -> list[Finding]:
        return diagnose(ask(self.cluster, self.hostfile))


@dataclass
class Fault:
    """A fault: how it comes about, and on which scenes and ranks."""

    check: str
    befall: Callable[[Scene, int], None]
    fits: Callable[[Scene], bool] = lambda scene: True
    is_anywhere: bool = False
    """It is of no host alone: the doctor names one of them."""


def setting(**values: object) -> Callable[[Scene, int], None]:
    def befall(scene: Scene, rank: int) -> None:
        for name, value in values.items():
            setattr(scene.mac(rank), name, value)

    return befall


def slow_cable(scene: Scene, rank: int) -> None:
    cable = scene.cluster.cables[rank % len(scene.cluster.cables)]
    cable.gbps //= 2


def thunderbolt_4(scene: Scene, rank: int) -> None:
    setting(thunderbolt=4, chip="Apple M2 Max", rdma=None)(scene, rank)
    for cable in scene.cluster.cables:
        if scene.place(rank) in [mac for mac, _ in cable.ends]:
            cable.gbps = 40


def pulled_cable(scene: Scene, rank: int) -> None:
    ends = {scene.place(rank), scene.place((rank + 1) % len(scene.hostfile.hosts))}
    scene.cluster.cables = [one for one in scene.cluster.cables if {mac for mac, _ in one.ends} != ends]


def bridged(scene: Scene, rank: int) -> None:
    for mac in scene.cluster.macs:
        mac.members = sorted(port.interface for port in mac.ports)


def by_the_lan(scene: Scene, rank: int) -> None:
    following = scene.hostfile.hosts[(rank + 1) % len(scene.hostfile.hosts)]
    scene.mac(rank).routes[following.ips[0]] = "en0"


def by_wifi(scene: Scene, rank: int) -> None:
    """Though Ethernet is in the same LAN."""
    following = scene.hostfile.hosts[(rank + 1) % len(scene.hostfile.hosts)]
    scene.mac(rank).wifi = f"{scene.mac(rank).lan.rpartition('.')[0]}.200/24"
    scene.mac(rank).routes[following.ips[0]] = "en1"


def port_down(scene: Scene, rank: int) -> None:
    interface = scene.ports_to(rank, (rank + 1) % len(scene.hostfile.hosts))
    next(port for port in scene.mac(rank).ports if port.interface == interface).is_rdma_down = True


def no_address(scene: Scene, rank: int) -> None:
    interface = scene.ports_to(rank, (rank + 1) % len(scene.hostfile.hosts))
    service = scene.mac(rank).service_on(interface)
    assert service
    service.method, service.words = "off", ()


def wrong_device(scene: Scene, rank: int) -> None:
    hosts = list(scene.hostfile.hosts)
    one, other = [number for number in range(len(hosts)) if number != rank][:2]
    rdma = list(hosts[rank].rdma)
    rdma[one], rdma[other] = rdma[other], rdma[one]
    hosts[rank] = replace(hosts[rank], rdma=tuple(rdma))
    scene.hostfile = replace(scene.hostfile, hosts=tuple(hosts))


def other_address(scene: Scene, rank: int) -> None:
    service = next(one for one in scene.mac(rank).services if scene.hostfile.hosts[rank].ips[0] in one.words)
    service.words = ("10.9.9.1", "255.255.255.252")


def has_several(scene: Scene) -> bool:
    return len(scene.hostfile.hosts) > 1


def has_cables(scene: Scene) -> bool:
    return bool(scene.cluster.cables)


def on_cables(scene: Scene) -> bool:
    return scene.on_cables


def in_a_lan(scene: Scene) -> bool:
    return has_several(scene) and not scene.on_cables


def uses_rdma(scene: Scene) -> bool:
    return scene.hostfile.backend == "jaccl"


def large_mesh(scene: Scene) -> bool:
    return uses_rdma(scene) and len(scene.hostfile.hosts) > 2


def large_ring(scene: Scene) -> bool:
    return has_cables(scene) and len(scene.hostfile.hosts) > 2


FAULTS = {
    "project in Documents": Fault("path-private", setting(python="/Users/anna/Documents/hippo/.venv/bin/python")),
    "stranded memory": Fault("wired-stranded", setting(wired=40 * GIB)),
    "limit too high": Fault("wired-limit", setting(wired_limit_mb=62 << 10)),
    "limit too low": Fault("wired-limit", setting(wired_limit_mb=8 << 10)),
    "slow cable": Fault("cable-slow", slow_cable, has_cables, is_anywhere=True),
    "pulled cable": Fault("cable-absent", pulled_cable, on_cables),
    "loop of bridges": Fault("bridge-loop", bridged, large_ring, is_anywhere=True),
    "packets leave by the LAN": Fault("wrong-interface", by_the_lan, on_cables),
    "packets leave by the LAN's Wi-Fi": Fault("wrong-interface", by_wifi, in_a_lan),
    "another address": Fault("address-missing", other_address, on_cables),
    "Python is denied": Fault("local-network-privacy", setting(is_python_denied=True), has_several),
    "firewall drops": Fault("firewall", setting(has_firewall=True, drops_packets=True), has_several),
    "firewall asks": Fault("firewall", setting(has_firewall=True), has_several),
    "Thunderbolt 4 in a mesh": Fault("rdma-impossible", thunderbolt_4, uses_rdma),
    "old macOS in a mesh": Fault("rdma-impossible", setting(version="26.1", rdma=None), uses_rdma),
    "RDMA off": Fault("rdma-off", setting(rdma=False), uses_rdma),
    "RDMA port down": Fault("rdma-port-down", port_down, uses_rdma),
    "another build": Fault("rdma-port-down", setting(build="25E999"), uses_rdma, is_anywhere=True),
    "RDMA port without address": Fault("rdma-no-ipv4", no_address, uses_rdma),
    "wrong device": Fault("jaccl-matrix", wrong_device, large_mesh),
    "exo's daemon": Fault("other-daemon", setting(has_exo=True)),
    "exo's location": Fault("other-daemon", setting(location="exo")),
    "sleeps": Fault("sleeps", setting(sleep=10)),
    "battery": Fault("sleeps", setting(is_on_battery=True)),
    "low power": Fault("low-power", setting(low_power=1)),
    "hot": Fault("hot", setting(speed_limit=60)),
}  # fmt: skip


def scene_for(*faults: Fault, seed: int) -> tuple[Scene, random.Random]:
    """Macs that are well, and whatever befalls them can."""
    draw = random.Random(seed)
    for _ in range(200):
        scene = Scene(*healthy(draw.randrange(1 << 30)))
        if all(fault.fits(scene) for fault in faults):
            return scene, draw
    pytest.skip("no Macs can have both")


def place_of(fault: Fault, rank: int, scene: Scene, findings: list[Finding]) -> int:
    """The finding's line among all."""
    lines = [(one.check, one.host) for one in findings]
    hosts = [one.ssh for one in scene.hostfile.hosts] if fault.is_anywhere else [scene.hostfile.hosts[rank].ssh]
    return min((lines.index((fault.check, host)) for host in hosts if (fault.check, host) in lines), default=99)


@pytest.mark.parametrize("block", range(4))
def test_random_macs_that_are_well(block: int) -> None:
    for seed in range(50 * block, 50 * (block + 1)):
        scene = Scene(*healthy(seed))
        assert {(one.check, one.weight) for one in scene.diagnose()} <= {
            ("rdma-impossible", INFO),
            ("rdma-off", INFO),
        }, seed


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named_on_its_host(name: str) -> None:
    fault = FAULTS[name]
    assert fault.check in NAMES
    for seed in range(3):
        scene, draw = scene_for(fault, seed=seed)
        rank = draw.randrange(len(scene.hostfile.hosts))
        fault.befall(scene, rank)
        findings = scene.diagnose()
        assert place_of(fault, rank, scene, findings) < 2, (rank, findings)
        assert all(one.found and one.fix for one in findings)
        assert diagnose(ask(scene.cluster, scene.hostfile), ["clock"]) == []


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.slow
def test_faults_in_pairs(seed: int) -> None:
    """The one doesn't hide the other; warnings come after all errors."""
    names = random.Random(seed).sample(sorted(FAULTS), 2)
    first, second = (FAULTS[name] for name in names)
    if {first.check, second.check} == {"cable-absent", "bridge-loop"}:
        pytest.skip("without that cable there is no loop")
    if first.check.startswith("rdma") and second.check.startswith("rdma"):
        pytest.skip("of RDMA the first reason is told")
    scene, draw = scene_for(first, second, seed=seed)
    ranks = [draw.randrange(len(scene.hostfile.hosts)) for _ in names]
    for fault, rank in zip((first, second), ranks, strict=True):
        fault.befall(scene, rank)
    findings = scene.diagnose()
    errors = sum(one.weight == ERROR for one in findings)
    for fault, rank in zip((first, second), ranks, strict=True):
        assert place_of(fault, rank, scene, findings) < max(4, errors + 2), (names, ranks, findings)
