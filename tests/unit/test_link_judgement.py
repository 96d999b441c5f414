"""Links that were measured: which kind each is, and what is said of its figures. Ids are made up."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Sequence
from typing import Any

import pytest

from hippo_mpi.cluster.asking.facts import Facts, Interface, Probed
from hippo_mpi.cluster.doctor.findings import Finding
from hippo_mpi.cluster.hostfile import Host
from hippo_mpi.cluster.link.link import Links, addresses_of, pairs_of
from hippo_mpi.cluster.link.link_checks import findings_of
from hippo_mpi.cluster.link.link_cost import Cost, Way, cost_of
from hippo_mpi.cluster.link.link_kinds import WIFI, LinkKind, ethernet, kinds_of, macos_kinds, thunderbolt
from hippo_mpi.cluster.link.link_measure import Measured, Pair, Rate, RoundTrips, Traffic
from hippo_mpi.cluster.link.link_report import lines_of, to_json
from hippo_mpi.config.bundled import BUNDLED_MODEL
from hippo_mpi.errors import UserError
from hippo_mpi.units import visible

PORTS = """
Hardware Port: Ethernet
Device: en0
Ethernet Address: 02:00:00:00:00:01

Hardware Port: Wi-Fi
Device: en1
Ethernet Address: 02:00:00:00:00:02

Hardware Port: Thunderbolt 2
Device: en6
Ethernet Address: 02:00:00:00:00:03

Hardware Port: Thunderbolt 1
Device: en3
Ethernet Address: 02:00:00:00:00:04

Hardware Port: Thunderbolt Bridge
Device: bridge0
Ethernet Address: 02:00:00:00:00:05
"""
ADDRESSES = """lo0: flags=8049<UP,LOOPBACK,RUNNING,MULTICAST> mtu 16384
\tinet 127.0.0.1 netmask 0xff000000
en0: flags=8863<UP,BROADCAST,SMART,RUNNING,SIMPLEX,MULTICAST> mtu 1500
\tether 02:00:00:00:00:01
\tinet 192.168.1.11 netmask 0xffffff00 broadcast 192.168.1.255
\tmedia: autoselect (10Gbase-T <full-duplex>)
\tstatus: active
en6: flags=8863<UP,BROADCAST,SMART,RUNNING,SIMPLEX,MULTICAST> mtu 1500
\tinet 10.205.0.1 netmask 0xfffffffc broadcast 10.205.0.3
\tmedia: autoselect <full-duplex>
\tstatus: active
"""
BUSES = {
    "SPThunderboltDataType": [
        {"receptacle_1_tag": {"receptacle_id_key": "2", "current_speed_key": "80 Gb/s"}},
        {"receptacle_1_tag": {"receptacle_id_key": "1", "current_speed_key": "Up to 120 Gb/s"}},
        {"_name": "thunderboltusb4_bus_9"},
    ]
}


def facts(rank: int, system: str = "Linux", environment: dict[str, str] | None = None) -> Facts:
    """Of a host with a cable to rank 0 or 1, and a LAN."""
    interfaces = (
        Interface("tb0", (ipaddress.IPv4Interface(f"10.205.0.{rank + 1}/30"),), 1500),
        Interface("en0", (ipaddress.IPv4Interface(f"192.168.1.{rank + 11}/24"),), 1500),
    )
    return Facts(
        system, "1", f"mini{rank}", "/bin/sh", 0.0, 1024, "/", 1 << 40, {}, "", environment or {}, {}, {}, {},
        interfaces, (16 << 30, 8 << 30), (), "", None,
    )  # fmt: skip


def two_hosts(ips: bool = True) -> list[Probed]:
    return [
        Probed(Host(name, (f"10.205.0.{rank + 1}",) if ips else ()), facts(rank))
        for rank, name in enumerate(("127.0.0.1", "mini1"))
    ]


def measured(there: float, back: float, median_s: float = 1e-4, p99_s: float = 2e-4, by: str = "tb0") -> Measured:
    """With these Gbit/s."""
    times = RoundTrips(median_s, p99_s, p99_s, 400, median_s)
    traffic = Traffic(1 << 30, {by: 1 << 30, "lo": 1000}, {by: 1 << 30})
    rates = (Rate(there * 1e9 / 8, there * 1e9 / 8, there * 1e9 / 9), Rate(back * 1e9 / 8, back * 1e9 / 8))
    return Measured(Pair(0, 1, "10.205.0.2"), "", {64: times, 8192: times}, *rates, traffic, traffic, times)


def found(link: Measured, kind: LinkKind | None) -> list[Finding]:
    kinds: dict[str, LinkKind] = {"tb0": kind} if kind else {}
    return findings_of(Links([link], [kinds, kinds], {}), two_hosts())


def names(findings: Sequence[Finding]) -> list[str]:
    return [one.check for one in findings]


@pytest.mark.parametrize(
    ("link", "kind", "checks"),
    [
        (measured(0.94, 0.93), ethernet(1e9), []),
        (measured(0.5, 0.5), ethernet(1e9), ["link-slow"]),
        (measured(0.94, 0.93), ethernet(10e9), ["link-slow"]),
        (measured(16.4, 16.0), thunderbolt(40e9), []),
        (measured(16.4, 5.3), thunderbolt(40e9), ["link-slow", "link-lopsided"]),
        (measured(25.0, 24.0), thunderbolt(80e9), []),
        (measured(16.0, 16.0), thunderbolt(80e9), ["link-slow"]),
        (measured(0.4, 0.3, 4e-3, 9e-3), WIFI, []),
        (measured(0.4, 0.3, 4e-3, 80e-3), WIFI, ["link-jitter"]),
        (measured(0.94, 0.94, 8e-3, 9e-3), ethernet(1e9), ["link-slow"]),
        (measured(0.94, 0.94, 0.02e-3, 0.5e-3), ethernet(1e9), []),
        (measured(30.0, 15.0), ethernet(10e9), []),
        (measured(0.001, 0.001), None, []),
        (measured(0.94, 0.3), None, ["link-lopsided"]),
        (Measured(Pair(0, 1, "10.205.0.2"), "timed out"), None, ["link-down"]),
    ],
)  # fmt: skip
def test_what_is_said_of_figures(link: Measured, kind: LinkKind | None, checks: list[str]) -> None:
    findings = found(link, kind)
    assert names(findings) == checks
    assert all(one.host == "127.0.0.1" and one.found and one.fix for one in findings)


def test_bytes_by_another_interface_are_named_on_the_host_that_sends_them() -> None:
    (one,) = found(measured(0.94, 0.94, by="en0"), ethernet(1e9))
    assert (one.check, one.host, one.weight) == ("wrong-interface", "127.0.0.1", "error")
    assert "left by en0, not by tb0 (1 GbE)" in one.found
    link = measured(0.94, 0.94)
    back = Measured(
        link.pair, "", link.round_trips, link.there, link.back, link.traffic_there, Traffic(9, {"en0": 9}, {"en0": 9})
    )
    (one,) = found(back, ethernet(1e9))
    assert (one.check, one.host) == ("wrong-interface", "mini1")


def test_others_may_count_as_many_bytes_or_more() -> None:
    """A bridge has the same ones as its port; a backup goes by the LAN."""
    link = measured(0.94, 0.94)
    both = Traffic(1000, {"tb0": 1000, "br0": 1010, "en0": 10**9}, {"tb0": 1000, "br0": 1010})
    assert not found(Measured(link.pair, "", link.round_trips, link.there, link.back, both, both), ethernet(1e9))


def test_kinds_on_macos_come_from_its_own_lists() -> None:
    kinds = macos_kinds(PORTS, ADDRESSES, json.dumps(BUSES))
    assert kinds == {
        "en0": ethernet(10e9), "en1": WIFI, "en6": thunderbolt(80e9), "bridge0": thunderbolt(80e9),
    }  # fmt: skip
    assert macos_kinds("", "", "no JSON") == macos_kinds("x", "y", '{"SPThunderboltDataType": [3]}') == {}
    texts = {"ports": PORTS, "addresses": ADDRESSES, "thunderbolt": json.dumps(BUSES)}
    outputs = {name: {"out": text, "status": 0} for name, text in texts.items()}
    host = Probed(Host("mini2.local"), facts(1, "Darwin"), raw={"outputs": outputs})
    assert kinds_of(host, {}) == kinds


def test_kinds_on_linux_come_from_the_other_end_of_ssh_and_may_be_anything() -> None:
    told: dict[str, Any] = {
        "eth0": {"kind": "ethernet", "bits_per_s": 2_500_000_000}, "wlan0": {"kind": "wifi", "bits_per_s": None},
        "thunderbolt0": {"kind": "thunderbolt", "bits_per_s": None}, "wg0": {"kind": "other"}, "x": 7,
        "y": {"kind": "ethernet", "bits_per_s": "fast"}, "z": {"kind": "ethernet", "bits_per_s": 10**400},
    }  # fmt: skip
    kinds = kinds_of(two_hosts()[1], told)
    assert kinds == {"eth0": ethernet(2.5e9), "wlan0": WIFI, "thunderbolt0": thunderbolt(40e9)}
    assert kinds["eth0"].name == "2.5 GbE" and ethernet(100e6).name == "100 Mbit/s Ethernet"


def test_pairs_are_neighbors_unless_all_are_wanted() -> None:
    hosts = [
        Probed(Host("127.0.0.1" if rank == 0 else f"mini{rank}", (f"192.168.1.{rank + 11}",)), facts(rank))
        for rank in range(4)
    ]
    ring = [(0, 1), (1, 2), (2, 3), (3, 0)]
    assert [(pair.rank, pair.other) for pair in pairs_of(hosts, False)] == ring
    every = pairs_of(hosts, True)
    assert {(pair.rank, pair.other) for pair in every} == {*ring, (0, 2), (1, 3)}
    twice = [hosts[0], hosts[0]]
    assert not pairs_of(twice, True)


def test_hosts_without_addresses_are_called_where_ssh_reaches_them() -> None:
    hosts = two_hosts(ips=False)
    there = facts(1, environment={"SSH_CONNECTION": "192.168.1.11 50000 192.168.1.12 22"})
    hosts[1] = Probed(hosts[1].host, there)
    assert [addresses_of(hosts, rank) for rank in (0, 1)] == [("192.168.1.11",), ("192.168.1.12",)]
    assert addresses_of([hosts[0]], 0) == ()


def test_the_table_and_the_object_say_the_same() -> None:
    links, hosts = (
        Links([measured(0.94, 0.3), Measured(Pair(1, 0, "10.205.0.1"), "timed out")], [{}, {}], {}),
        two_hosts(),
    )
    findings = findings_of(links, hosts)
    cost = Cost("M", Way(1e-3, 1e8, 100.0, 10.0), Way(1e-4, 1e9, 200.0, 10.05))
    table = "\n".join(lines_of(links, hosts, findings, cost))
    assert "mini0 > mini1" in table and "link-lopsided" in table and "timed out" in table
    assert "decode no slower, prompt 50% slower" in table
    said = json.loads(to_json(links, hosts, findings, cost))
    assert [one["verdict"] for one in said["links"]] == ["link-lopsided", "link-down"]
    assert said["links"][0]["there"]["sent_by"] == "tb0" and said["links"][1]["error"] == "timed out"
    assert said["cost"]["usual"]["decode_tps"] == 10.05 and len(said["findings"]) == 2
    well = Links([measured(0.94, 0.94)], [{}, {}], {})
    assert "nothing is wrong" in "\n".join(lines_of(well, hosts, [], None))


@pytest.mark.slow
def test_the_cost_is_predicted_for_the_slowest_link() -> None:
    slow, fast = measured(0.01, 0.5, 20e-3), measured(0.94, 0.94)
    links = Links([slow, fast], [{"tb0": ethernet(1e9)}] * 2, {})
    cost = cost_of(str(BUNDLED_MODEL), links, two_hosts())
    assert cost and cost.usual and cost.measured.hop_s == 10e-3 and cost.usual.hop_s < 1e-3
    assert cost.measured.bytes_per_s == 0.01e9 / 8 and "% slower, prompt" in cost.line
    assert 0 < cost.measured.decode_tps < cost.usual.decode_tps and cost.measured.prompt_tps < cost.usual.prompt_tps
    assert cost_of("any", Links([], [{}, {}], {}), two_hosts()) is None
    with pytest.raises(UserError, match="--model /no/such/model: no prediction: "):
        cost_of("/no/such/model", links, two_hosts())


def test_what_comes_from_elsewhere_is_shown_without_control_characters() -> None:
    assert visible("ok\x1b[2J\r\n" + "x" * 500, 20) == r"ok\x1b[2J\r\nxxxxxxx..."


def test_the_fastest_round_trip_is_told_beside_the_typical_one() -> None:
    times = RoundTrips.of([0.003, 0.001, 0.002, 0.009, 0.002])
    assert (times.least_s, times.median_s, times.p99_s, times.count) == (0.001, 0.002, 0.009, 5)
