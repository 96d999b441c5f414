"""./launch/serve around a server that never gets ready: what it tells, and the status that it ends with."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_start_that_takes_long(tmp_path: Path) -> None:
    """What is told meanwhile is true also of a server that is about to end."""
    own, root = Path(__file__).parents[2], tmp_path / "hippo-mpi"
    (root / ".venv" / "bin").mkdir(parents=True)
    (root / "launch").symlink_to(own / "launch")
    (root / "pyproject.toml").symlink_to(own / "pyproject.toml")
    for name in ("python", "python3"):
        (root / ".venv" / "bin" / name).symlink_to(sys.executable)
    size = subprocess.run(["cksum"], stdin=(root / "pyproject.toml").open(), capture_output=True, text=True).stdout
    (root / ".venv" / ".hippo-installed").write_text(f"{size.strip()} {root} dev\n")
    server = root / ".venv" / "bin" / "hippo_mpi.serve"
    server.write_text("#!/bin/sh\necho error: the ranks did not start\nsleep 15\nexit 2\n")
    server.chmod(0o755)
    found = subprocess.run([root / "launch" / "serve", "start"], capture_output=True, text=True, timeout=60)
    assert found.returncode == 2 and found.stdout == ""
    assert found.stderr.splitlines() == [
        "not ready after 10 s; its log ends with: error: the ranks did not start",
        "error: the ranks did not start",
    ]
