"""Asks hosts what they are, all at once, each by one ssh; this machine without."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from hippo_mpi.cluster.asking import probe
from hippo_mpi.cluster.asking.facts import HAS_NO_PYTHON, Probed, read_facts
from hippo_mpi.cluster.hostfile import Host, Hostfile
from hippo_mpi.cluster.programs.find_python import NO_PYTHON, script_of, through_ssh
from hippo_mpi.transport.ports import THIS_MACHINE
from hippo_mpi.transport.run_key import SSH

_MARK = "hippo-probe-begins"  # what comes before it is no answer, but what a shell prints at each login
_RUN = 'exec "$python" -'  # which reads the program from standard input
_SHARE = 0.7  # of the time for all of an answer, that one command may take


def ask(hostfile: Hostfile, ports: Sequence[int], timeout_s: float, model: str | None = None) -> list[Probed]:
    """Return what every host of a hostfile says of itself, by rank.

    Args:
        hostfile: whose neighbors in the ring are called, and from everywhere rank 0.
        ports: that should be free.
        timeout_s: for all of a host's answer.
        model: that the ranks are to run, if that is known.
    """
    with ThreadPoolExecutor(len(hostfile.hosts)) as pool:
        ranks = range(len(hostfile.hosts))
        asked = pool.map(lambda rank: _timed(lambda: _ask(hostfile, rank, ports, timeout_s, model)), ranks)
        return [replace(one, backend=hostfile.backend, envs=hostfile.envs, model=model) for one in asked]


def _timed(asking: Callable[[], Probed]) -> Probed:
    began_s = time.monotonic()
    return replace(asking(), took_s=time.monotonic() - began_s)


def _ask(hostfile: Hostfile, rank: int, ports: Sequence[int], timeout_s: float, model: str | None) -> Probed:
    host, following = hostfile.hosts[rank], hostfile.hosts[(rank + 1) % len(hostfile.hosts)]
    others = list(following.ips) if len(hostfile.hosts) > 1 else []
    is_here = host.ssh == THIS_MACHINE
    python = sys.executable if is_here or not host.python else host.python
    given = (python, list(host.ips), others, list(ports), model, hostfile.backend, _SHARE * timeout_s)
    program = f"{Path(probe.__file__).read_text()}\n\nmain(*{given!r})"
    asked_s = time.time()
    script = f"echo {_MARK}; {script_of(_RUN, python)}"
    timeout = ["-o", f"ConnectTimeout={max(1, int(timeout_s / 2))}"]
    command = ["sh", "-c", script] if is_here else [*SSH, "-T", *timeout, host.ssh, through_ssh(script)]
    try:
        ended = subprocess.run(
            command, input=program, capture_output=True, timeout=timeout_s, text=True, errors="replace"
        )
    except subprocess.TimeoutExpired:
        return Probed(host, error=f"no answer within {timeout_s:.0f} s", asked_s=asked_s)
    except OSError as error:
        return Probed(host, error=str(error), asked_s=asked_s)
    return _read(host, ended, asked_s)


def _read(host: Host, ended: subprocess.CompletedProcess[str], asked_s: float) -> Probed:
    noise, mark, answer = ended.stdout.partition(f"{_MARK}\n")
    if not mark:
        lines = [line.strip() for line in ended.stderr.splitlines() if line.strip()]
        return Probed(host, error=lines[-1] if lines else f"ssh ended with status {ended.returncode}", asked_s=asked_s)
    if answer.strip() == NO_PYTHON:
        return Probed(host, error=HAS_NO_PYTHON, noise=noise.strip(), asked_s=asked_s)
    try:
        raw: dict[str, Any] = json.loads(answer)
        return Probed(host, read_facts(raw), noise=noise.strip(), asked_s=asked_s, raw=raw)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return Probed(
            host,
            error=f"an answer that can't be read: {error!r}; {ended.stderr[-200:]}",
            noise=noise.strip(),
            asked_s=asked_s,
        )
