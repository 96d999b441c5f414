"""Outputs of macOS's commands that are odd or missing, and plans for Macs that have settings already."""

from __future__ import annotations

import random
from dataclasses import replace
from ipaddress import IPv4Network
from itertools import islice
from typing import Any

import pytest

from hippo_mpi.cluster.asking.facts import Probed, Reach, read_facts
from hippo_mpi.cluster.asking.macos import MacFacts, read_mac, read_power, read_rdma_devices, read_routes, read_services
from hippo_mpi.cluster.asking.rdma import has_thunderbolt_5
from hippo_mpi.cluster.cabling.address_plan import networks
from hippo_mpi.cluster.cabling.topology import Topology, topology_of
from hippo_mpi.cluster.doctor.checks import diagnose
from hippo_mpi.cluster.doctor.doctor import lines_of
from hippo_mpi.cluster.hostfile import Hostfile
from tests.fake_macs.draw import apply, ask, healthy, raw
from tests.fake_macs.model import GIB, FakeCable, FakeCluster, FakeMac, FakeService

NOTHING = MacFacts()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"SPThunderboltDataType": [1]}', '{"SPThunderboltDataType": 1}', "\x00\xff", "[" * 100_000])  # fmt: skip
def test_what_can_not_be_read_is_unknown(text: str) -> None:
    names = [*raw(FakeCluster([FakeMac("mini0")]), 0, ask_hosts(1))["outputs"]]
    facts = read_mac(dict.fromkeys(names, text))
    assert replace(facts, bridges=None, settings={}, ports=None, location=None) == NOTHING
    assert not facts.bridges and not facts.ports


def ask_hosts(count: int) -> Any:
    return Hostfile(tuple(one.host for one in ask(FakeCluster([FakeMac(f"mini{n}") for n in range(count)])))).hosts


def test_answers_that_are_damaged_end_nothing() -> None:
    """Commands that fail, and outputs that are cut short: no exception, and no error from what isn't known."""
    draw = random.Random(0)
    cluster, hostfile = next((c, h) for c, h in map(healthy, range(100)) if len(h.hosts) == 3 and c.cables)
    for _ in range(60):
        hosts = []
        for number, host in enumerate(hostfile.hosts):
            answer = raw(cluster, number, hostfile.hosts)
            for name, one in answer["outputs"].items():
                if name not in ("versions", "addresses") and draw.random() < 0.5:
                    cut = one["out"][: draw.randrange(len(one["out"]) + 1)]
                    answer["outputs"][name] = draw.choice([{**one, "out": cut}, {"out": "", "err": "", "status": None}])
            hosts.append(Probed(host, read_facts(answer), asked_s=1000.0))
        found = diagnose(hosts)
        assert not [one for one in found if one.weight == "error"], found
        topology_of(hosts)
        assert list(lines_of(hosts, found))


def test_nothing_that_a_host_says_is_obeyed_by_a_terminal() -> None:
    cluster = FakeCluster(
        [FakeMac("mini0", title="\x1b[2JMac\r", location="exo"), FakeMac("mini1", model="\x1b]0;x\x07")]
    )
    cluster.cables.append(FakeCable(((0, 1), (1, 1)), dock="\x1b[31mdock\u202e"))
    hosts = ask(cluster)
    text = "".join(lines_of(hosts, diagnose(hosts)))
    assert "dock" in text and text.isprintable()


def test_routes_without_zeros_at_the_end() -> None:
    text = "Destination  Gateway\ndefault  10.0.0.1\n10.205.0.4/30  link#5\n192.168.1  link#4\n127.0.0.1  lo0\n169.254  link#4\n10.9/20  utun3\n"
    assert read_routes(text) == tuple(
        map(IPv4Network, ("10.205.0.4/30", "192.168.1.0/24", "127.0.0.1/32", "169.254.0.0/16", "10.9.0.0/20"))
    )
    assert read_routes("") is None


def test_services_of_all_kinds() -> None:
    order = "(1) Thunderbolt Bridge\n(Hardware Port: Thunderbolt Bridge, Device: bridge0)\n\n(*) Old (2)\n(Hardware Port: Thunderbolt 2, Device: en3)\n\n(2) Odd\n(Hardware Port: Wi-Fi, Device: en1)\n"
    infos = (
        "== Thunderbolt Bridge\nManual Configuration\nIP address: 10.0.0.1\nSubnet mask: 255.255.255.0\nRouter: (null)\n"
        "== Old (2)\nManually Using DHCP Router Configuration\nIP address: 10.0.0.2\n== Odd\nBOOTP Configuration\nIP address: 1.2.3.4\n"
    )
    services = read_services(order, infos)
    assert services and [(one.name, one.interface, one.is_on, one.method, one.address) for one in services] == [
        ("Thunderbolt Bridge", "bridge0", True, "manual", ("10.0.0.1", "255.255.255.0")),
        ("Old (2)", "en3", False, "manual with dhcp router", ("10.0.0.2",)),
        ("Odd", "en1", True, "bootp", ()),
    ]


def test_words_are_read_exactly() -> None:
    assert read_mac({"rdma": "not enabled\n"}).rdma is None and read_mac({"rdma": "enabled\n"}).rdma is True
    assert read_rdma_devices("    device  \t node GUID\n    ------\t----\n", "") == {}
    assert read_rdma_devices("", "") is None
    assert read_power("AC Power:\n sleep 1 (prevented by sharingd)\n womp 1\n", "") == ({"sleep": 1, "womp": 1}, None)


@pytest.mark.parametrize(
    ("chip", "wanted"),
    [("Apple M4", False), ("Apple M4 Pro", True), ("Apple M3 Max", False), ("Apple M3 Ultra", True), ("Apple M2 Ultra", False),
     ("Apple M5 Max", True), ("Apple M9", None), ("Intel(R) Core(TM) i7", None), (None, None)],
)  # fmt: skip
def test_a_chip_s_thunderbolt(chip: str | None, wanted: bool | None) -> None:
    assert has_thunderbolt_5(MacFacts(chip=chip)) is wanted


# ---- plans


def triangle(**settings: Any) -> FakeCluster:
    macs = [FakeMac(f"mini{number}", number, lan=f"192.168.1.{number + 10}/24", **settings) for number in range(3)]
    return FakeCluster(macs, [FakeCable(((0, 1), (1, 1))), FakeCable(((1, 2), (2, 1))), FakeCable(((2, 2), (0, 2)))])


def ips_of(topology: Topology) -> list[tuple[str, ...]]:
    return [host.ips for host in topology.hostfile.hosts]


def test_networks_that_overlap_others_are_left_out() -> None:
    blocked = [
        IPv4Network(one) for one in ("10.205.0.4/30", "10.205.0.16/29", "0.0.0.0/0", "128.0.0.0/1", "10.205.0.8/32")
    ]
    found = [str(one) for one in islice(networks(blocked), 4)]
    assert found == ["10.205.0.0/30", "10.205.0.12/30", "10.205.0.24/30", "10.205.0.28/30"]
    assert str(next(networks([IPv4Network("10.0.0.0/8")]))) == "172.16.0.0/30"


def test_cables_get_networks_that_no_host_has() -> None:
    """A route of one host, and an address of another."""
    cluster = triangle()
    cluster.macs[2].routes["10.205.0/28"] = "utun4"
    cluster.macs[1].wifi = "10.205.0.17/29"
    assert ips_of(topology_of(ask(cluster))) == [("10.205.0.29",), ("10.205.0.26",), ("10.205.0.34",)]


def test_a_vpn_to_all_private_networks_leaves_what_nobody_has() -> None:
    cluster = triangle()
    for route in ("10", "172.16/12", "192.168.0/16"):
        cluster.macs[1].routes[route] = "utun4"
    assert ips_of(topology_of(ask(cluster))) == [("10.205.0.5",), ("10.205.0.2",), ("10.205.0.10",)]


def test_addresses_that_are_set_already_are_kept() -> None:
    """Those of one cable; one end of another's; a third's are in the way of the LAN."""
    cluster = triangle()
    wanted = {(0, 1): "10.7.0.1", (1, 1): "10.7.0.2", (1, 2): "10.8.0.6", (2, 2): "192.168.1.5", (0, 2): "192.168.1.6"}
    for (mac, receptacle), address in wanted.items():
        port = cluster.macs[mac].port(receptacle)
        words = (address, "255.255.255.252")
        cluster.macs[mac].services.append(FakeService(f"Mine {receptacle}", port.interface, "manual", words))
    topology = topology_of(ask(cluster))
    assert ips_of(topology) == [("10.205.0.1",), ("10.7.0.2",), ("10.8.0.5",)]
    apply(cluster, topology)
    assert cluster.macs[0].service("Mine 1") == FakeService(
        "Mine 1", cluster.macs[0].port(1).interface, "manual", ("10.7.0.1", "255.255.255.252")
    )
    assert not topology_of(ask(cluster)).plan.commands


def test_two_macs_keep_their_bridge() -> None:
    cluster = FakeCluster([FakeMac("mini0", 1, lan=""), FakeMac("mini1", 2, lan="")])
    cluster.cables = [FakeCable(((0, 1), (1, 1))), FakeCable(((0, 2), (1, 3)))]
    topology = topology_of(ask(cluster))
    assert [[command.do[1:3] for command in among] for among in topology.plan.commands.values()] == [
        [("-setmanual", "Thunderbolt Bridge")]
    ] * 2
    assert ips_of(topology) == [("10.205.0.1",), ("10.205.0.2",)] and not topology.hostfile.envs
    cluster.macs[1].services[2].is_on = False  # then each cable has its own
    assert ips_of(topology_of(ask(cluster))) == [("10.205.0.1", "10.205.0.5"), ("10.205.0.2", "10.205.0.6")]


def test_the_way_by_which_ssh_comes_is_not_changed() -> None:
    cluster = FakeCluster([FakeMac("mini0", 1), FakeMac("mini1", 2)], [FakeCable(((0, 1), (1, 1)))])
    hosts = ask(cluster)
    facts = hosts[1].facts
    assert facts
    bridge = next(str(a.ip) for one in facts.interfaces or () if one.name == "bridge0" for a in one.addresses)
    hosts[1] = replace(hosts[1], facts=replace(facts, environment={"SSH_CONNECTION": f"169.254.1.1 5000 {bridge} 22"}))
    plan = topology_of(hosts).plan
    assert not plan.commands and plan.why_not and "ssh reaches mini1 by bridge0" in plan.why_not


def test_the_one_reason_against_jaccl() -> None:
    cluster = triangle(rdma=True)
    assert topology_of(ask(cluster)).hostfile.backend == "jaccl"
    for change, why in (
        ({"build": "25E999"}, "different versions"), ({"rdma": False}, "mini2: its RDMA is off"), ({"version": "26.1"}, "macOS 26.1"),
        ({"thunderbolt": 4}, "Thunderbolt 4"), ({"lan": ""}, "mini2 is in no LAN"),
    ):  # fmt: skip
        changed = triangle(rdma=True)
        for name, value in change.items():
            setattr(changed.macs[2], name, value)
        if "thunderbolt" in change:
            for cable in changed.cables[1:]:
                cable.gbps = 40
        topology = topology_of(ask(changed))
        assert topology.hostfile.backend == "ring" and why in (topology.why_not_jaccl or ""), topology.why_not_jaccl


def test_a_cable_that_is_missing_is_named() -> None:
    cluster = triangle()
    del cluster.cables[2]
    topology = topology_of(ask(cluster))
    assert topology.to_close == "127.0.0.1 and mini2" and topology.ring == (0, 1)
    assert ips_of(topology) == [("192.168.1.10",), ("192.168.1.11",), ("192.168.1.12",)] and not topology.plan.commands


def test_one_mac_under_two_names() -> None:
    hosts = ask(triangle())
    facts = hosts[1].facts
    assert facts
    found = diagnose([hosts[0], hosts[1], replace(hosts[2], facts=facts)], ["names-same"])
    assert [one.found for one in found] == ["mini1 and mini2 are one machine"]


# ---- models and MPIs


def with_facts(number: int, hosts: list[Probed], **fields: Any) -> list[Probed]:
    facts = hosts[number].facts
    assert facts
    return [*hosts[:number], replace(hosts[number], facts=replace(facts, **fields)), *hosts[number + 1 :]]


def test_a_folder_is_not_sought_in_the_hub() -> None:
    hosts = [replace(one, model="/models/bear") for one in ask(triangle())]
    (found,) = [one for one in diagnose(with_facts(2, hosts, model=(0, 0))) if one.check == "model-missing"]
    assert (found.host, found.weight, found.fix) == (
        "mini2", "error", "./launch/cluster sync /models/bear --hostfile FILE",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("check", "fields"),
    [
        ("model-missing", {"model": (0, 0), "hub": "200"}),
        ("hub-token", {"model": (0, 0), "hub": "401"}),
        ("no-internet", {"model": (0, 0), "hub": "<urlopen error timed out>"}),
        ("memory-short", {"model": (500 * GIB, 4096)}),
        ("low-power", {"governor": "powersave"}),
        ("memory-taken", {"memory": (64 * GIB, GIB)}),
        ("firewall", {"has_firewall": True}),
    ],
)
def test_of_models_and_machines(check: str, fields: dict[str, Any]) -> None:
    hosts = with_facts(2, [replace(one, model="org/name") for one in ask(triangle())], **fields)
    if check == "firewall":
        hosts = with_facts(1, hosts, reached={"192.168.1.12": Reach("192.168.1.11", "timed out")})
    found = [one for one in diagnose(hosts) if one.check == check]
    assert [one.host for one in found] == ["mini2" if check != "memory-short" else "127.0.0.1"], found
    assert found[0].found and found[0].fix
    if check == "no-internet":
        assert "./launch/cluster sync org/name --hostfile" in found[0].fix
    if check == "memory-taken":
        assert "holds 7.00 GiB" in found[0].found


def test_what_the_planner_says_counts_more_than_weights() -> None:
    hosts = with_facts(2, ask(triangle()), model=(500 * GIB, 4096))
    assert diagnose([replace(one, shortage="") for one in hosts], ["memory-short"]) == []
    (finding,) = diagnose([replace(one, shortage="it doesn't fit") for one in ask(triangle())], ["memory-short"])
    assert finding.found.startswith("it doesn't fit; all hosts have ")


def test_mpis_that_differ() -> None:
    hosts = [replace(one, backend="mpi") for one in ask(triangle())]
    for number, says in enumerate(("mpirun (Open MPI) 5.0.8", "mpirun (Open MPI) 4.1.4", "HYDRA build details:")):
        hosts = with_facts(number, hosts, mpi=says)
    assert [(one.check, one.host) for one in diagnose(hosts, ["mpi-mixed"])] == [
        ("mpi-mixed", "mini1"),
        ("mpi-mixed", "mini2"),
    ]
    assert not diagnose([replace(one, backend="ring") for one in hosts], ["mpi-mixed"])
