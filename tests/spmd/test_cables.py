"""Ranks whose hosts are joined by cables in pairs, as Macs are over Thunderbolt: not every rank shares a cable with rank 0."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest

from tests import ranks
from tests.cabled_hosts import CAN_MAKE, WHY_NOT, cabled_hosts, cabled_ring, cut
from tests.spmd.test_faults import endless

TIMEOUT_S = 4
GENERATE = [str(ranks.BIN / "hippo_mpi.generate"), "--max-tokens", "12", "--start-timeout", "20"]
TRIANGLE = [(0, 1), (1, 2), (2, 0)]
SQUARE = [(0, 1), (1, 2), (2, 3), (3, 0)]

pytestmark = pytest.mark.skipif(not CAN_MAKE, reason=WHY_NOT)


@pytest.fixture(scope="module")
def wanted() -> str:
    with ranks.single(GENERATE) as alone:
        assert alone.wait() == 0, alone.err
        return alone.out


@pytest.mark.parametrize(
    ("count", "cables", "lan", "routed", "given"),
    [
        (3, TRIANGLE, False, False, ""),
        (3, TRIANGLE, True, True, ""),
        (4, SQUARE, True, True, ""),
        (4, SQUARE, True, False, "192.168.77.1"),
    ],
    ids=["cables-only", "beside-a-lan", "rank-2-by-lan", "rank-2-by-HIPPO_CONTROL"],
)
def test_all_ranks_find_rank_0(
    count: int, cables: list[tuple[int, int]], lan: bool, routed: bool, given: str, wanted: str, tmp_path: Path
) -> None:
    env = {"HIPPO_CONTROL": given} if given else {}
    with cabled_hosts(count, cables, lan, routed) as hosts, cabled_ring(hosts, GENERATE, tmp_path, env) as running:
        assert [rank.wait() for rank in running] == [0] * count, [rank.err for rank in running]
        assert running[0].out == wanted


def test_a_rank_that_reaches_rank_0_by_no_way_is_named(tmp_path: Path) -> None:
    command = [*GENERATE, "--start-timeout", "10"]
    with cabled_hosts(4, SQUARE) as hosts, cabled_ring(hosts, command, tmp_path) as running:
        assert [rank.wait() for rank in running] == [3] * 4
        assert re.search(r"no control connection to rank 0 \(mini0\) at 10\.205\.\S+, 10\.205\.", running[2].err)


def test_an_address_of_another_host_is_refused(tmp_path: Path) -> None:
    with (
        cabled_hosts(3, TRIANGLE) as hosts,
        cabled_ring(hosts, GENERATE, tmp_path, {"HIPPO_CONTROL": "192.168.99.9"}) as running,
    ):
        assert running[0].wait() == 2
        assert "rank 0 (mini0) can't listen on 192.168.99.9: " in running[0].err


@pytest.mark.parametrize("fault", ["kill", "stop", "cut"])
@pytest.mark.parametrize("rank", [1, 2])
def test_a_fault_is_named_within_the_deadline(fault: str, rank: int, tmp_path: Path) -> None:
    with cabled_hosts(3, TRIANGLE) as hosts, cabled_ring(hosts, endless(TIMEOUT_S), tmp_path) as running:
        running[0].await_output()
        began_s = time.monotonic()
        if fault == "cut":
            cut(hosts[rank], hosts[(rank + 1) % 3])
        else:
            os.kill(running[rank].process.pid, signal.SIGKILL if fault == "kill" else signal.SIGSTOP)
        assert running[0].wait(3 * TIMEOUT_S) == 3
        assert time.monotonic() - began_s < 3 * TIMEOUT_S
        assert re.search(rf"rank {rank} \(mini{rank}\) " if fault != "cut" else "rank [12]", running[0].err), running[
            0
        ].err
        others = [one.process.pid for number, one in enumerate(running) if fault == "cut" or number != rank]
        assert not ranks.await_end(others, 2 * TIMEOUT_S)
