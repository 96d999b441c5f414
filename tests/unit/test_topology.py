"""Random cables between fake Macs, from what macOS prints to a ring, addresses and RDMA devices, and against mlx's own set-up."""

from __future__ import annotations

import copy
from ipaddress import IPv4Address, IPv4Network
from itertools import combinations, permutations
from pathlib import Path

import pytest

from hippo_mpi.cluster.cabling.topology import Topology, topology_of
from tests.fake_macs.draw import apply, ask, ask_mlx, names_of, random_graph
from tests.fake_macs.model import FakeCluster

Pair = tuple[int, int]


def true_pairs(cluster: FakeCluster, with_docks: bool = True) -> dict[Pair, list[dict[int, str]]]:
    """The interfaces of each pair's cables, by Mac."""
    found: dict[Pair, list[dict[int, str]]] = {}
    for cable in cluster.cables:
        if with_docks or not cable.dock:
            ends = {mac: cluster.macs[mac].port(receptacle).interface for mac, receptacle in cable.ends}
            found.setdefault((min(ends), max(ends)), []).append(ends)
    return found


def longest(count: int, pairs: dict[Pair, list[dict[int, str]]]) -> int:
    """The length of a longest cycle with number 0, by trying all."""
    for length in range(count, 1, -1):
        for rest in permutations(range(1, count), length - 1):
            ring = (0, *rest)
            if all((min(a, b), max(a, b)) in pairs for a, b in zip(ring, (*rest, 0), strict=True)):
                return length
    return 1


def check(cluster: FakeCluster, topology: Topology) -> None:
    count, pairs, direct = len(cluster.macs), true_pairs(cluster), true_pairs(cluster, with_docks=False)
    found = sorted(sorted(end.port.interface or "" for end in cable.ends) for cable in topology.cables)
    assert found == sorted(sorted(ends.values()) for among in pairs.values() for ends in among)
    assert len(topology.ring) == longest(count, pairs) and topology.ring[0] == 0
    hosts = topology.hostfile.hosts
    assert hosts[0].ssh == "127.0.0.1" and sorted(one.ssh for one in hosts) == sorted(names_of(count))
    order = [names_of(count).index(host.ssh) for host in hosts]
    for rank, host in enumerate(hosts):
        for other, devices in enumerate(host.rdma):
            pair = (min(order[rank], order[other]), max(order[rank], order[other]))
            named = [devices] if isinstance(devices, str) else devices or []
            assert set(named) <= {f"rdma_{ends[order[rank]]}" for ends in direct.get(pair, [])}
            is_near = abs(rank - other) in (1, count - 1)
            assert bool(named) == (rank != other and (topology.hostfile.backend == "jaccl" or is_near))
    if topology.hostfile.backend == "jaccl":
        assert set(direct) == set(combinations(range(count), 2)) and topology.why_not_jaccl is None
    else:
        assert topology.why_not_jaccl
    assert (topology.hostfile.backend, len(topology.ring) < count) != ("jaccl-ring", True)


def networks_in_use(cluster: FakeCluster) -> list[IPv4Network]:
    """One for each end that has one."""
    return [
        one.network
        for mac, own in enumerate(cluster.macs)
        for _, device in own.hardware_ports
        for one in cluster.addresses(mac, device)
        if not one.ip.is_link_local
    ]


@pytest.mark.parametrize("block", range(10))
@pytest.mark.slow
def test_random_cables(block: int, tmp_path: Path) -> None:
    compared = 0
    for seed in range(50 * block, 50 * (block + 1)):
        cluster = random_graph(seed)
        before = copy.deepcopy(cluster)
        topology = topology_of(ask(cluster))
        check(cluster, topology)
        theirs = ask_mlx(cluster, tmp_path)
        if theirs is not None:
            compared += 1
            compare_with_mlx(cluster, topology, theirs)
        apply(cluster, topology)
        check_addresses(cluster, topology)
        again = topology_of(ask(cluster))
        assert not again.plan.commands and again.hostfile == topology.hostfile
        apply(cluster, topology, undo=True)
        assert cluster == before
    assert compared > 10


def check_addresses(cluster: FakeCluster, topology: Topology) -> None:
    """Each network has its two ends and no third, and none overlaps another."""
    lan = IPv4Network(cluster.macs[0].lan, strict=False)
    found = [one for one in networks_in_use(cluster) if one != lan]
    assert all(found.count(one) == 2 for one in found)
    assert not any(one.overlaps(other) for one, other in combinations({*found, lan}, 2))
    if topology.hostfile.backend == "ring" and len(topology.ring) == len(cluster.macs):
        for rank, host in enumerate(topology.hostfile.hosts):
            before = names_of(len(cluster.macs)).index(topology.hostfile.hosts[rank - 1].ssh)
            theirs = [one for _, name in cluster.macs[before].hardware_ports for one in cluster.addresses(before, name)]
            assert host.ips and all(any(IPv4Address(ip) in one.network for one in theirs) for ip in host.ips)


def compare_with_mlx(cluster: FakeCluster, topology: Topology, theirs: dict[str, object]) -> None:
    """The same, but for reasons against JACCL that mlx doesn't look at, docks, and bridges of two."""
    ours = topology.hostfile
    if any(cable.dock for cable in cluster.cables):
        assert len(topology.ring) == len(cluster.macs)
        return
    assert isinstance(theirs["hosts"], list)
    if cluster.macs[0].thunderbolt == 5:
        assert ours.backend == theirs["backend"]
    if ours.backend != theirs["backend"]:
        return
    assert [host.ssh for host in ours.hosts] == [host["ssh"] for host in theirs["hosts"]]
    assert [list(host.rdma) for host in ours.hosts] == [host["rdma"] for host in theirs["hosts"]]
    if len(cluster.macs) > 2 and ours.backend == "ring":
        off = int(IPv4Address("10.205.0.0")) - int(IPv4Address("192.168.0.0"))
        moved = [[str(IPv4Address(ip) + off) for ip in host["ips"]] for host in theirs["hosts"]]
        assert [list(host.ips) for host in ours.hosts] == moved
