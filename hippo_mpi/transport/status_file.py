"""How rank 0 has ended, and why, left where its starter looks for it: mlx.launch itself always returns 0. No MLX."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from hippo_mpi.environment import STATUS_FILE


def write_status(code: int, why: str = "") -> None:
    """Leave rank 0's exit status, if its starter wants to know, and the line that says why."""
    path = os.environ.get(STATUS_FILE)
    if path:
        with contextlib.suppress(OSError):  # another machine's file, or its disk is full
            Path(path).write_text(f"{code}\n{why}")


def read_status(path: Path) -> tuple[int, str] | None:
    """Return the exit status that was left, and why; None if none was: a full disk leaves an empty file."""
    try:
        code, _, why = path.read_text().partition("\n")
        return int(code), why.strip()
    except (OSError, ValueError):
        return None
