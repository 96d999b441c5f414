"""Setup's addresses on fake Macs, by ssh and with macOS's own words: set, recorded, and put back to the last bit."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cabled_hosts import CAN_MAKE, SSHD, WHY_NOT
from tests.fake_macs.hosts import MacHosts, mac_hosts

pytestmark = [
    pytest.mark.skipif(not CAN_MAKE or not SSHD, reason=f"{WHY_NOT}; and sshd (openssh-server)"),
    pytest.mark.timeout(200),
]
HOMES = """
os.environ["HOME"] = os.path.join({folder!r}, _uname().nodename)
"""


@pytest.fixture
def three(tmp_path: Path) -> Iterator[MacHosts]:
    """Three Macs in a ring of cables, as they come: all ports in the bridge, no addresses. Each has a home of its own."""
    with mac_hosts(tmp_path / "macs", 3, [(0, 1), (1, 2), (2, 0)]) as hosts:
        site = tmp_path / "macs" / "site" / "sitecustomize.py"
        site.write_text(site.read_text() + HOMES.format(folder=str(tmp_path)))
        for host in hosts.hosts:
            (tmp_path / host.name).mkdir()
        with hosts.macs.changed() as cluster:
            for mac in cluster.macs:
                mac.members = sorted(port.interface for port in mac.ports)
                mac.services = mac.services[:3]
        yield hosts


def cluster(three: MacHosts, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = three.hosts[0].command([sys.executable, "-m", "hippo_mpi.cluster", *words])
    return subprocess.run(
        command, cwd=folder, env={**os.environ, **three.env}, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=150
    )  # fmt: skip


def left(three: MacHosts, folder: Path) -> list[str]:
    return [host.name for host in three.hosts if (folder / host.name / ".hippo-mpi").exists()]


def test_addresses_are_set_and_put_back(three: MacHosts, tmp_path: Path) -> None:
    before = three.macs.load()
    asked = cluster(three, tmp_path, "setup", "mini1", "mini2", "--timeout", "60")
    assert asked.returncode == 0 and asked.stdout.endswith("nothing was changed\n"), asked.stderr
    commands = [line for line in asked.stdout.splitlines() if "networksetup" in line or "ifconfig" in line]
    assert {line.split()[0] for line in commands} == {"here:", "mini1:", "mini2:"}
    assert all(" sudo /" in line for line in commands) and three.macs.load() == before

    done = cluster(three, tmp_path, "setup", "mini1", "mini2", "--yes", "--timeout", "60")
    # The wheels here are none of a Mac's, and there is no way to the internet.
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and ": pip: " in done.stderr, done.stderr
    assert three.macs.load() != before and not (tmp_path / "hosts.json").exists()

    for name in ("mini2", "mini1"):  # with the last one what was set here
        removed = cluster(three, tmp_path, "remove", name, "--yes")
        assert removed.returncode == 0, removed.stderr
    assert three.macs.load() == before and left(three, tmp_path) == []
