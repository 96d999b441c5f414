"""hippo_mpi.cluster link, over ssh between namespaces whose cables have rates: it says what is there, and what is wrong."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import ranks
from tests.cabled_hosts import CAN_MAKE, SSHD, WHY_NOT, Host, rated
from tests.spmd.test_doctor import by_the_lan, cable_out, no_sshd
from tests.spmd.test_starter import Cluster, cluster

LINK = [sys.executable, "-m", "hippo_mpi.cluster", "link", "--timeout", "60"]  # of a machine that may be busy
GONE_S = 25.0  # a program that hears nothing any more ends after 10 s

pytestmark = [
    pytest.mark.skipif(not CAN_MAKE or not SSHD, reason=f"{WHY_NOT}; and sshd (openssh-server)"),
    pytest.mark.timeout(120),
]


@pytest.fixture
def three(tmp_path: Path) -> Iterator[Cluster]:
    with cluster(tmp_path) as found:
        yield found


def link(three: Cluster, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        three.hosts[0].command([*LINK, "--hostfile", str(three.hostfile), "--seconds", "0.4", *options]),
        capture_output=True, text=True, timeout=110, env={**os.environ, **three.env},
    )  # fmt: skip


def findings(said: dict[str, Any], weight: str) -> set[tuple[str, str]]:
    return {(one["check"], one["host"]) for one in said["findings"] if one["weight"] == weight}


def test_rates_are_those_of_the_cables_and_faults_are_named(three: Cluster) -> None:
    hosts = three.hosts
    for one, other, rate in ((0, 1, "1gbit"), (1, 0, "1gbit"), (2, 0, "500mbit"), (0, 2, "100mbit")):
        rated(hosts[one], hosts[one].cables[other], rate)
    by_the_lan(three, 1)
    ended = link(three, "--json")
    assert ended.returncode == 2, ended.stderr
    said = json.loads(ended.stdout)
    assert findings(said, "error") == {("wrong-interface", "mini1")}
    # A busy machine may have more.
    assert {("link-slow", "127.0.0.1"), ("link-slow", "mini2"), ("link-lopsided", "mini2")} <= findings(said, "warning")
    first, wrong, lopsided = said["links"]
    for way, gigabits in (
        (first["there"], 1.0),
        (first["back"], 1.0),
        (lopsided["there"], 0.5),
        (lopsided["back"], 0.1),
    ):
        for figure in ("one", "several"):
            assert 0.1 * gigabits < way[figure] * 8e-9 < 1.1 * gigabits, (figure, way)
    assert first["there"]["at_once"] * 8e-9 < 1.1 and first["loaded"]["count"] > 1
    small = first["round_trips"]["64"]
    assert small["count"] > 1 and 0 < small["least_s"] <= small["median_s"] <= small["p99_s"]
    assert first["kind"]["name"] == "10 GbE"
    names = [first["there"][end].rstrip("ab") for end in ("sent_by", "received_by")]
    assert names[0] == names[1] and names[0].startswith("tb") and wrong["there"]["sent_by"].startswith("en")


def test_a_cable_that_is_out_and_a_host_without_sshd(three: Cluster) -> None:
    cable_out(three, 0)
    ended = link(three, "--all")
    assert ended.returncode == 2, ended.stderr
    assert "error: link-down on 127.0.0.1: 10.205.0.2 of rank 1 (mini1) can't be measured" in ended.stdout
    assert "mini1 > mini2" in ended.stdout and "Traceback" not in ended.stdout + ended.stderr
    no_sshd(three, 2)
    ended = link(three)
    assert ended.returncode == 3 and "error: ssh-refused on mini2: " in ended.stdout
    alone = three.hosts[0].command([*LINK])
    ended = subprocess.run(alone, capture_output=True, text=True, timeout=60, env={**os.environ, **three.env})
    assert ended.returncode == 2 and ended.stderr.startswith("error: links are between hosts: name another")


def programs_on(host: Host) -> list[int]:
    """Those that were sent to a host: on its network, and read from ssh."""
    inode, found = os.stat(f"/run/netns/{host.namespace}").st_ino, []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            is_there = entry.name.isdigit() and (entry / "ns" / "net").stat().st_ino == inode
            if is_there and b"json.loads(sys.stdin.readline())]\0" in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return [pid for pid in found if b"\0-u\0" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def test_nothing_is_left_on_any_host_when_it_is_killed(three: Cluster) -> None:
    command = three.hosts[0].command([*LINK, "mini1", "mini2", "--seconds", "30"])
    with ranks.single(command, env=three.env) as running:
        ends_s = time.monotonic() + ranks.LIMIT_S
        while not all(map(programs_on, three.hosts)):
            assert running.process.poll() is None and time.monotonic() < ends_s, running.err
            time.sleep(0.05)
        pids = [pid for host in three.hosts for pid in programs_on(host)]
        os.kill(running.process.pid, signal.SIGKILL)
        assert not ranks.await_end(pids, GONE_S)
