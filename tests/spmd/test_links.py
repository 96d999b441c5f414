"""Ranks that never meet, and a link that is cut: on two hosts made of network namespaces."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import ranks

TIMEOUT_S = 4
GENERATE = [str(ranks.BIN / "hippo_mpi.generate"), "--max-tokens", "1900", "--temp", "8", "--timeout", str(TIMEOUT_S)]
WAITS = ["--start-timeout", str(TIMEOUT_S)]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_whose_peer_never_starts(rank: int, tmp_path: Path) -> None:
    hostfile = tmp_path / "hosts.json"
    hostfile.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ranks.free_ports(2)]))
    env = {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hostfile)}
    began = time.monotonic()
    with ranks.single([*GENERATE, *WAITS], env=env) as running:
        assert running.wait(TIMEOUT_S + 20) != 0
    assert time.monotonic() - began < TIMEOUT_S + 16
    lines = [line for line in running.err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert f"rank {rank} (" in lines[0] and "waited 4 s for the other ranks" in lines[0]


def test_a_rank_that_starts_late_is_waited_for(tmp_path: Path) -> None:
    """However little time ranks have once they run."""
    hostfile = tmp_path / "hosts.json"
    hostfile.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ranks.free_ports(2)]))
    envs = [{"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hostfile)} for rank in range(2)]
    with ranks.single(GENERATE, env=envs[0]) as first:
        time.sleep(2 * TIMEOUT_S + 2)
        with ranks.single(GENERATE, env=envs[1]):
            first.await_output()


def test_a_ring_of_three_whose_last_rank_never_starts(tmp_path: Path) -> None:
    """Some ranks have joined by then, and wait for addresses: that wait has a deadline, too."""
    hostfile = tmp_path / "hosts.json"
    hostfile.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ranks.free_ports(4)]))
    with contextlib.ExitStack() as stack:
        running = [
            stack.enter_context(
                ranks.single([*GENERATE, *WAITS], env={"MLX_RANK": str(i), "MLX_HOSTFILE": str(hostfile)})
            )
            for i in (0, 1, 3)
        ]
        began = time.monotonic()
        assert all(rank.wait(2 * TIMEOUT_S + 20) != 0 for rank in running)
        assert time.monotonic() - began < 2 * TIMEOUT_S + 16


def test_ranks_that_have_different_keys(tmp_path: Path) -> None:
    """A stranger on MLX's own ports is found out before anything is loaded, and never learns the key."""
    hostfile = tmp_path / "hosts.json"
    hostfile.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ranks.free_ports(2)]))
    with contextlib.ExitStack() as stack:
        running = [
            stack.enter_context(
                ranks.single(GENERATE, env={"MLX_RANK": str(i), "MLX_HOSTFILE": str(hostfile), "HIPPO_RUN_KEY": key})
            )
            for i, key in enumerate(("the key", ""))
        ]
        assert [rank.wait(TIMEOUT_S + 10) for rank in running] == [3, 3]
    assert "rank 1 (" in running[0].err and "doesn't have this run's key" in running[0].err
    assert "has no key (HIPPO_RUN_KEY)" in running[1].err
    assert "the key" not in running[1].err


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@contextlib.contextmanager
def two_hosts() -> Iterator[list[str]]:
    """Two namespaces joined by a cable: 10.77.0.1 and 10.77.0.2. Yields their names."""
    names = [f"hippo{os.getpid()}a", f"hippo{os.getpid()}b"]
    try:
        for name in names:
            _ip("netns", "add", name)
        _ip("link", "add", "cable0", "netns", names[0], "type", "veth", "peer", "name", "cable1", "netns", names[1])
        for index, name in enumerate(names):
            _ip("-n", name, "addr", "add", f"10.77.0.{index + 1}/24", "dev", f"cable{index}")
            _ip("-n", name, "link", "set", f"cable{index}", "up")
            _ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip("netns", "del", name)


def _can_make_hosts() -> bool:
    if os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("nsenter"):
        return False
    with contextlib.suppress(subprocess.CalledProcessError), two_hosts():
        return True
    return False


@pytest.mark.skipif(not _can_make_hosts(), reason="needs root, ip and nsenter, to make two hosts with a cable")
@pytest.mark.parametrize("parallel", ["pipeline", "tensor"])  # between stages, and inside a sum
def test_a_cut_link_ends_both_ranks(parallel: str, tmp_path: Path) -> None:
    hostfile = tmp_path / "hosts.json"
    hostfile.write_text(json.dumps([[f"10.77.0.{i + 1}:32323"] for i in range(2)]))
    with two_hosts() as names, contextlib.ExitStack() as stack:
        running = []
        for index, name in enumerate(names):
            env = {"MLX_RANK": str(index), "MLX_HOSTFILE": str(hostfile)}
            inside = ["nsenter", f"--net=/run/netns/{name}", *GENERATE, "--parallel", parallel]
            running.append(stack.enter_context(ranks.single(inside, env=env)))
        running[0].await_output()
        _ip("-n", names[0], "link", "set", "cable0", "down")
        began = time.monotonic()
        codes = [rank.wait(TIMEOUT_S + 10) for rank in running]
        assert time.monotonic() - began < TIMEOUT_S + 6
        assert codes == [3, 3]
        # Nobody can tell the other: each side says what it sees.
        for index, rank in enumerate(running):
            assert f"rank {1 - index} (" in rank.err and "sent no heartbeat for" in rank.err
