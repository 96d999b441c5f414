"""Asks hippo_mpi.plan whether a model fits into the memory that hosts have free: layers, caches, and what each rank needs.

That takes MLX and the model's own code, so it is a process of its own, on this machine. Nothing is downloaded for it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace

from hippo_mpi.cluster.asking.facts import Facts, Probed
from hippo_mpi.errors import PlanError

_TIMEOUT_S = 60.0
_SHORT = re.compile(r"^error: (the model doesn't fit: .+?)(?:; .*\(now ([\d,]+) tokens\).*)?$", re.MULTILINE)
_GPU_SHARE = 0.75  # of a Mac's memory, that its GPU may hold at most


def with_plan(hosts: Sequence[Probed], model: str) -> list[Probed]:
    """Return hosts with what the planner says of a model; unchanged if that isn't known of all, or it says nothing.

    Args:
        hosts: by rank, as asked.
        model: as typed.
    """
    rooms = [_room_bytes(host.facts) if host.facts else None for host in hosts]
    command = [sys.executable, "-m", "hippo_mpi.plan", "--model", model, "--json"]
    for rank, room in enumerate(rooms):
        if not room:
            return list(hosts)
        command += ["--machine", f"rank{rank}:{room / 2**30:.6f}"]
    try:
        ended = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT_S,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return list(hosts)
    short = _SHORT.search(ended.stderr) if ended.returncode == PlanError.exit_code else None
    if ended.returncode and not short:
        return list(hosts)
    shortage = f"{short[1]}{f' for {short[2]} tokens of context' if short[2] else ''}" if short else ""
    return [replace(host, shortage=shortage) for host in hosts]


def _room_bytes(facts: Facts) -> int | None:
    """Return the bytes that a rank finds free."""
    if facts.memory is None:
        return None
    total, free = facts.memory
    if facts.mac is None:
        return free
    limit = facts.mac.settings.get("iogpu.wired_limit_mb", "")
    most = int(limit) << 20 if limit.isdigit() and int(limit) else int(_GPU_SHARE * total)
    return min(free, most)
