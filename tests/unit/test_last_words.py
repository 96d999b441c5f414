"""What is said and left behind at an end, where nobody reads and nothing can be written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hippo_mpi.transport.status_file import read_status, write_status


def test_an_error_that_nobody_reads_holds_nobody_up() -> None:
    """Its pipe is full."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    try:
        while True:
            os.write(writing, bytes(1 << 16))
    except BlockingIOError:
        os.set_blocking(writing, True)
    code = "from hippo_mpi.errors import print_error; print_error('the fox is gone ' * 1000)"
    assert subprocess.run([sys.executable, "-c", code], stderr=writing, timeout=30).returncode == 0
    os.close(writing)
    os.close(reading)


def test_a_long_error_is_written_whole() -> None:
    code = "from hippo_mpi.errors import print_error; print_error('the fox is gone ' * 10000)"
    found = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, timeout=30, text=True)
    assert found.stderr == f"error: {'the fox is gone ' * 10000}\n"


def test_a_status_and_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "status"
    assert read_status(path) is None
    path.write_text("")  # the disk was full
    assert read_status(path) is None
    monkeypatch.setenv("HIPPO_STATUS_FILE", str(path))
    write_status(3, "rank 1 died\nof something")
    assert read_status(path) == (3, "rank 1 died\nof something")
    write_status(0)
    assert read_status(path) == (0, "")
    monkeypatch.setenv("HIPPO_STATUS_FILE", str(tmp_path / "nowhere" / "status"))
    write_status(3)
