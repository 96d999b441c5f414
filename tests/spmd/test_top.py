"""hippo_mpi.cluster top, over ssh between namespaces: what it shows, that it sees hosts fall silent, and how it is left."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from fcntl import ioctl
from typing import Any

import pytest

from tests import ranks
from tests.cabled_hosts import CAN_MAKE, SSHD, WHY_NOT
from tests.ranks import Rank
from tests.spmd.test_cluster_links import GONE_S, programs_on
from tests.spmd.test_doctor import device, ip
from tests.spmd.test_starter import Cluster, cluster
from tests.terminals import CTRL_C, Terminal, terminal

TOP = [sys.executable, "-m", "hippo_mpi.cluster", "top"]

pytestmark = [
    pytest.mark.skipif(not CAN_MAKE or not SSHD, reason=f"{WHY_NOT}; and sshd (openssh-server)"),
    pytest.mark.timeout(120),
]


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("three")) as found:
        yield found


def command(three: Cluster, *options: str) -> list[str]:
    return three.hosts[0].command([*TOP, "--hostfile", str(three.hostfile), *options])


def last_line(running: Rank) -> dict[str, Any]:
    lines = running.out.splitlines(keepends=True)
    found: dict[str, Any] = json.loads(next((line for line in reversed(lines) if line.endswith("\n")), '{"hosts": []}'))
    return found


def await_troubles(running: Rank, troubles: list[str]) -> dict[str, Any]:
    """Wait for a line in which the hosts have these troubles, by the first of their words."""
    ends_s = time.monotonic() + ranks.LIMIT_S
    while True:
        found = last_line(running)
        if [host["trouble"].partition(" ")[0] for host in found["hosts"]] == troubles:
            return found
        assert running.process.poll() is None and time.monotonic() < ends_s, (found, running.err)
        time.sleep(0.05)


def test_once(three: Cluster) -> None:
    env = {**os.environ, **three.env}
    ended = subprocess.run(command(three, "--once"), capture_output=True, text=True, timeout=60, env=env)
    assert ended.returncode == 0 and not ended.stderr, ended
    assert ended.stdout.count("tb") == 6  # each has two cables
    assert all(f"\n{host}" in ended.stdout for host in ("mini0", "mini1", "mini2"))
    options = ["--once", "--json", "--timeout", "5", "--server", "http://127.0.0.1:1"]
    named = three.hosts[0].command([*TOP, "mini1", "nosuch.invalid", *options])
    ended = subprocess.run(named, capture_output=True, text=True, timeout=60, env=env)
    said = json.loads(ended.stdout)
    assert ended.returncode == 3 and [host["trouble"] for host in said["hosts"]] == ["", "", "no answer"]
    assert "resolve" in said["hosts"][2]["why"] and "doesn't answer" in said["server"]["state"]
    assert said["hosts"][1]["total_bytes"] > said["hosts"][1]["free_bytes"] > 0
    ended = subprocess.run(command(three), capture_output=True, text=True, timeout=60, env=env)
    assert ended.returncode == 2 and ended.stderr.startswith("error: top needs a terminal; --once")


def test_a_host_that_falls_silent_is_seen_and_comes_back(three: Cluster) -> None:
    """Its LAN goes; ours stays."""
    host = three.hosts[2]
    with ranks.single(command(three, "--json"), env=three.env) as running:
        await_troubles(running, ["", "", ""])
        lan = device(host, host.lan)
        ip(host, "link", "set", lan, "down")
        found = await_troubles(running, ["", "", "silent"])
        assert found["hosts"][2]["silent_s"] >= 1.5
        ip(host, "link", "set", lan, "up")
        await_troubles(running, ["", "", ""])
        pids = [pid for one in three.hosts for pid in programs_on(one)]
        assert len(pids) >= 3
        running.process.send_signal(signal.SIGINT)
        assert running.wait() == 0 and not running.err
        assert not ranks.await_end(pids, GONE_S)


def resize(view: Terminal) -> None:
    ioctl(view.descriptor, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))


@pytest.mark.parametrize("key", ["q", CTRL_C])
def test_it_fits_a_terminal_and_leaves_it_as_it_was(key: str, three: Cluster) -> None:
    with terminal(command(three), three.env | {"TERM": "xterm"}) as view:
        resize(view)
        view.await_match(r"mini0 .*tb.*mini1 .*tb.*mini2 .*tb")
        assert "\x1b[?1049h" in view.screen and not view.is_as_it_was
        pids = [pid for host in three.hosts for pid in programs_on(host)]
        since = len(view.screen)
        view.await_text("q leaves", since)
        shown = view.screen[since:].rpartition("\x1b[H")[0].rpartition("\x1b[H")[2]
        assert shown.count("\n") < 24
        view.press("x")
        view.press(key)
        assert view.wait() == 0 and view.is_as_it_was
        assert "\x1b[?1049l" in view.screen and "\x1b[?25h" in view.screen and "Traceback" not in view.screen
        assert pids and not ranks.await_end(pids, GONE_S)
