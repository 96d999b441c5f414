"""Our starter over ssh: hosts joined by cables and a LAN, with other homes and noisy shells; and how its runs end."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import ranks
from tests.cabled_hosts import CAN_MAKE, SSHD, WHY_NOT, Host, cabled_hosts, cut, reached_by_ssh
from tests.ranks import Rank
from tests.spmd.test_faults import endless

TRIANGLE = [(0, 1), (1, 2), (2, 0)]
TIMEOUT_S = 6
RUN = [sys.executable, "-m", "hippo_mpi.run"]
ENDLESS = endless(TIMEOUT_S)[1:]
GONE_S = 3.0  # after the starter, or its machine

pytestmark = [
    pytest.mark.skipif(not CAN_MAKE or not SSHD, reason=f"{WHY_NOT}; and sshd (openssh-server)"),
    pytest.mark.timeout(150),
]


@contextlib.contextmanager
def cluster(folder: Path, options: list[str] | None = None, python: str | None = None) -> Iterator[Cluster]:
    """Three hosts, joined by cables in pairs and by a LAN; the first one is where runs are started."""
    with (
        cabled_hosts(3, TRIANGLE, lan=True) as hosts,
        reached_by_ssh(hosts, folder, options or []) as env,
    ):
        yield Cluster(hosts, env, folder, python)


class Cluster:
    def __init__(self, hosts: list[Host], env: dict[str, str], folder: Path, python: str | None) -> None:
        self.hosts, self.env, self.hostfile = hosts, env, folder / "hosts.json"
        entries = [{"ssh": "127.0.0.1", "ips": [hosts[0].cables[2]]}] + [
            {"ssh": host.name, "ips": [host.cables[host.number - 1]]} | ({"python": python} if python else {})
            for host in hosts[1:]
        ]
        envs = [f"HIPPO_CONTROL={hosts[0].lan}"]
        self.hostfile.write_text(json.dumps({"backend": "ring", "envs": envs, "hosts": entries}))

    @contextlib.contextmanager
    def run(self, *options: str) -> Iterator[Rank]:
        command = self.hosts[0].command([*RUN, "--hostfile", str(self.hostfile), *options])
        with ranks.single(command, stdin=subprocess.PIPE, env=self.env) as running:
            yield running

    @property
    def rank_pids(self) -> list[int]:
        """By rank."""
        found = {}
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                environment = (entry / "environ").read_bytes() if entry.name.isdigit() else b""
                place = re.search(rb"MLX_RANK=(\d)\0", environment)
                if place and self.hosts[0].lan.encode() in environment and _is_rank(entry):
                    found.setdefault(int(place[1]), int(entry.name))
        return [found[rank] for rank in sorted(found)]


def _is_rank(entry: Path) -> bool:
    words = (entry / "cmdline").read_bytes()
    return b"hippo_mpi.generate" in words or b"hippo_mpi.serve" in words


@pytest.fixture(scope="module")
def wanted() -> str:
    with ranks.single([str(ranks.BIN / "hippo_mpi.generate"), "--max-tokens", "30"]) as alone:
        assert alone.wait() == 0, alone.err
        return alone.out


def test_three_hosts_answer_as_one(tmp_path: Path, wanted: str) -> None:
    with cluster(tmp_path) as three, three.run("--max-tokens", "30") as running:
        assert running.wait() == 0, running.err
        assert running.out == wanted
        assert "error" not in running.err and "WARN" not in running.err


@pytest.mark.parametrize("shell", ["dash", "fish", "zsh"])
def test_other_homes_and_noisy_shells(shell: str, tmp_path: Path, wanted: str) -> None:
    """The account's home is elsewhere there, its shell greets on both streams, and need not be bash."""
    home = tmp_path / "anna"
    if not shutil.which(shell):
        pytest.skip(f"{shell} isn't installed")
    (home / "hippo").mkdir(parents=True)
    (home / "hippo" / "venv").symlink_to(Path(sys.executable).parents[1])
    greeting = f'ForceCommand=echo Welcome; echo "to this machine" >&2; exec {shell} -c "$SSH_ORIGINAL_COMMAND"'
    noisy = [f"SetEnv=HOME={home}", greeting]
    with cluster(tmp_path, noisy, "~/hippo/venv/bin/python") as three, three.run("--max-tokens", "30") as running:
        assert running.wait() == 0, running.err
        assert running.out == wanted


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["kill", "stop"])
def test_a_rank_that_fails_ends_all_by_name(rank: int, number: signal.Signals, tmp_path: Path) -> None:
    """Also one on another host that is stopped: nothing else would end it."""
    with cluster(tmp_path) as three, three.run(*ENDLESS) as running:
        running.await_output()
        pids = three.rank_pids
        os.kill(pids[rank], number)
        assert running.wait(4 * TIMEOUT_S) == 3
        errors = [line for line in running.err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and f"rank {rank} (" in errors[0], running.err
        assert not ranks.await_end(pids, GONE_S)


@pytest.mark.parametrize("who", ["run", "starter", "all of the machine"])
def test_nothing_outlives_the_starter(who: str, tmp_path: Path) -> None:
    with cluster(tmp_path) as three, three.run(*ENDLESS) as running:
        running.await_output()
        pids = three.rank_pids
        os.kill(pids[2], signal.SIGSTOP)  # which ends neither by itself nor with its peers
        if who == "all of the machine":
            subprocess.run(["ip", "netns", "del", f"{three.hosts[0].namespace.rpartition('-')[0]}-lan"], check=True)
        below = ranks.descendants(running.process.pid)
        starters = [
            pid for pid in below if b"hippo_mpi.cluster.starting.start\0" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        for pid in {"run": [running.process.pid], "starter": starters}.get(who, []):
            os.kill(pid, signal.SIGKILL)
        assert not ranks.await_end([pids[2]] if "machine" in who else pids, GONE_S + 0.5)


def test_a_start_that_fails_says_what_the_doctor_finds(tmp_path: Path) -> None:
    """Two hosts were cabled, and no longer are: ssh goes another way, and lets us in."""
    with cluster(tmp_path) as three:
        cut(three.hosts[1], three.hosts[2])
        with three.run("--max-tokens", "3", "--start-timeout", "5", "--timeout", "4") as running:
            assert running.wait() == 3
        told = [line for line in running.err.splitlines() if line.startswith("error: ")]
        assert "rank" in told[0] and re.match(
            r"error: (link-down|address-missing) on mini[12]: .*10\.205\.1\.", told[-1]
        )


def test_a_server_goes_on_without_a_rank_that_is_stopped(tmp_path: Path) -> None:
    """On another host, where it would stay for ever; and all hosts take part in the next start."""
    home = tmp_path / "anna"
    home.mkdir()
    (home / "venv").symlink_to(Path(sys.executable).parents[1])
    with cluster(tmp_path, [f"SetEnv=HOME={home}"], "~/venv/bin/python") as three:
        serve = [
            sys.executable,
            "-m",
            "hippo_mpi.serve",
            "--port",
            "0",
            "--hostfile",
            str(three.hostfile),
            "--timeout",
            "4",
        ]
        with ranks.single(three.hosts[0].command(serve), env=three.env) as running:
            running.await_output("INFO loaded ", "stderr")
            pids = three.rank_pids
            os.kill(pids[2], signal.SIGSTOP)
            ends_s = time.monotonic() + 60
            while running.err.count("INFO loaded ") < 2 and time.monotonic() < ends_s:
                time.sleep(0.1)
            assert running.err.count("INFO loaded ") == 2 and "rank 2 (mini2) sent no heartbeat for" in running.err
            assert not ranks.await_end(pids, GONE_S)
            again = three.rank_pids
            running.process.terminate()
            assert running.wait() == 0
            assert len(again) == 3 and not ranks.await_end(again, GONE_S)


def test_a_host_that_is_not_there_is_named_at_once(tmp_path: Path) -> None:
    with cluster(tmp_path) as three:
        daemon = [pid for pid in _sshds() if three.hosts[2].lan.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()]
        os.kill(daemon[0], signal.SIGKILL)
        with three.run("--max-tokens", "3") as running:
            assert running.wait() == 2
            assert re.fullmatch(
                r"error: hostfile \S+: `ssh NAME true` fails for mini2 \(rank 2\): .*refused\n", running.err
            )


def test_a_python_that_is_not_there_is_told(tmp_path: Path) -> None:
    with cluster(tmp_path, python="/no/such/python") as three:
        began_s = time.monotonic()
        with three.run("--max-tokens", "3") as running:
            assert running.wait() == 3
        assert "/no/such/python" in running.err and re.search(
            r"error: rank [12] \(mini[12]\) exited with status 12[67]", running.err
        )
        assert time.monotonic() - began_s < 30


def _sshds() -> list[int]:
    return [
        int(path.name)
        for path in Path("/proc").iterdir()
        if path.name.isdigit() and b"sshd" in (path / "cmdline").read_bytes()[:40]
    ]
