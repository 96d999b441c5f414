"""Setup of hosts that have nothing: how long it takes, and that kills and cuts in the middle leave nothing half done.

python tests/measure/setting_up.py [--kills N] [--seed N]
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.bare_hosts import Bare, BareHost, bare_hosts

_PORT_DOWN_S = 15.0
_LIMIT_S = 900.0


def measure_setting_up(count: int, trials: int = 3) -> bool:
    """Print the seconds from `count` bare hosts to a first token with them, and of the same command again."""
    first, again, is_good = [], [], True
    for _ in range(trials):
        with tempfile.TemporaryDirectory() as folder, bare_hosts(count, Path(folder)) as bare:
            names = [host.name for host in bare.hosts]
            states = {}
            for took in (first, again):
                began_s = time.monotonic()
                ended = bare.cluster("setup", *names, "--yes", timeout_s=_LIMIT_S)
                took.append(time.monotonic() - began_s)
                is_good &= ended.returncode == 0
                states[len(took), took is first] = [host.state() for host in bare.hosts]
                if ended.returncode:
                    print(ended.stdout, ended.stderr)
            is_good &= len({str(state) for state in states.values()}) == 1
    print(
        f"  {count + 1} hosts: first token after {_seconds(first)}; again {_seconds(again)}, nothing changed: {is_good}",
        flush=True,
    )
    return is_good


def _seconds(took: Sequence[float]) -> str:
    return f"{statistics.median(took):.1f} s ({min(took):.1f} to {max(took):.1f})"


def measure_kills(count: int, seed: int) -> bool:
    """Kill setup, its agent on the host, or the link, at a random moment; then set up again, or remove, in turn."""
    draw, bad = random.Random(seed), 0
    with tempfile.TemporaryDirectory() as folder, bare_hosts(1, Path(folder)) as bare:
        (host,) = bare.hosts
        bare.ssh(host, "true")
        before, ready = host.state(), {}
        lasts_s = {}
        for verb in ("setup", "remove"):
            began_s = time.monotonic()
            bare.cluster(verb, host.name, "--yes", timeout_s=_LIMIT_S)
            lasts_s[verb] = time.monotonic() - began_s
            ready = _kept(host) if verb == "setup" else ready
        for number in range(count):
            how = draw.choice(("setup is killed", "the agent is killed", "the link is down"))
            verb = draw.choice(("setup", "setup", "remove"))
            if verb == "remove":
                bare.cluster("setup", host.name, "--yes", timeout_s=_LIMIT_S)
            after_s = draw.uniform(0.1, lasts_s[verb])
            _disturb(bare, verb, how, after_s)
            wanted, then = (ready, "setup") if draw.random() < 0.5 else (before, "remove")
            ended = bare.cluster(then, host.name, "--yes", timeout_s=_LIMIT_S)
            found = _kept(host) if then == "setup" else host.state()
            if ended.returncode or found != wanted:
                bad += 1
                print(f"  BAD {number} (seed {seed}): {verb}, {how} after {after_s:.2f} s, then {then}: {ended.stderr}")
                print(
                    f"    {[one for one in {**found, **wanted} if found.get(one) != wanted.get(one)][:5]}", flush=True
                )
            bare.cluster("remove", host.name, "--yes", timeout_s=_LIMIT_S)
            if host.state() != before:
                bad += 1
                print(f"  BAD {number} (seed {seed}): after remove, {how}", flush=True)
    print(
        f"  killed or cut at random moments, then set up or removed: {count - bad} of {count} as it should be",
        flush=True,
    )
    return not bad


def _kept(host: BareHost) -> dict[str, str]:
    """What is there, but the record's notes and what Python has compiled."""
    return {
        path: what for path, what in host.state().items() if "changes.json" not in path and "__pycache__" not in path
    }


def _disturb(bare: Bare, verb: str, how: str, after_s: float) -> None:
    (host,) = bare.hosts
    running = subprocess.Popen(
        bare.command(verb, host.name, "--yes"), cwd=bare.folder, env={**os.environ, **bare.env}, stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        time.sleep(after_s)
        if how == "setup is killed":
            os.killpg(running.pid, signal.SIGKILL)
        elif how == "the agent is killed":
            for pid in _pythons(host):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        else:
            _set_link(host, "down")
            time.sleep(_PORT_DOWN_S)
            _set_link(host, "up")
        running.wait(_LIMIT_S)
    finally:
        if running.poll() is None:
            os.killpg(running.pid, signal.SIGKILL)
            running.wait()


def _pythons(host: BareHost) -> list[int]:
    """The processes of Python in the host's own process namespace, by the numbers that they have here."""
    own, found = os.readlink(f"/proc/{host.pid}/ns/pid"), []
    for path in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if path.name.isdigit() and os.readlink(path / "ns" / "pid") == own:
                found += [int(path.name)] * (path / "comm").read_text().startswith("python")
    return found


def _set_link(host: BareHost, state: str) -> None:
    port = f"en{os.getpid() % 100_000}{host.host.number}"
    subprocess.run(["ip", "-n", host.host.namespace, "link", "set", port, state], check=True)


def main() -> None:
    """Print everything; the exit status is 1 if something isn't as it should be."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--trials", type=int, default=3)
    options = parser.parse_args()
    is_good = True
    if options.trials:
        is_good = measure_setting_up(1, options.trials) & measure_setting_up(2, options.trials)
    if options.kills:
        is_good &= measure_kills(options.kills, options.seed)
    sys.exit(not is_good)


if __name__ == "__main__":
    main()
