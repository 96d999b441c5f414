"""Fake Macs as hosts of this machine: namespaces with sshd, in which macOS's commands are where they are on a Mac.

Each has an overlay over /usr with small scripts that print what the model says, and a Python whose os.uname says Darwin.
A command that changes a setting changes the model, which all of them share, and what the others print next.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.cabled_hosts import Host, cabled_hosts, reached_by_ssh
from tests.fake_macs.model import FakeCable, FakeCluster, FakeMac, FakeService
from tests.fake_macs.shims import SharedMacs

UNAME = """
import os
_uname = os.uname
os.uname = lambda: os.uname_result(("Darwin", _uname().nodename, "25.4.0", "Darwin Kernel Version 25.4.0", "arm64"))
"""


@dataclass
class FakeHost(Host):
    """A namespace whose /usr has the commands of a Mac."""

    commands: str = ""

    def command(self, words: Sequence[str]) -> list[str]:
        mount = f"mount --make-rprivate / && mount -t overlay overlay -o lowerdir={self.commands}:/usr /usr"
        script = f'{mount} && hostname {self.name} && exec "$@"'
        namespaces = ["nsenter", f"--net=/run/netns/{self.namespace}", "unshare", "--uts", "--mount"]
        return [*namespaces, "sh", "-c", script, "sh", *words]


@dataclass
class MacHosts:
    """Macs that ssh reaches; host 0 is where commands are typed, in the environment `env`."""

    hosts: list[FakeHost]
    macs: SharedMacs
    env: dict[str, str]
    folder: Path


@contextlib.contextmanager
def mac_hosts(folder: Path, count: int, cables: Sequence[tuple[int, int]]) -> Iterator[MacHosts]:
    """Macs joined by cables, whose ports have the namespaces' addresses, and by a LAN."""
    shared = SharedMacs(folder / "macs")
    site = folder / "site"
    site.mkdir(parents=True)
    (site / "sitecustomize.py").write_text(UNAME)
    shared.folder.mkdir()
    path = ":".join(filter(None, [str(site), os.environ.get("PYTHONPATH", "")]))
    with cabled_hosts(count, cables, lan=True) as plain:
        hosts = [FakeHost(**vars(host), commands=str(shared.commands_of(host.number))) for host in plain]
        shared.store(macs_of(hosts, cables))
        with reached_by_ssh(hosts, folder, [f"SetEnv=PYTHONPATH={path}"]) as env:
            yield MacHosts(hosts, shared, {**env, "PYTHONPATH": path}, folder)


def macs_of(hosts: Sequence[Host], cables: Sequence[tuple[int, int]]) -> FakeCluster:
    """The model of hosts: each cable at the next port, which has a service of its own."""
    macs = [FakeMac(host.name, host.number, lan=f"{host.lan}/24") for host in hosts]
    cluster = FakeCluster(macs)
    used = [0] * len(hosts)
    for one, other in cables:
        for mac in (one, other):
            used[mac] += 1
        cluster.cables.append(FakeCable(((one, used[one]), (other, used[other]))))
        for mac, peer in ((one, other), (other, one)):
            port = macs[mac].port(used[mac])
            words = (hosts[mac].cables[peer], "255.255.255.252")
            macs[mac].services.append(
                FakeService(f"Hippo Thunderbolt {port.receptacle}", port.interface, "manual", words)
            )
            macs[mac].members.remove(port.interface)
    return cluster
