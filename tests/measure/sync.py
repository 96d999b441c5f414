"""hippo_mpi.cluster sync over a cable of 1 Gbit/s: its rate against the cable's, and what kills cost."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from hippo_mpi.cluster.sync.frames import PIECE_BYTES
from hippo_mpi.views.spans import num_bytes, spans_here
from tests import ranks
from tests.spmd.test_sync import Bed, bed, folder_of_bytes

_RATE = "1gbit"
_MAX_AGAIN = 4  # pieces, after a kill
_LATE = 0.8  # of the kills come while pieces do
_RAW = """
import socket, sys, time
if sys.argv[1] == "take":
    with socket.create_server((sys.argv[2], 17900)) as server:
        print("on", flush=True)
        connection, total = server.accept()[0], 0
        began = time.monotonic()
        while got := connection.recv(1 << 20):
            total += len(got)
        print(total / (time.monotonic() - began), flush=True)
else:
    with socket.create_connection((sys.argv[2], 17900)) as connection:
        for _ in range(int(sys.argv[3])):
            connection.sendall(bytes(1 << 20))
"""


def measure_rate(megabytes: int, count: int, rate: str = _RATE) -> None:
    """Print what sync gives over a shaped cable, beside one plain TCP connection, in turn, and what the CPUs do."""
    shares = []
    for _ in range(count):
        with tempfile.TemporaryDirectory() as name, bed(Path(name)) as two:
            size = folder_of_bytes(two.folder / "origin" / "model", megabytes << 20)
            with _shaped(two, rate):
                raw = _raw_rate(two, megabytes)
                here_s, there_s = _cpu_here_s(), _cpu_there_s(two)
                code, said, err = two.sync(str(two.folder / "origin" / "model"), "--whole")
                here_s, there_s = _cpu_here_s() - here_s, _cpu_there_s(two) - there_s
            assert code == 0, err
            own = next(host["came"] for host in said["hosts"] if host["host"] == "mini1") / said["seconds"]
            shares.append(own / raw)
            print(
                f"  {size / 1e6:,.0f} MB: TCP {raw / 1e6:.1f} MB/s, sync {own / 1e6:.1f} MB/s: {own / raw:.1%};"
                f" CPU per GB: {here_s / size * 1e9:.2f} s here, {there_s / size * 1e9:.2f} s there",
                flush=True,
            )
    print(f"  median {sorted(shares)[len(shares) // 2]:.1%}")


@contextlib.contextmanager
def _shaped(two: Bed, rate: str) -> Iterator[None]:
    """Both ends of the LAN send no faster than that."""
    if rate:
        for host in two.hosts:
            device = f"en{os.getpid() % 100_000}{host.number}"
            shape = [
                "tc",
                "qdisc",
                "add",
                "dev",
                device,
                "root",
                "tbf",
                "rate",
                rate,
                "burst",
                "128kb",
                "latency",
                "50ms",
            ]
            subprocess.run(["nsenter", f"--net=/run/netns/{host.namespace}", *shape], check=True)
    yield


def _raw_rate(two: Bed, megabytes: int) -> float:
    python = [sys.executable, "-c", _RAW]
    with ranks.single(two.hosts[1].command([*python, "take", two.hosts[1].lan])) as taking:
        taking.await_output("on")
        subprocess.run(two.hosts[0].command([*python, "give", two.hosts[1].lan, str(megabytes)]), check=True)
        assert taking.wait() == 0
        return float(taking.out.split()[1])


def _cpu_here_s() -> float:
    """CPU seconds of all that this process has waited for: a sync, and its ssh."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _cpu_there_s(two: Bed) -> float:
    """CPU seconds of what the other host's sshd has started, and waited for."""
    listens = f"ListenAddress={two.hosts[1].lan}".encode()
    ticks = 0
    for pid in ranks.descendants(os.getpid()):
        with contextlib.suppress(OSError):
            if listens in Path(f"/proc/{pid}/cmdline").read_bytes():
                ticks += sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def measure_kills(megabytes: int, count: int, seed: int, rate: str) -> bool:
    """Print how many pieces are sent again after each of `count` kills at random moments; return whether all is well."""
    draw, worst, done = random.Random(seed), 0.0, 0
    with tempfile.TemporaryDirectory() as name, bed(Path(name)) as two, _shaped(two, rate):
        origin = two.folder / "origin" / "model"
        size = folder_of_bytes(origin, megabytes << 20)
        device = f"en{os.getpid() % 100_000}0"
        while done < count:
            before, sent_before = _held(two), _sent(two, device)
            command = [
                sys.executable,
                "-m",
                "hippo_mpi.cluster",
                "sync",
                str(origin),
                "--hostfile",
                str(two.hostfile),
                "--whole",
            ]
            with ranks.single(two.command(command), env=two.env) as running:
                began_s, more_s = time.monotonic(), draw.uniform(0, 1.5)
                if draw.random() < _LATE:
                    while _held(two) == before and running.process.poll() is None:
                        time.sleep(0.02)
                time.sleep(more_s)
                if running.process.poll() is not None:
                    print("  all is there: a bigger model is needed")
                    break
                took_s, where = time.monotonic() - began_s, draw.choice(["sync", "its ssh", "the places"])
                pid = running.process.pid
                for victim in {"sync": [pid], "its ssh": ranks.descendants(pid)}.get(where, _places(two)) or [pid]:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(victim, signal.SIGKILL)
                running.process.wait(60)
            time.sleep(0.5)
            kept, sent = _held(two) - before, _sent(two, device) - sent_before
            again = max(0.0, (sent / 1.012 - kept) / PIECE_BYTES)  # ssh, TCP and IP take a hundredth
            worst, done = max(worst, again), done + 1
            print(
                f"  killed {where} after {took_s:.1f} s: {kept / 1e6:,.0f} MB kept, {again:.1f} pieces lost",
                flush=True,
            )
        code, said, err = two.sync(str(origin), "--whole", "--verify")
        good = (
            code == 0
            and (two.view(1) / "model.safetensors").read_bytes() == (origin / "model.safetensors").read_bytes()
        )
        left = [path.name for path in (two.home(1) / "hippo_mpi").iterdir()]
        print(
            f"  after {done} kills: {'the same bytes' if good else err}, at most {worst:.1f} pieces again; {left}; {size:,}"
        )
        print(f"  {json.dumps(said['hosts'])}")
    return good and worst <= _MAX_AGAIN and len(left) == 1


def _held(two: Bed) -> int:
    views = [path for path in (two.home(1) / "hippo_mpi").glob("local--*")]
    return sum(num_bytes(spans_here(view / "model.safetensors")) for view in views)


def _sent(two: Bed, device: str) -> int:
    found = subprocess.run(
        ["ip", "-n", two.hosts[0].namespace, "-s", "-j", "link", "show", device], capture_output=True, check=True
    )
    return int(json.loads(found.stdout)[0]["stats64"]["tx"]["bytes"])


def _places(two: Bed) -> list[int]:
    own, found = str(two.home(1)).encode(), []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes() if entry.name.isdigit() else b""
            if b"hippo_mpi.cluster.sync.place" in words and own in (entry / "environ").read_bytes():
                found.append(int(entry.name))
    return found


def main() -> None:
    """Measure one of them, or both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("rate", "kills"), nargs="+")
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--count", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--link", default=_RATE, help="as tc has it; empty: as fast as it goes")
    options = parser.parse_args()
    is_good = True
    if "rate" in options.what:
        measure_rate(options.megabytes, options.count, options.link)
    if "kills" in options.what:
        is_good = measure_kills(options.megabytes, options.count, options.seed, options.link)
    sys.exit(not is_good)


if __name__ == "__main__":
    main()
