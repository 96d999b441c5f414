"""What hippo_mpi.cluster top costs on each host and here, and how soon it sees that a host is gone. See --help.

.venv/bin/python tests/measure/top.py
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import tempfile
import time
from pathlib import Path

from tests import ranks
from tests.spmd.test_cluster_links import programs_on
from tests.spmd.test_doctor import device, ip
from tests.spmd.test_starter import cluster
from tests.spmd.test_top import await_troubles, command, last_line
from tests.terminals import terminal


def measure_cost(seconds: float) -> None:
    """Of a view in a terminal."""
    with tempfile.TemporaryDirectory() as folder, cluster(Path(folder)) as three:
        with terminal(command(three), three.env | {"TERM": "xterm"}) as view:
            view.await_match(r"mini0 .*tb.*mini1 .*tb.*mini2 .*tb")
            time.sleep(2 * seconds / 10)
            pids = [pid for host in three.hosts for pid in programs_on(host)] + [view.pid]
            before = list(map(ranks.cpu_seconds, pids))
            time.sleep(seconds)
            *there, here = ((ranks.cpu_seconds(pid) - was) / seconds for pid, was in zip(pids, before, strict=True))
        print(
            f"  a core's share: {', '.join(f'{one:.2%}' for one in there)} on the hosts; {here:.2%} for the view",
            flush=True,
        )


def measure_silence(count: int, seed: int) -> None:
    """From the moment at which a host's LAN goes, or its program stops, to that at which a line says so."""
    draw, took = random.Random(seed), []
    for number in range(count):
        with (
            tempfile.TemporaryDirectory() as folder,
            cluster(Path(folder)) as three,
            ranks.single(command(three, "--json"), env=three.env) as running,
        ):
            await_troubles(running, ["", "", ""])
            time.sleep(draw.uniform(0, 1))
            host = three.hosts[2]
            stopped = programs_on(host) if number % 2 else []
            for pid in stopped:
                os.kill(pid, signal.SIGSTOP)
            if not stopped:
                ip(host, "link", "set", device(host, host.lan), "down")
            began_s = time.monotonic()
            while not last_line(running)["hosts"][2]["trouble"]:
                time.sleep(0.01)
            took.append(time.monotonic() - began_s)
            for pid in stopped:
                os.kill(pid, signal.SIGKILL)
    print(f"  a host that is gone: seen after {min(took):.1f} to {max(took):.1f} s, {count} of {count}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=30, help="for the cost (default: 30)")
    parser.add_argument("--count", type=int, default=20, help="of hosts that go (default: 20)")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    measure_cost(given.seconds)
    measure_silence(given.count, given.seed)


if __name__ == "__main__":
    main()
