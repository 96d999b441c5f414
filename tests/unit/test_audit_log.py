"""The chain of an audit log: whole as written, over files, and broken by every kind of tampering."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from hippo_mpi import audit
from hippo_mpi.errors import UserError
from hippo_mpi.serving.api.audit_log import AuditLog, files_of, read_chain


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
    chain = read_chain(files)
    assert (chain.mistakes, chain.num_lines) == ([], 20)
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
    assert read_chain(files_of(path)).mistakes[0].startswith(f"{path}, line {line} ")
    with pytest.raises(UserError, match="set it aside"):
        AuditLog(path)


def test_a_file_of_the_middle_that_is_gone(tmp_path: Path) -> None:
    path = written(tmp_path, 20, most_bytes=500)
    files_of(path)[1].unlink()
    assert read_chain(files_of(path)).mistakes


def test_lines_dropped_at_the_end_are_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What verify prints is pasted back: either part of it finds a dropped tail, in one line; more lines are no mistake."""
    path = written(tmp_path, 20, most_bytes=500)
    audit.verify(path, None, None)
    said, pasted = capsys.readouterr().out.splitlines()
    assert said.startswith("whole: 20 lines in ")
    noted = vars(audit.make_parser().parse_args(["verify", str(path), *pasted.split()]))
    last_hash, lines = noted["last_hash"], noted["lines"]
    assert lines == 20 and last_hash == read_chain(files_of(path)).last_hash

    AuditLog(path, most_bytes=500).write({"id": "later"})
    for given in ((last_hash, lines), (last_hash, None), (None, lines)):
        audit.verify(path, *given)

    files_of(path)[-1].unlink()
    kept = files_of(path)[-1].read_text().splitlines(keepends=True)[:-2]
    files_of(path)[-1].write_text("".join(kept))
    left = read_chain(files_of(path))
    assert left.mistakes == [] and left.num_lines < 20
    counted = f"the log has {left.num_lines} of 20 lines: its last {20 - left.num_lines} lines were dropped"
    hashed = f"no line of the log ({left.num_lines} lines) has the hash {last_hash}: its end was dropped"
    for given, line in (((last_hash, lines), counted), ((None, lines), counted), ((last_hash, None), hashed)):
        with pytest.raises(UserError) as found:
            audit.verify(path, *given)
        assert str(found.value) == line
    with pytest.raises(
        UserError, match=f"is that of line {left.num_lines}, not of line 3: they were not noted together"
    ):
        audit.verify(path, left.last_hash, 3)


def test_a_log_of_which_nothing_is_left(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    path.touch()
    empty = read_chain([path])
    assert empty.num_lines == 0 and not read_chain([path], empty.last_hash, 0).mistakes
    assert read_chain([path], num_lines=1).mistakes == ["the log has 0 of 1 lines: its last line was dropped"]
    assert read_chain([path], last_hash="a" * 64).mistakes
    with pytest.raises(UserError, match="64 hexadecimal digits"):
        audit.make_parser().parse_args(["verify", str(path), "--last-hash", "abc"])
