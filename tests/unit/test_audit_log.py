"""The chain of an audit log: whole as written, over files, and broken by every kind of tampering."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from hippo_mpi.errors import UserError
from hippo_mpi.serving.api.audit_log import AuditLog, check, files_of


def written(folder: Path, count: int, most_bytes: int = 1 << 20) -> Path:
    path = folder / "audit.jsonl"
    for start in range(0, count, 4):  # opened again and again
        log = AuditLog(path, most_bytes=most_bytes)
        for number in range(start, min(count, start + 4)):
            log.write({"id": f"r{number}"})
    return path


def test_a_log_is_whole_over_files(tmp_path: Path) -> None:
    path = written(tmp_path, 20, most_bytes=500)
    files = files_of(path)
    assert len(files) > 3 and files[-1] == path
    assert check(files)[0] == []
    ids = [json.loads(line)["id"] for file in files for line in file.read_text().splitlines()]
    assert ids == [f"r{number}" for number in range(20)]


@pytest.mark.parametrize(
    ("tamper", "line"),
    [
        (lambda lines: [lines[0], lines[1].replace("r1", "rX"), *lines[2:]], 3),
        (lambda lines: [lines[0], *lines[2:]], 2),
        (lambda lines: [lines[0], lines[2], lines[1], *lines[3:]], 2),
        (lambda lines: lines[1:], 1),
        (lambda lines: [lines[0], "{}", *lines[1:]], 2),
    ],
    ids=["changed", "dropped", "moved", "first dropped", "added"],
)
def test_tampering_is_found(tmp_path: Path, tamper: Callable[[list[str]], list[str]], line: int) -> None:
    path = written(tmp_path, 6)
    path.write_text("\n".join(tamper(path.read_text().splitlines())) + "\n")
    mistakes, _ = check(files_of(path))
    assert mistakes[0].startswith(f"{path}, line {line} ")
    with pytest.raises(UserError, match="set it aside"):
        AuditLog(path)


def test_a_file_of_the_middle_that_is_gone(tmp_path: Path) -> None:
    path = written(tmp_path, 20, most_bytes=500)
    files_of(path)[1].unlink()
    assert check(files_of(path))[0]
