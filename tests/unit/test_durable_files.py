"""Locks and temporary files beside a file of ours: what a user has there under such a name stays as it is."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hippo_mpi.durable_files import FileLock, replacing
from hippo_mpi.errors import UserError
from hippo_mpi.offline.answer_file import AnswerFile
from hippo_mpi.serving.api.audit_log import AuditLog

TEXT = "my life's work\n" * 1000
KILLED = """
import os, sys
from pathlib import Path
from hippo_mpi.durable_files import replacing
with replacing(Path(sys.argv[1])) as stream:
    stream.write(b"half")
    os._exit(9)
"""


@pytest.mark.parametrize("kind", ["link", "dangling link", "hard link", "file", "folder", "pipe"])
def test_a_lock_that_is_something_else(tmp_path: Path, kind: str) -> None:
    """It is refused by name, and neither it nor what it leads to is written or removed."""
    work, lock = tmp_path / "thesis.tex", tmp_path / "out.lock"
    work.write_text(TEXT)
    if kind == "link":
        lock.symlink_to(work)
    elif kind == "dangling link":
        lock.symlink_to(tmp_path / "nothing")
    elif kind == "hard link":
        lock.hardlink_to(work)
    elif kind == "file":
        lock.write_text(TEXT)
    elif kind == "folder":
        lock.mkdir()
    else:
        os.mkfifo(lock)
    with pytest.raises(UserError, match=f"{lock} is not a lock file of hippo_mpi: move it away, or give another file"):
        FileLock(tmp_path / "out")
    assert work.read_text() == TEXT and os.path.lexists(lock) and not (tmp_path / "nothing").exists()
    assert kind != "file" or lock.read_text() == TEXT


def test_a_lock_that_a_kill_has_left(tmp_path: Path) -> None:
    lock = tmp_path / "out.lock"
    for left in ("", "process 17 on fox, since 2026-11-26 07:00:00"):
        lock.write_text(left)
        found = FileLock(tmp_path / "out")
        assert lock.read_text().startswith(f"process {os.getpid()} on ")
        found.release()
        assert not lock.exists()


@pytest.mark.parametrize("is_link", [False, True])
def test_a_file_of_the_user_s_beside_ours(tmp_path: Path, is_link: bool) -> None:
    """Answers and their options are replaced, and an audit log grown, without a name that somebody else may have."""
    (tmp_path / "thesis.tex").write_text(TEXT)
    names = ["out.new", "out.options.json.new", "audit.jsonl.new"]
    for name in names:
        (tmp_path / name).symlink_to("thesis.tex") if is_link else (tmp_path / name).write_text(TEXT)
    answers = AnswerFile(tmp_path / "out", {})
    answers.sort([])
    answers.close()
    log = AuditLog(tmp_path / "audit.jsonl", max_bytes=500)
    for number in range(5):
        log.write({"id": f"r{number}"})
    log.close()
    assert (tmp_path / "audit.jsonl.1").exists()
    assert [(tmp_path / name).read_text() for name in names] == [TEXT] * 3
    assert all((tmp_path / name).is_symlink() == is_link for name in names)
    theirs = {"thesis.tex", *names}
    ours = {name for path in tmp_path.iterdir() if (name := path.name) not in theirs}
    assert {re.sub("[.][0-9]+$", "", name) for name in ours} == {
        *("out", "out.options.json", "audit.jsonl", "audit.jsonl.key", "audit.jsonl.anchor"),
    }


def test_an_anchor_that_is_a_link(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text(TEXT)
    (tmp_path / "audit.jsonl.anchor").symlink_to("thesis.tex")
    (tmp_path / "audit.jsonl.key").write_text("0" * 64)
    (tmp_path / "audit.jsonl.key").chmod(0o600)
    with pytest.raises(UserError, match=r"audit.jsonl.anchor is a symbolic link"):
        AuditLog(tmp_path / "audit.jsonl")
    assert (tmp_path / "thesis.tex").read_text() == TEXT


def test_what_a_kill_has_left_is_removed(tmp_path: Path) -> None:
    """By the next one that replaces the same file, with its rights, and nothing else."""
    path = tmp_path / "out[1]"
    path.write_text("before")
    path.chmod(0o640)
    (tmp_path / "out[1].new-0").write_text("mine")
    (tmp_path / "out1.new-0123456789abcdef").write_text("mine, too")
    assert subprocess.run([sys.executable, "-c", KILLED, str(path)]).returncode == 9
    assert path.read_text() == "before" and len(list(tmp_path.iterdir())) == 4
    with replacing(path) as stream:
        stream.write(b"after")
    assert {file.name for file in tmp_path.iterdir()} == {"out[1]", "out[1].new-0", "out1.new-0123456789abcdef"}
    assert path.read_text() == "after" and path.stat().st_mode & 0o777 == 0o640
