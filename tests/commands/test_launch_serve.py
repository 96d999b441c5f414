"""./launch/serve around a stand-in for the server, which gets ready and ends when the test wants it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

OWN = Path(__file__).parents[2]


def folder_with(folder: Path, server: str) -> Path:
    """Make a folder of the project in which hippo_mpi.serve is a script; returns its ./launch/serve."""
    (folder / ".venv" / "bin").mkdir(parents=True)
    for name in ("launch", "pyproject.toml"):
        (folder / name).symlink_to(OWN / name)
    for name in ("python", "python3"):
        (folder / ".venv" / "bin" / name).symlink_to(sys.executable)
    size = subprocess.run(
        ["cksum"], input=(folder / "pyproject.toml").read_bytes(), capture_output=True
    ).stdout.decode()
    (folder / ".venv" / ".hippo-installed").write_text(f"{size.strip()} {folder} dev\n")
    (folder / ".venv" / "bin" / "hippo_mpi.serve").write_text(f"#!/bin/sh\n{server}")
    (folder / ".venv" / "bin" / "hippo_mpi.serve").chmod(0o755)
    return folder / "launch" / "serve"


@pytest.mark.slow
def test_a_start_that_takes_long(tmp_path: Path) -> None:
    """What is told meanwhile is true also of a server that is about to end."""
    serve = folder_with(tmp_path / "hippo-mpi", "echo error: the ranks did not start\nsleep 15\nexit 2\n")
    found = subprocess.run([serve, "start"], capture_output=True, text=True, timeout=60)
    assert found.returncode == 2 and found.stdout == ""
    assert found.stderr.splitlines() == [
        "not ready after 10 s; its log ends with: error: the ranks did not start",
        "error: the ranks did not start",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("given", [[], ["--port", "0"], ["--port=18080", "--ranks", "1"]])
def test_every_start_again_is_on_the_same_port(tmp_path: Path, given: list[str]) -> None:
    """However often it ends: the port is told once, and other options stay."""
    server = (
        'echo "told: $*"\necho "0 INFO listening on http://127.0.0.1:18080"\necho "0 INFO ready"\nsleep 1\nexit 1\n'
    )
    serve, log = folder_with(tmp_path / "hippo-mpi", server), tmp_path / "hippo-mpi" / ".serve" / "log"
    subprocess.run([serve, "start", "--journal", "x", *given], check=True, capture_output=True, timeout=60)
    try:
        ends = time.monotonic() + 60
        while log.read_text().count("told: ") < 3:
            assert time.monotonic() < ends, log.read_text()
            time.sleep(0.1)
    finally:
        narrow = {**os.environ, "COLUMNS": "80"}  # in which ps cuts off the name of a server in a deep folder
        stopped = subprocess.run([serve, "stop"], capture_output=True, text=True, timeout=60, env=narrow)
    assert stopped.stdout == "stopped\n"
    told = [line for line in log.read_text().splitlines() if line.startswith("told: ")]
    kept = ["--ranks", "1"] if "--ranks" in given else []
    logged = ("--log-file", str(log))
    assert told[0].split() == ["told:", "--journal", "x", *given, *logged]
    assert {tuple(line.split()) for line in told[1:]} == {
        ("told:", "--journal", "x", *kept, "--port", "18080", *logged)
    }
    assert "WARNING the server exited with status 1; restarting it in 1 s" in log.read_text()


@pytest.mark.slow
def test_a_start_keeps_the_log_of_those_before(tmp_path: Path) -> None:
    """Also if its file was set aside between; a failed one shows what it has said itself, and no more."""
    serve = folder_with(tmp_path / "hippo-mpi", 'echo "error: told $*"\nexit 2\n')
    for word in ("first", "second"):
        found = subprocess.run([serve, "start", word], capture_output=True, text=True, timeout=60)
        assert found.returncode == 2 and f" {word} " in found.stderr and found.stderr.count("error: told") == 1
    log = (tmp_path / "hippo-mpi" / ".serve" / "log").read_text()
    assert log.index(" first ") < log.index(" second ")
    refused = subprocess.run([serve, "start", "--log-file", "x"], capture_output=True, text=True, timeout=60)
    assert refused.returncode == 2 and refused.stderr.startswith("error: the log is ")


@pytest.mark.parametrize("words", [["--help"], ["start", "--help"], ["restart", "-h"]])
def test_help_needs_no_set_up(tmp_path: Path, words: list[str]) -> None:
    (tmp_path / "launch").symlink_to(OWN / "launch")
    found = subprocess.run([tmp_path / "launch" / "serve", *words], capture_output=True, text=True, timeout=60)
    assert (found.returncode, found.stderr) == (0, "")
    for told in (".serve/", "log.1", "the bundled model", "exits with 3 if no server runs, as systemd does"):
        assert told in found.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"launch"}
