"""What can be wrong with the hosts of a run: a check each, from the facts to findings. Nothing is asked or changed here.

A check's name is stable, for --check and for people who search. It says which host, what was found, and what to do.
"""

from __future__ import annotations

import ipaddress
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from hippo_mpi.cluster.facts import Facts, Probed, Process
from hippo_mpi.cluster.remote import NO_PYTHON
from hippo_mpi.transport.ports import THIS_MACHINE
from hippo_mpi.units import count_of, show_bytes

ERROR, WARNING = "error", "warning"
_MIN_FREE_BYTES = 2 << 30
_MIN_OPEN_FILES = 1024
_MOST_OFF_S = 5.0  # between clocks, beyond what the question took
_VPN = ipaddress.IPv4Network("100.64.0.0/10")
_LINK_LOCAL = ipaddress.IPv4Network("169.254.0.0/16")
_RANK = re.compile(r"\S*python\S* (-m |\S*/)hippo_mpi\.(generate|chat|batch|benchmark)( |$)")
_SHELL = re.compile(r"(^|/)((ba|da|z|fi|k)?sh|python[\d.]*)$")
_SIMPLE_SHELLS = ("bash", "zsh")


@dataclass(frozen=True)
class Finding:
    """Something that is wrong, or may be.

    Args:
        check: its name.
        host: ssh's name of the host.
        found: what was seen, with numbers.
        fix: what to do.
        weight: an error keeps ranks from working.
    """

    check: str
    host: str
    found: str
    fix: str
    weight: str = ERROR


Known = tuple[int, Probed, Facts]
"""A rank, its host, and what that said."""
Check = Callable[[Sequence[Probed]], Iterator[Finding]]


def known(hosts: Sequence[Probed]) -> list[Known]:
    """Return the hosts that answered."""
    return [(rank, host, host.facts) for rank, host in enumerate(hosts) if host.facts is not None]


def diagnose(hosts: Sequence[Probed], only: Sequence[str] = ()) -> list[Finding]:
    """Return what is wrong, errors first; of some checks only, if any are named."""
    findings = [one for check in CHECKS for one in check(hosts) if not only or one.check in only]
    return sorted(findings, key=lambda one: one.weight != ERROR)


# ---- getting in


def _ssh(hosts: Sequence[Probed]) -> Iterator[Finding]:
    for host in hosts:
        name, said = host.host.ssh, host.error
        if host.facts is not None or not said or said == NO_PYTHON:
            continue
        if "Host key verification failed" in said or "IDENTIFICATION HAS CHANGED" in said:
            fix = f"log in once and compare the fingerprint: ssh {name}; if the machine is new: ssh-keygen -R {name}"
            yield Finding("ssh-host-key", name, said, fix)
        elif "Permission denied" in said:
            yield Finding("ssh-refused", name, said, f"give it your key: ssh-copy-id {name}")
        elif "resolve" in said:
            yield Finding("ssh-refused", name, said, "check the name, or use the machine's address")
        elif "refused" in said:
            fix = "start its ssh server (macOS: System Settings > General > Sharing > Remote Login)"
            yield Finding("ssh-refused", name, said, fix)
        else:
            yield Finding(
                "ssh-refused", name, said, f"is the machine on, awake and in the network? try: ssh {name} true"
            )


def _ssh_noise(hosts: Sequence[Probed]) -> Iterator[Finding]:
    for host in hosts:
        if host.noise:
            said = host.noise.splitlines()[0][:60]
            fix = "mlx.launch takes it for an answer: print it only in interactive shells (./launch/run doesn't mind)"
            yield Finding("ssh-noise", host.host.ssh, f"its shell prints {said!a} at each login", fix, WARNING)


def _login_shell(hosts: Sequence[Probed]) -> Iterator[Finding]:
    for _, host, facts in known(hosts):
        shell = facts.shell.rpartition("/")[2]
        if host.host.ssh != THIS_MACHINE and shell and shell not in _SIMPLE_SHELLS:
            fix = "only mlx.launch minds: use ./launch/run, or chsh -s /bin/bash"
            yield Finding("login-shell", host.host.ssh, f"accounts there log in to {shell}", fix, WARNING)


def _python(hosts: Sequence[Probed]) -> Iterator[Finding]:
    for host in hosts:
        if host.error == NO_PYTHON:
            yield Finding(
                "python-missing", host.host.ssh, "no Python of 3.8 or later was found", "install Python 3.11 or later"
            )
    for _, host, facts in known(hosts):
        if not facts.versions:
            where = host.host.python or "the path that this machine has"
            fix = 'set up the project there, and name its Python in the hostfile: "python": "~/hippo/.venv/bin/python"'
            yield Finding("path-differs", host.host.ssh, f"{where} is no Python: {facts.versions_error}", fix)
        elif not facts.versions.get("hippo-mpi"):
            yield Finding(
                "python-missing", host.host.ssh, "its Python has no hippo_mpi", "set up the project there: ./launch/run"
            )


def _versions(hosts: Sequence[Probed]) -> Iterator[Finding]:
    asked = [(host.host.ssh, facts.versions) for _, host, facts in known(hosts) if facts.versions]
    for name, versions in asked[1:]:
        first, own = asked[0]
        for package in ("mlx", "mlx-lm", "hippo-mpi", "Python"):
            here, there = own.get(package), versions.get(package)
            if package == "Python":
                here, there = _minor(here), _minor(there)
            if here != there and here and there:
                weight = WARNING if package == "Python" else ERROR
                fix = (
                    f"install the same there: pip install {package}=={here}"
                    if package != "Python"
                    else f"use Python {here} there"
                )
                yield Finding("versions-differ", name, f"{package} {there}, but {here} on {first}", fix, weight)


def _minor(version: str | None) -> str | None:
    return ".".join(version.split(".")[:2]) if version else None


# ---- addresses and links


def _addresses(hosts: Sequence[Probed]) -> Iterator[Finding]:
    for _, host, facts in known(hosts):
        for address, why in facts.own.items():
            if why:
                has = ", ".join(
                    str(a.ip) for one in facts.interfaces or () for a in one.addresses if not a.ip.is_loopback
                )
                fix = f"give an interface that address, or name another in the hostfile; it has {has or 'none'}"
                yield Finding("address-missing", host.host.ssh, f"{address} is none of its addresses ({why})", fix)
            elif ipaddress.ip_address(address) in _LINK_LOCAL:
                fix = "give the cable's ports fixed addresses: these change, and may be reached by another interface"
                yield Finding("self-assigned", host.host.ssh, f"{address} is one that it gave itself", fix, WARNING)
            elif ipaddress.ip_address(address) in _VPN:
                yield Finding(
                    "vpn-path",
                    host.host.ssh,
                    f"{address} is a VPN's",
                    "use the address of the LAN, or a cable's",
                    WARNING,
                )


def _address_clash(hosts: Sequence[Probed]) -> Iterator[Finding]:
    for _, host, facts in known(hosts):
        networks = [(one.name, a) for one in facts.interfaces or () for a in one.addresses if not a.ip.is_loopback]
        for number, (name, address) in enumerate(networks):
            for other, theirs in networks[:number]:
                if other != name and address.network.overlaps(theirs.network):
                    found = f"{address} on {name} overlaps {theirs} on {other}"
                    yield Finding("address-clash", host.host.ssh, found, "give one of them another network")


def _neighbors(hosts: Sequence[Probed]) -> Iterator[Finding]:
    """Check how each rank's packets reach the next one."""
    for rank, host, facts in known(hosts):
        other = hosts[(rank + 1) % len(hosts)].host
        for address, reach in facts.reached.items():
            towards = f"{address} of rank {(rank + 1) % len(hosts)} ({other.ssh})"
            near = facts.interface_towards(address)
            leaving = facts.interface_of(reach.source) if reach.source else None
            if (
                near
                and leaving
                and near.name != leaving.name
                and ipaddress.ip_address(address) not in _own_addresses(facts)
            ):
                found = f"packets to {towards} leave by {leaving.name} ({reach.source}), not by {near.name}, which is in its network"
                yield Finding(
                    "wrong-interface", host.host.ssh, found, f"route them by {near.name}: see `ip route get {address}`"
                )
            elif reach.why:
                through = f" by {leaving.name} ({reach.source})" if leaving else ""
                fix = "is the cable plugged in, is the interface up on both ends, does a firewall drop it?"
                yield Finding("link-down", host.host.ssh, f"{towards} isn't reached{through}: {reach.why}", fix)


def _own_addresses(facts: Facts) -> set[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    return {a.ip for one in facts.interfaces or () for a in one.addresses}


def _mtu(hosts: Sequence[Probed]) -> Iterator[Finding]:
    found = known(hosts)
    for rank, host, facts in found:
        for next_rank, other, theirs in found:
            if next_rank != (rank + 1) % len(hosts) or rank == next_rank:
                continue
            for address in other.host.ips:
                near, far = facts.interface_towards(address), theirs.interface_of(address)
                if near and far and near.mtu and far.mtu and near.mtu != far.mtu:
                    what = f"{near.name} has MTU {near.mtu}, but {far.name} of {other.host.ssh}, on the same link, {far.mtu}"
                    yield Finding("mtu-differs", host.host.ssh, what, "give both ends the same MTU", WARNING)


def _ports(hosts: Sequence[Probed]) -> Iterator[Finding]:
    for _, host, facts in known(hosts):
        for port, why in facts.taken.items():
            yield Finding(
                "port-taken",
                host.host.ssh,
                f"port {port}: {why}",
                "end who listens there, or give another --starting-port",
            )


# ---- machines


def _names(hosts: Sequence[Probed]) -> Iterator[Finding]:
    by_machine = defaultdict[str, set[str]](set)
    for _, host, facts in known(hosts):
        if facts.machine:
            by_machine[f"{facts.machine} {facts.name}"].add(host.host.ssh)
    for names in by_machine.values():
        if len(names) > 1:
            found = f"{' and '.join(sorted(names))} are one machine"
            yield Finding(
                "names-same", sorted(names)[0], found, "use one name for it; a machine twice has two ranks", WARNING
            )


def stale_ranks(facts: Facts) -> list[Process]:
    """Return the ranks of a host whose starter is gone, so that they are left to the system's first process.

    In a container that may be a shell, whose own children they are.
    """
    if not facts.first_process or _SHELL.search(facts.first_process.split()[0]):
        return []
    return [one for one in facts.processes or () if one.parent == 1 and _RANK.match(one.command)]


def _stale_ranks(hosts: Sequence[Probed]) -> Iterator[Finding]:
    for _, host, facts in known(hosts):
        if lost := stale_ranks(facts):
            pids = " ".join(str(one.pid) for one in lost)
            found = f"{count_of(len(lost), 'rank')} whose starter is gone (pid {pids})"
            fix = "if nobody needs them: hippo_mpi.cluster stop, with the same hosts"
            yield Finding("stale-ranks", host.host.ssh, found, fix, WARNING)


def _room(hosts: Sequence[Probed]) -> Iterator[Finding]:
    for _, host, facts in known(hosts):
        if facts.cache_free < _MIN_FREE_BYTES:
            found = f"{show_bytes(facts.cache_free)} are free in {facts.cache}, where models are kept"
            yield Finding("disk-full", host.host.ssh, found, "make room, or set HF_HOME to another disk")
        if facts.memory and facts.memory[1] < facts.memory[0] // 4:
            total, free = facts.memory
            found = f"{show_bytes(free)} of {show_bytes(total)} are free"
            yield Finding(
                "memory-taken", host.host.ssh, found, "end what takes it, or expect fewer layers there", WARNING
            )
        if 0 <= facts.open_files < _MIN_OPEN_FILES:
            fix = "raise it for ssh sessions, such as in /etc/security/limits.conf"
            yield Finding("open-files", host.host.ssh, f"a process may open {facts.open_files} files", fix, WARNING)


def _environment(hosts: Sequence[Probed]) -> Iterator[Finding]:
    for _, host, facts in known(hosts):
        if facts.environment.get("MLX_METAL_FAST_SYNCH") == "1":
            fix = "unset it: it has been seen to hang GPUs until a reboot (mlx #3142)"
            yield Finding("fast-synch", host.host.ssh, "MLX_METAL_FAST_SYNCH is 1", fix, WARNING)
        off_s = facts.clock - host.asked_s
        if host.asked_s and abs(off_s) > _MOST_OFF_S:
            yield Finding("clock", host.host.ssh, f"its clock is {off_s:+.0f} s off", "set it by NTP", WARNING)


CHECKS: tuple[Check, ...] = (
    _ssh, _python, _versions, _addresses, _address_clash, _neighbors, _ports, _stale_ranks, _room, _ssh_noise,
    _login_shell, _mtu, _names, _environment,
)  # fmt: skip
NAMES = (
    "ssh-refused", "ssh-host-key", "ssh-noise", "login-shell", "python-missing", "path-differs", "versions-differ",
    "address-missing", "address-clash", "self-assigned", "vpn-path", "wrong-interface", "link-down", "mtu-differs",
    "port-taken", "names-same", "stale-ranks", "disk-full", "memory-taken", "open-files", "fast-synch", "clock",
)  # fmt: skip
"""Of all checks."""
