"""Which addresses of hosts are taken for their LAN's: not those of bridges to containers and virtual machines on a host."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Interface

import pytest

from hippo_mpi.cluster.asking.facts import Facts, Interface
from hippo_mpi.cluster.cabling.topology import lan_addresses
from hippo_mpi.cluster.link.link import pairs_of
from tests.unit.test_checks import healthy

GUESTS = (
    "docker0", "podman1", "cni0", "cni-podman0", "virbr0", "br-0123456789ab", "lxdbr0", "lxcbr0", "incusbr0", "bridge100", "vmnet8",
)  # fmt: skip


def host(*interfaces: str) -> Facts:
    """Of interfaces, each as in "en0 10.0.0.1/24"."""
    facts = healthy(3)[0].facts
    assert facts is not None
    named = [one.split() for one in interfaces]
    return replace(facts, interfaces=tuple(Interface(name, (IPv4Interface(address),)) for name, address in named))


@pytest.mark.parametrize("name", GUESTS)
def test_bridges_to_what_runs_on_a_host_are_no_lan(name: str) -> None:
    one, other = (
        host(f"{name} 172.17.0.1/16", "en0 192.168.1.7/24"),
        host(f"{name} 172.17.0.1/16", "en0 192.168.1.8/24"),
    )
    assert lan_addresses([one, other]) == ["192.168.1.7", "192.168.1.8"]
    assert lan_addresses([one, host(f"{name} 172.17.0.2/16", "en0 10.0.0.8/24")]) == ["192.168.1.7", "10.0.0.8"]
    assert lan_addresses([one, host(f"{name} 172.17.0.1/16")]) == ["192.168.1.7", None]


@pytest.mark.parametrize("name", ["br0", "br1", "br-lan", "bridge0", "bond0", "brazil"])
def test_bridges_of_which_the_lan_is_a_part_are(name: str) -> None:
    hosts = [host(f"{name} 192.168.1.{number}/24") for number in (7, 8)]
    assert lan_addresses(hosts) == ["192.168.1.7", "192.168.1.8"]


def test_an_address_that_two_hosts_have_is_none_of_a_lan() -> None:
    """Whatever its interface is called."""
    hosts = [host("made0 172.30.0.1/16", f"en0 192.168.1.{number}/24") for number in (7, 8)]
    assert lan_addresses(hosts) == ["192.168.1.7", "192.168.1.8"]


def test_links_between_those_that_are_no_neighbors_go_by_the_lan() -> None:
    """Not to the network of virtual machines that each has for itself, though it is as small."""
    hosts = next(found for found in map(healthy, range(100)) if len(found) == 4)
    given = [host("virbr0 192.168.122.1/24", f"en0 192.168.7.{rank + 10}/24") for rank in range(4)]
    hosts = [replace(one, facts=facts) for one, facts in zip(hosts, given, strict=True)]
    among = [pair.address for pair in pairs_of(hosts, every_pair=True) if (pair.rank, pair.other) in ((0, 2), (1, 3))]
    assert among == ["192.168.7.12", "192.168.7.13"]
