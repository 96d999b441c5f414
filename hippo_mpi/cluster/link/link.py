"""Measures the links of a run: which pairs there are, a program on every host, one pair after the other, then all."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from hippo_mpi.cluster.asking.facts import Facts, Probed, is_address
from hippo_mpi.cluster.link.link_kinds import LinkKind, kinds_of
from hippo_mpi.cluster.link.link_measure import Measured, Pair, measure_alone, measure_at_once
from hippo_mpi.cluster.programs.host_program import HostLost, HostProgram
from hippo_mpi.transport.ports import THIS_MACHINE
from hippo_mpi.units import visible


@dataclass(frozen=True)
class Links:
    """What was found about all links.

    Args:
        measured: a link each.
        kinds: of each rank's interfaces, by name; empty where nothing is known.
        lost: why hosts that answered the doctor's questions have no program.
    """

    measured: Sequence[Measured]
    kinds: Sequence[Mapping[str, LinkKind]]
    lost: Mapping[int, str]


def pairs_of(hosts: Sequence[Probed], every_pair: bool) -> list[Pair]:
    """Return the neighbors of the ring, by each address of the second; with `every_pair` also those that aren't."""
    count = len(hosts)
    ring = [(rank, (rank + 1) % count) for rank in range(count)]
    found = [Pair(rank, other, address) for rank, other in ring for address in addresses_of(hosts, other)]
    for other in range(count) if every_pair else ():
        for rank in range(other):
            if (rank, other) not in ring and (other, rank) not in ring:
                found += [Pair(rank, other, address) for address in _common_addresses(hosts, rank, other)]
    return [pair for pair in found if not is_same_machine(hosts, pair)]


def is_in_ring(pair: Pair, size: int) -> bool:
    """Return whether a ring of that size has its second rank behind its first."""
    return (pair.rank + 1) % size == pair.other


def is_same_machine(hosts: Sequence[Probed], pair: Pair) -> bool:
    """Return whether both ranks of a pair run on one machine."""
    one, other = hosts[pair.rank], hosts[pair.other]
    return one.host.ssh == other.host.ssh or (
        one.facts is not None and one.facts.interface_of(pair.address) is not None
    )


def addresses_of(hosts: Sequence[Probed], rank: int) -> tuple[str, ...]:
    """Return a host's addresses for data; if the hostfile has none, the one by which ssh reaches it."""
    host = hosts[rank]
    if host.host.ips:
        return host.host.ips
    others = [one for one in hosts if one.host.ssh != THIS_MACHINE]
    asked, place = (others, 0) if host.host.ssh == THIS_MACHINE else ([host], 2)
    for one in asked:
        words = one.facts.environment.get("SSH_CONNECTION", "").split() if one.facts else []
        if len(words) == 4 and is_address(words[place]):
            return (words[place],)
    return ()


def _common_addresses(hosts: Sequence[Probed], rank: int, other: int) -> tuple[str, ...]:
    """Return the second host's address in the smallest network that both are in: a cable's, if there is one."""
    near, far = hosts[rank].facts, hosts[other].facts
    if near is None or far is None:
        return addresses_of(hosts, other)
    shared = [
        address
        for one in far.interfaces or ()
        for address in (() if one.is_of_guests else one.addresses)
        if not address.ip.is_loopback and near.interface_towards(str(address.ip))
    ]
    if not shared:
        return addresses_of(hosts, other)
    return (str(max(shared, key=lambda address: address.network.prefixlen).ip),)


async def measure(
    hosts: Sequence[Probed], every_pair: bool, seconds: float, timeout_s: float, progress: Callable[[str], None]
) -> Links:
    """Measure all links.

    Args:
        hosts: by rank; those that didn't answer are left out.
        every_pair: whether also those that aren't neighbors.
        seconds: for each rate.
        timeout_s: for a host to start its program.
        progress: told what is being measured.
    """
    programs = [HostProgram(host.host) for host in hosts]
    try:
        started = await asyncio.gather(
            *(_start(host, one, timeout_s) for host, one in zip(hosts, programs, strict=True))
        )
        running = [None if why is not None else one for why, one in zip(started, programs, strict=True)]
        told = [await _interfaces(one, timeout_s) if one else {} for one in running]
        alone = []
        for pair in pairs_of(hosts, every_pair):
            one, other = running[pair.rank], running[pair.other]
            if one is not None and other is not None:
                progress(f"{name_of(hosts, pair.rank)} and {name_of(hosts, pair.other)}")
                alone.append(await measure_alone((one, other), pair, seconds))
        ring = [link for link in alone if is_in_ring(link.pair, len(hosts))]
        rest = [link for link in alone if link not in ring]
        if len(ring) > 1:
            progress("all neighbors at once")
            ring = await measure_at_once(ring, running, seconds)
        kinds = [kinds_of(host, interfaces) for host, interfaces in zip(hosts, told, strict=True)]
        lost = {rank: why for rank, why in enumerate(started) if why}
        return Links([*ring, *rest], kinds, lost)
    finally:
        await asyncio.gather(*(one.close() for one in programs))


async def _start(host: Probed, program: HostProgram, timeout_s: float) -> str | None:
    """Start a host's program; return why it doesn't run, "" if that was known before."""
    if host.facts is None:
        return ""
    try:
        await program.start("link.link_end", timeout_s)
    except HostLost as lost:
        return str(lost)
    return None


async def _interfaces(program: HostProgram, timeout_s: float) -> dict[str, object]:
    try:
        found = await program.ask(timeout_s, do="interfaces")
    except (HostLost, OSError):
        return {}
    return {visible(name): about for name, about in found.items()}


def name_of(hosts: Sequence[Probed], rank: int) -> str:
    """Return what people call a rank's host: this machine by its own name."""
    host = hosts[rank]
    facts: Facts | None = host.facts
    return visible(facts.name, 40) if host.host.ssh == THIS_MACHINE and facts else host.host.ssh
