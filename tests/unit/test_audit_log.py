"""The chain of an audit log: whole as written, over files, and broken by every kind of tampering."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from hippo_mpi import audit
from hippo_mpi.errors import UserError
from hippo_mpi.serving.api.audit_log import AuditLog

REQUEST = {
    "key": "k",
    "model": "m",
    "endpoint": "/v1/completions",
    "prompt_tokens": 5,
    "choices": [{"tokens": 7, "outcome": "stop"}],
}


def write(path: Path, count: int, first: int = 0, most_bytes: int = 1 << 20) -> Path:
    """Write some records, in a log that is opened again and again."""
    for start in range(first, first + count, 4):
        log = AuditLog(path, most_bytes=most_bytes)
        for number in range(start, min(first + count, start + 4)):
            log.write({"id": f"r{number}", **REQUEST})
        log.close()
    return path


def lines_in(path: Path) -> list[str]:
    files = sorted(path.parent.glob(f"{path.name}.[0-9]*"), key=lambda file: int(file.suffix[1:]))
    return [line for file in [*files, path] if file.exists() for line in file.read_text().splitlines()]


def verified(capsys: pytest.CaptureFixture[str], *words: object) -> list[str]:
    """What the command prints of a log that is whole."""
    capsys.readouterr()
    audit._run(audit.make_parser().parse_args(["verify", *map(str, words)]))
    return capsys.readouterr().out.splitlines()


def mistake(*words: object) -> str:
    with pytest.raises(UserError) as found:
        audit._run(audit.make_parser().parse_args(["verify", *map(str, words)]))
    return str(found.value)


def old_line(number: int, previous: str) -> str:
    """As logs had them before they had a key."""
    return json.dumps({"time": 1.5, "id": f"r{number}", **REQUEST, "previous": previous})


def write_old(path: Path, count: int, files: int = 1) -> None:
    """Write a log without a key, `count` lines in each file."""
    previous = "0" * 64
    for file in range(1, files + 1):
        lines = []
        for number in range(count):
            lines.append(old_line((file - 1) * count + number, previous))
            previous = hashlib.sha256(lines[-1].encode()).hexdigest()
        name = path if file == files else path.with_name(f"{path.name}.{file}")
        name.write_text("".join(f"{line}\n" for line in lines))


def test_a_log_is_whole_over_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "audit.jsonl", 20, most_bytes=1500)
    assert (tmp_path / "audit.jsonl.3").exists()
    assert verified(capsys, path)[0].startswith("whole: 20 lines in ")
    assert [json.loads(line)["id"] for line in lines_in(path)] == [f"r{number}" for number in range(20)]
    assert (tmp_path / "audit.jsonl.key").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("tamper", "line"),
    [
        (lambda lines: [lines[0], lines[1].replace("r1", "rX"), *lines[2:]], 2),
        (lambda lines: [*lines[:5], lines[5].replace("r5", "rX")], 6),
        (lambda lines: [lines[0], *lines[2:]], 2),
        (lambda lines: [lines[0], lines[2], lines[1], *lines[3:]], 2),
        (lambda lines: lines[1:], 1),
        (lambda lines: [lines[0], "{}", *lines[1:]], 2),
        (lambda lines: [*lines, lines[5]], 7),
        (lambda lines: [*lines, old_line(6, hashlib.sha256(lines[5].encode()).hexdigest())], 7),
        (lambda lines: [re.sub(', "mac": "[0-9a-f]+"', "", line) for line in lines], 2),
    ],
    ids=["changed", "last", "dropped", "moved", "first dropped", "added", "added last", "added without MAC", "no MACs"],
)
def test_tampering_is_found(tmp_path: Path, tamper: Callable[[list[str]], list[str]], line: int) -> None:
    path = write(tmp_path / "audit.jsonl", 6)
    path.write_text("\n".join(tamper(path.read_text().splitlines())) + "\n")
    assert mistake(path).startswith(f"{path}, line {line} ")


def test_a_log_that_is_written_all_anew(tmp_path: Path) -> None:
    """Without the key that can't be done so that nobody sees it; its anchor can't be taken away, either."""
    path = write(tmp_path / "audit.jsonl", 6)
    write_old(path, 6)
    assert "line 6 is not the one that the anchor tells of" in mistake(path)
    write(tmp_path / "other" if (tmp_path / "other").mkdir() else tmp_path / "other" / "audit.jsonl", 6)
    path.write_bytes((tmp_path / "other" / "audit.jsonl").read_bytes())
    assert "was changed, or written with another key than this" in mistake(path)
    (tmp_path / "audit.jsonl.anchor").write_bytes((tmp_path / "other" / "audit.jsonl.anchor").read_bytes())
    assert mistake(path) == f"{path}.anchor was changed, or made with another key than this"
    with pytest.raises(UserError, match="made with another key"):
        AuditLog(path)
    assert "line 1 can't be checked: the key isn't there" in mistake(path, "--audit-key", tmp_path / "none")


@pytest.mark.parametrize("kept", [0, 3, 5])
def test_a_dropped_tail_is_found(tmp_path: Path, kept: int) -> None:
    path = write(tmp_path / "audit.jsonl", 6)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:kept]))
    count = 6 - kept
    dropped = f"its last {count} lines were dropped" if count > 1 else "its last line was dropped"
    assert mistake(path) == f"the log has {kept} of 6 lines: {dropped}"
    with pytest.raises(UserError, match=r"lacks its line 6, of which its anchor tells: its end was dropped"):
        AuditLog(path)
    (tmp_path / "audit.jsonl.anchor").unlink()
    if kept:
        assert mistake(path) == f"{path}.anchor is missing or torn: it can't be seen whether the end was dropped"


def test_a_file_of_the_middle_that_is_gone(tmp_path: Path) -> None:
    path = write(tmp_path / "audit.jsonl", 20, most_bytes=1500)
    (tmp_path / "audit.jsonl.2").unlink()
    assert "doesn't follow the line before" in mistake(path)


def test_an_end_that_was_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What verify prints is pasted back: either part of it finds that all was written anew; more lines are no mistake."""
    path = write(tmp_path / "audit.jsonl", 20, most_bytes=1500)
    noted = verified(capsys, path)[-1].split()
    assert noted[:3] == ["--lines", "20", "--last-hash"]
    write(path, 1, first=20, most_bytes=1500)
    for given in (noted, noted[:2], noted[2:]):
        assert verified(capsys, path, *given)[0].startswith("whole: 21 lines in ")
    (tmp_path / "new").mkdir()
    new = write(tmp_path / "new" / "audit.jsonl", 18)
    assert mistake(new, *noted) == "the log has 18 of 20 lines: its last 2 lines were dropped"
    assert mistake(new, *noted[2:]) == f"no line of the log (18 lines) has the hash {noted[3]}: its end was dropped"
    last = verified(capsys, new)[-1].split()[3]
    assert mistake(new, "--lines", 3, "--last-hash", last) == (
        f"the hash {last} is that of line 18, not of line 3: they were not noted together"
    )
    with pytest.raises(UserError, match="64 hexadecimal digits"):
        audit.make_parser().parse_args(["verify", str(path), "--last-hash", "abc"])


@pytest.mark.parametrize("files", [1, 3])
def test_a_log_of_before_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str], files: int) -> None:
    """It had no key. It is verified as it was, and covered by the chain that goes on from it."""
    path = tmp_path / "audit.jsonl"
    write_old(path, 4, files)
    assert verified(capsys, path)[0].startswith(f"whole: {4 * files} lines")
    write(path, 5, first=4 * files)
    told = verified(capsys, path)
    assert told[0] == f"whole: {4 * files + 5} lines in {files + 1} files"
    assert told[1].startswith(f"{4 * files} of them were written without a key")
    assert [json.loads(line)["id"] for line in lines_in(path)] == [f"r{number}" for number in range(4 * files + 5)]
    old = tmp_path / f"audit.jsonl.{files}"
    old.write_text(old.read_text().replace("/v1/completions", "/v1/messages"))
    assert "doesn't follow the line before" in mistake(path)
    old.unlink()
    if files > 1:
        for file in range(1, files):
            (tmp_path / f"audit.jsonl.{file}").unlink()
    assert verified(capsys, path)[:2] == [
        "whole: 5 lines in 1 file",
        f"the {4 * files} lines before them are elsewhere",
    ]


def test_a_broken_log_of_before_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    write_old(path, 4)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(UserError, match=r"line 1 doesn't follow the line before.*to begin anew"):
        AuditLog(path)
    write_old(path, 4, files=3)
    (tmp_path / "audit.jsonl.1").unlink()  # archived, which needs no key
    write(path, 1)


def test_texts_can_not_be_guessed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who has the key finds a text again; a digest is of no use as the MAC of a line."""
    log = AuditLog(tmp_path / "a.jsonl")
    found, line = log.text_digest("yes"), log._key.sealed({"id": "x"})
    log.close()
    other = AuditLog(tmp_path / "b.jsonl")
    assert len({found, other.text_digest("yes"), hashlib.sha256(b"yes").hexdigest()}) == 3
    assert other.text_digest('{"id": "x"}') not in other._key.sealed({"id": "x"}).decode()
    other.close()
    assert line != other._key.sealed({"id": "x"})
    monkeypatch.setattr("sys.stdin", io.StringIO("yes"))
    audit._run(audit.make_parser().parse_args(["digest", str(tmp_path / "a.jsonl")]))
    assert capsys.readouterr().out == f"{found}\n"


def test_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path, day_s = tmp_path / "audit.jsonl", 86_400.0
    log = AuditLog(path)
    for day, key, outcomes in (
        (0, "a", ["stop"]),
        (0, "a", ["error: x", "stop"]),
        (1, None, ["abort"]),
        (1, "a", ["length"]),
    ):
        monkeypatch.setattr("time.time", lambda day=day: 1_795_608_000 + day * day_s)
        choices = [{"tokens": 7, "outcome": outcome} for outcome in outcomes]
        log.write({**REQUEST, "key": key, "choices": choices})
    log.close()

    def printed(*words: str) -> str:
        audit._run(audit.make_parser().parse_args(["report", str(path), *words]))
        return capsys.readouterr().out

    rows = [line.split() for line in printed().splitlines()]
    assert rows == [
        ["key", "model", "day", "requests", "prompt", "tokens", "answer", "tokens", "errors", "aborted"],
        ["a", "m", "2026-11-25", "2", "10", "21", "1", "0"],
        ["a", "m", "2026-11-26", "1", "5", "7", "0", "0"],
        ["none", "m", "2026-11-26", "1", "5", "7", "0", "1"],
        ["all", "4", "20", "35", "1", "1"],
    ]
    found = json.loads(printed("--by", "model", "--since", "2026-11-26", "--json"))
    sums = {"requests": 2, "prompt_tokens": 10, "answer_tokens": 14, "errors": 0, "aborted": 1}
    assert found == {"groups": [{"model": "m", **sums}], "requests_not_written": 0, "unreadable_lines": 0}
    assert printed("--since", "2027-01-01") == "no requests\n"
    for words in (["--by", "colour"], ["--since", "yesterday"], ["--lines", "3"]):
        with pytest.raises(UserError, match=re.escape(words[0])):
            printed(*words)
