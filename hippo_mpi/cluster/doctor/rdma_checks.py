"""What keeps Macs from RDMA over Thunderbolt, and whether a hostfile's devices lead where it says.

Nothing is tried out: a Mac has few RDMA resources, and attempts that fail can use them up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hippo_mpi.cluster.asking.facts import Probed
from hippo_mpi.cluster.asking.macos import MacFacts
from hippo_mpi.cluster.asking.rdma import why_no_rdma
from hippo_mpi.cluster.cabling.cables import Cable, cables_of
from hippo_mpi.cluster.doctor.cable_checks import macs_of, port_name
from hippo_mpi.cluster.doctor.findings import ERROR, INFO, WARNING, Check, Finding

_PREFIX = "rdma_"


def devices_of(host: Probed, other: int) -> list[str]:
    """Return the devices that a hostfile names for the cable to another rank."""
    found = host.host.rdma[other] if other < len(host.host.rdma) else None
    return [found] if isinstance(found, str) else [str(one) for one in found or ()]


def _asks_for_rdma(hosts: Sequence[Probed]) -> bool:
    return any(any(host.host.rdma) for host in hosts)


def _possible(hosts: Sequence[Probed]) -> Iterator[Finding]:
    """Check each Mac that has a cable, or that a hostfile wants to use RDMA."""
    macs = macs_of(hosts)
    cabled = {end.host for cable in cables_of(macs) for end in cable.ends}
    is_wanted = any(any(host.host.rdma) for host in hosts) or any(mac.rdma for mac in macs if mac)
    for rank, (host, mac) in enumerate(zip(hosts, macs, strict=True)):
        no = why_no_rdma(mac) if mac and (rank in cabled or any(host.host.rdma)) else None
        if not no or not mac:
            continue
        weight = ERROR if any(host.host.rdma) else None
        if no.is_final:
            fix = "use the ring: nothing on that Mac can change this" if weight else "the ring is right for it"
            yield Finding("rdma-impossible", host.host.ssh, no.why, fix, weight or INFO)
        elif no.is_off:
            fix = "start it in Recovery (hold the power button), Utilities > Terminal: rdma_ctl enable; then restart"
            if mac.rdma_at_boot:
                fix = "restart it: RDMA is enabled from the next start on"
            yield Finding("rdma-off", host.host.ssh, no.why, fix, weight or (WARNING if is_wanted else INFO))
        elif no.is_too_old:
            yield Finding("rdma-impossible", host.host.ssh, no.why, "update macOS, or use the ring", weight or INFO)


def _ports(hosts: Sequence[Probed]) -> Iterator[Finding]:
    """Check that devices with a cable are active, where both ends could use RDMA."""
    macs = macs_of(hosts)
    for cable in cables_of(macs):
        ends = [macs[end.host] for end in cable.ends]
        if cable.behind or any(mac is None or why_no_rdma(mac) for mac in ends):
            continue
        for end, mac, other in zip(cable.ends, ends, reversed(ends), strict=True):
            device = f"{_PREFIX}{end.port.interface}"
            if mac and other and (mac.rdma_devices or {}).get(device) is False:
                found = f"{device} on {port_name(end, hosts)} is down, though a cable is plugged in"
                yield Finding("rdma-port-down", hosts[end.host].host.ssh, found, _cure(mac, other), WARNING)
                break


def _cure(mac: MacFacts, other: MacFacts) -> str:
    if mac.build and other.build and mac.build != other.build:
        return (
            f"install the same macOS on both: {mac.version} ({mac.build}) here, {other.version} ({other.build}) there"
        )
    beside = (
        "; a Mac Studio has none at the port beside Ethernet: use another"
        if _is_studio(mac) or _is_studio(other)
        else ""
    )
    return f"plug the cable in again; if that doesn't help, restart both{beside}"


def _is_studio(mac: MacFacts) -> bool:
    return mac.model in ("Mac13,1", "Mac13,2", "Mac14,13", "Mac14,14", "Mac15,14", "Mac16,9")


def _matrix(hosts: Sequence[Probed]) -> Iterator[Finding]:
    """Check a hostfile's devices against the cables, as they are now."""
    macs = macs_of(hosts)
    if not _asks_for_rdma(hosts) or any(mac is None or mac.ports is None for mac in macs):
        return
    cables = cables_of(macs)
    for rank, host in enumerate(hosts):
        wrong = [
            (other, device) for other in range(len(hosts)) for device in devices_of(host, other)
            if device not in _right(rank, other, cables)
        ]  # fmt: skip
        if not wrong:
            continue
        other, device = wrong[0]
        leads = next((cable for cable in cables if device == _device(cable, rank)), None)
        to = hosts[sum(leads.pair) - rank].host.ssh if leads else "no other host"
        right = _right(rank, other, cables)
        found = f"{device} is to lead to {hosts[other].host.ssh}, and leads to {to}"
        fix = f"write {' or '.join(right)} instead" if right else "join them by a cable, or use the ring"
        yield Finding("jaccl-matrix", host.host.ssh, found, fix)


def _right(rank: int, other: int, cables: Sequence[Cable]) -> list[str]:
    """Return the devices of a rank that lead to another one."""
    pair = (min(rank, other), max(rank, other))
    return [_device(cable, rank) for cable in cables if cable.pair == pair and not cable.behind]


def _device(cable: Cable, rank: int) -> str:
    return f"{_PREFIX}{cable.end_at(rank).port.interface}" if rank in cable.pair else ""


def _addresses(hosts: Sequence[Probed]) -> Iterator[Finding]:
    """Check that each device of a hostfile has an IPv4 address of its own, by which JACCL knows it."""
    for host in hosts:
        named = {device.removeprefix(_PREFIX) for other in range(len(hosts)) for device in devices_of(host, other)}
        for one in sorted(named):
            interfaces = host.facts.interfaces if host.facts else None
            addresses = [a for i in interfaces or () if i.name == one for a in i.addresses if not a.ip.is_link_local]
            if interfaces is not None and host.facts and host.facts.mac and not addresses:
                found = f"{one} has no fixed IPv4 address, by which JACCL finds {_PREFIX}{one}"
                fix = "give its port a network service with an address of its own"
                yield Finding("rdma-no-ipv4", host.host.ssh, found, fix)
                break


CHECKS: tuple[Check, ...] = (_possible, _matrix, _addresses, _ports)
NAMES = ("rdma-impossible", "rdma-off", "jaccl-matrix", "rdma-no-ipv4", "rdma-port-down")
