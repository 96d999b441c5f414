"""Our starter over three hosts of this machine: what it costs, and how long ranks outlive it, or its machine."""

from __future__ import annotations

import os
import random
import signal
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from tests import ranks
from tests.spmd.test_starter import ENDLESS, GONE_S, Cluster, cluster

_IDLE_S = 10.0
_ENDS = ("the starter is killed", "its machine is gone")
_FAULTS = {"a rank is killed": signal.SIGKILL, "a rank is stopped": signal.SIGSTOP}


def measure_starter(count: int, seed: int = 1) -> bool:
    """Print what `count` of each fault lead to; return whether no rank was left after 3 s, and every end had its line."""
    draw, is_good = random.Random(seed), True
    with tempfile.TemporaryDirectory() as folder, cluster(Path(folder)) as three, three.run(*ENDLESS) as running:
        running.await_output()
        pids = _launchers(running.process.pid)
        before = sum(map(ranks.cpu_seconds, pids))
        time.sleep(_IDLE_S)
        share = (sum(map(ranks.cpu_seconds, pids)) - before) / _IDLE_S
        print(
            f"  CPU of the starter, its keeper here and its ssh, while ranks work: {share:.2%} of a core",
            flush=True,
        )
    for what in (*_ENDS, *_FAULTS):
        took = []
        for _ in range(count):
            with tempfile.TemporaryDirectory() as folder, cluster(Path(folder)) as three:
                took.append(_end(three, what, draw))
        left = sum(one > GONE_S for one in took) if what in _ENDS else sum(one == float("inf") for one in took)
        is_good &= not left
        print(
            f"  {what}: {count - left} of {count} good; no rank after {statistics.median(took):.1f} s, at most {max(took):.1f} s"
        )
    return is_good


def _launchers(run: int) -> list[int]:
    """The processes below ./launch/run that aren't ranks."""
    return [pid for pid in ranks.descendants(run) if b"MLX_RANK=" not in Path(f"/proc/{pid}/environ").read_bytes()]


def _end(three: Cluster, what: str, draw: random.Random) -> float:
    """Seconds until none of the ranks is left that must end; infinite: it had no line, or another status than 3."""
    with three.run(*ENDLESS) as running:
        running.await_output()
        pids, rank = three.rank_pids, draw.randrange(3)
        time.sleep(draw.uniform(0, 1))
        began_s = time.monotonic()
        if what in _FAULTS:
            os.kill(pids[rank], _FAULTS[what])
            named = running.wait() == 3 and f"rank {rank} (" in running.err
            return time.monotonic() - began_s if named and not ranks.await_end(pids) else float("inf")
        os.kill(pids[1 + draw.randrange(2)], signal.SIGSTOP)
        if what == _ENDS[0]:
            names = [(pid, Path(f"/proc/{pid}/cmdline").read_bytes()) for pid in _launchers(running.process.pid)]
            os.kill(next(pid for pid, name in names if b"hippo_mpi.cluster.starting.start\0" in name), signal.SIGKILL)
        else:
            subprocess.run(["ip", "netns", "del", f"{three.hosts[0].namespace.rpartition('-')[0]}-lan"], check=True)
            pids = pids[1:]
        while ranks.await_end(pids, 0.0) and time.monotonic() < began_s + 10 * GONE_S:
            time.sleep(0.02)
        return time.monotonic() - began_s
