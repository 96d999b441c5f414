"""Hosts for tests, on this machine: network namespaces with names of their own, joined by cables, by a LAN, or both.

A cable is a link of its own subnet, as between the Thunderbolt ports of two Macs. Linux and root only.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests import ranks
from tests.ranks import Rank

SSHD = shutil.which("sshd", path="/usr/sbin:/usr/bin:/usr/local/sbin") or ""
CAN_MAKE = os.geteuid() == 0 and bool(shutil.which("ip")) and bool(shutil.which("nsenter"))
WHY_NOT = "needs root and ip (iproute2), to make network namespaces"
_numbers = itertools.count()


@dataclass
class Host:
    """A namespace; `cables` has its address on the cable to each other host, by the other's number."""

    number: int
    namespace: str
    cables: dict[int, str] = field(default_factory=dict)
    lan: str = ""

    @property
    def name(self) -> str:
        return f"mini{self.number}"

    def command(self, words: Sequence[str]) -> list[str]:
        """A command line that runs on this host."""
        named = f'hostname {self.name}; exec "$@"'
        return ["nsenter", f"--net=/run/netns/{self.namespace}", "unshare", "--uts", "sh", "-c", named, "sh", *words]


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def _join(end: str, host: Host, address: str) -> None:
    """Give an end of a link to a host."""
    _ip("link", "set", end, "netns", host.namespace)
    _ip("-n", host.namespace, "addr", "add", address, "dev", end)
    _ip("-n", host.namespace, "link", "set", end, "up")


@contextlib.contextmanager
def cabled_hosts(
    count: int, cables: Sequence[tuple[int, int]], lan: bool = False, routed: bool = False
) -> Iterator[list[Host]]:
    """So many hosts, with these cables between them.

    Args:
        count: of hosts.
        cables: pairs of hosts; the k-th is the network 10.205.k.0/30.
        lan: whether all are in 192.168.77.0/24, too.
        routed: whether that is the way to everywhere else.
    """
    made = f"hippo{os.getpid()}x{next(_numbers)}"
    hosts = [Host(number, f"{made}-{number}") for number in range(count)]
    switch = f"{made}-lan"
    names = [host.namespace for host in hosts] + [switch] * lan
    try:
        for name in names:
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        for number, pair in enumerate(cables):
            ends = [f"tb{os.getpid() % 100_000}{number}{side}" for side in "ab"]
            _ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
            for side, here in enumerate(pair):
                address = f"10.205.{number}.{side + 1}"
                hosts[here].cables[pair[1 - side]] = address
                _join(ends[side], hosts[here], f"{address}/30")
        if lan:
            _ip("-n", switch, "link", "add", "br0", "type", "bridge")
            _ip("-n", switch, "link", "set", "br0", "up")
        for host in hosts if lan else ():
            port = f"en{os.getpid() % 100_000}{host.number}"
            _ip("link", "add", port, "type", "veth", "peer", "name", f"{port}b")
            host.lan = f"192.168.77.{host.number + 1}"
            _join(port, host, f"{host.lan}/24")
            _ip("link", "set", f"{port}b", "netns", switch)
            _ip("-n", switch, "link", "set", f"{port}b", "master", "br0", "up")
            if routed:
                _ip("-n", host.namespace, "route", "add", "default", "via", "192.168.77.254")
        yield hosts
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def rated(host: Host, address: str, rate: str) -> None:
    """Let no more than a rate, such as 100mbit, out of the interface of a host that has an address."""
    words = ("root", "tbf", "rate", rate, "burst", "256kb", "latency", "50ms")
    into = ["nsenter", f"--net=/run/netns/{host.namespace}", "tc", "qdisc", "add", "dev", _device(host, address)]
    subprocess.run([*into, *words], check=True, capture_output=True)


def _device(host: Host, address: str) -> str:
    shown = subprocess.run(
        ["ip", "-n", host.namespace, "-j", "addr", "show", "to", address], check=True, capture_output=True
    ).stdout
    return str(next(one["ifname"] for one in json.loads(shown) if one))


def cut(host: Host, other: Host) -> None:
    """Pull the cable between two hosts."""
    for one, address in ((host, host.cables[other.number]), (other, other.cables[host.number])):
        _ip("-n", one.namespace, "link", "set", _device(one, address), "down")


@contextlib.contextmanager
def cabled_ring(
    hosts: Sequence[Host], command: Sequence[str], folder: Path, env: dict[str, str] | None = None
) -> Iterator[list[Rank]]:
    """A rank on each host; each gets the ring's data on its cable to the rank before, as mlx.distributed_config has it."""
    hostfile = folder / "ring.json"
    addresses = [host.cables[hosts[number - 1].number] for number, host in enumerate(hosts)]
    hostfile.write_text(json.dumps([[f"{address}:{17_000 + rank}"] for rank, address in enumerate(addresses)]))
    started: list[Rank] = []
    try:
        for rank, host in enumerate(hosts):
            ring = {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hostfile)}
            started.append(ranks.start(host.command(command), {**ring, **(env or {})}))
        yield started
    finally:
        ranks.end(started)


@contextlib.contextmanager
def reached_by_ssh(hosts: Sequence[Host], folder: Path, options: Sequence[str] = ()) -> Iterator[dict[str, str]]:
    """An sshd on each host, and the environment in which ssh knows them by name, by way of the LAN.

    Args:
        hosts: with a LAN.
        folder: for keys and settings.
        options: of all sshds, such as "SetEnv=HOME=/tmp/anna".
    """
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    (folder / "authorized").write_bytes((folder / "user.pub").read_bytes())
    Path("/run/sshd").mkdir(exist_ok=True)
    config = "".join(f"Host {host.name}\n HostName {host.lan}\n" for host in hosts)
    (folder / "config").write_text(
        f"{config}Host *\n IdentityFile {folder / 'user'}\n StrictHostKeyChecking no\n UserKnownHostsFile /dev/null\n"
    )
    wrapper = folder / "bin" / "ssh"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder / "config"} "$@"\n')
    wrapper.chmod(0o755)
    given = [word for option in options for word in ("-o", option)]
    daemons = [
        ranks.start(host.command(
            [SSHD, "-D", "-e", "-f", "/dev/null", "-h", str(folder / "host"), "-o", f"ListenAddress={host.lan}", "-o",
             f"AuthorizedKeysFile={folder / 'authorized'}", "-o", "StrictModes=no", "-o", "PermitRootLogin=yes", *given]
        ))
        for host in hosts
    ]  # fmt: skip
    try:
        for daemon in daemons:
            daemon.await_output("Server listening", "stderr")
        yield {"PATH": f"{wrapper.parent}:{ranks.BIN}:{os.environ['PATH']}"}
    finally:
        below = [pid for daemon in daemons for pid in ranks.descendants(daemon.process.pid)]
        ranks.end(daemons)
        for pid in below:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
