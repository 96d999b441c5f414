"""What hippo_mpi.cluster link says of links that are known: rates, latencies, and wrong routes. See --help.

.venv/bin/python tests/measure/links.py
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from tests.cabled_hosts import cabled_hosts, rated, reached_by_ssh
from tests.measure.delayed_cable import delayed_cable
from tests.spmd.test_cluster_links import LINK
from tests.spmd.test_doctor import by_the_lan
from tests.spmd.test_starter import Cluster, cluster

_RATES = {"100mbit": 0.1e9, "1gbit": 1e9, "2500mbit": 2.5e9}
_SMALL_FRAME_BYTES = 64 + 66  # headers of Ethernet, IP, and TCP with a time stamp
_PARTS = ("rates", "latencies", "routes")
_LATENCIES_S = (0.25e-3, 1e-3, 5e-3)


def _link(command: list[str], env: dict[str, str]) -> dict[str, Any]:
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, **env})
    assert ended.returncode in (0, 2), ended.stderr
    said: dict[str, Any] = json.loads(ended.stdout)
    return said


def _ask(three: Cluster, *options: str) -> dict[str, Any]:
    return _link(three.hosts[0].command([*LINK, "--hostfile", str(three.hostfile), "--json", *options]), three.env)


def measure_rates(count: int) -> None:
    """Each rate on both ends of each cable; TBF counts frames, of which TCP's data are 95 %."""
    for name, bits_per_s in _RATES.items():
        off = []
        for _ in range(count):
            with tempfile.TemporaryDirectory() as folder, cluster(Path(folder)) as three:
                for host in three.hosts:
                    for address in host.cables.values():
                        rated(host, address, name)
                for link in _ask(three)["links"]:
                    ways = (link["there"], link["back"])
                    off += [way[figure] * 8 / bits_per_s - 1 for way in ways for figure in ("one", "several")]
        print(f"  {name}: {len(off)} rates, {min(off):+.1%} to {max(off):+.1%} off", flush=True)


def measure_latencies(count: int) -> None:
    """Round trips over a cable that takes a known time: what it has noted itself, since this machine may be busy.

    A median has the time in it that two programs take to wake up; the fastest round trip, next to none of it.
    """
    for latency_s in _LATENCIES_S:
        medians, least = [], []
        for _ in range(count):
            with (
                tempfile.TemporaryDirectory() as folder,
                cabled_hosts(2, [(0, 1)], lan=True) as hosts,
                reached_by_ssh(hosts, Path(folder)) as env,
                delayed_cable(hosts[0], hosts[1], latency_s, _SMALL_FRAME_BYTES) as cable,
            ):
                entries = [
                    {"ssh": name, "ips": [ip]} for name, ip in zip(("127.0.0.1", "mini1"), cable.addresses, strict=True)
                ]
                hostfile = Path(folder) / "hosts.json"
                hostfile.write_text(json.dumps(entries))
                said = _link(hosts[0].command([*LINK, "--hostfile", str(hostfile), "--json", "--seconds", "0.3"]), env)
                small = [link["round_trips"]["64"] for link in said["links"]]
                medians += [one["median_s"] - 2 * cable.median_s for one in small]
                least += [one["least_s"] - 2 * cable.least_s for one in small]
        for name, off in (("medians", medians), ("fastest", least)):
            print(
                f"  {2e3 * latency_s:g} ms there and back: {len(off)} {name}, {1e3 * min(off):+.3f} to"
                f" {1e3 * max(off):+.3f} ms off, {1e3 * statistics.median(off):+.3f} typically",
                flush=True,
            )


def measure_routes(count: int, seed: int) -> None:
    """A host, drawn at random, whose packets leave by the LAN."""
    draw, named = random.Random(seed), 0
    for _ in range(count):
        with tempfile.TemporaryDirectory() as folder, cluster(Path(folder)) as three:
            number = draw.randrange(3)
            by_the_lan(three, number)
            said = _ask(three, "--seconds", "0.2")
            host = ["127.0.0.1", "mini1", "mini2"][number]
            wrong = [one for one in said["findings"] if one["check"] == "wrong-interface"]
            named += [one["host"] for one in wrong] == [host] and "left by en" in wrong[0]["found"]
    print(f"  packets by the LAN instead of the cable: {named} of {count} named, on the right host alone", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=3, help="of clusters per rate and latency (default: 3)")
    parser.add_argument("--parts", nargs="+", choices=_PARTS, default=_PARTS, help="what is measured (default: all)")
    parser.add_argument("--routes", type=int, default=20, help="wrong routes (default: 20)")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    if "rates" in given.parts:
        measure_rates(given.count)
    if "latencies" in given.parts:
        measure_latencies(given.count)
    if "routes" in given.parts:
        measure_routes(given.routes, given.seed)


if __name__ == "__main__":
    main()
