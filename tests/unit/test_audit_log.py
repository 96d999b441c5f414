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


def write(path: Path, count: int, first: int = 0, max_bytes: int = 1 << 20) -> Path:
    """Write some records, in a log that is opened again and again."""
    for start in range(first, first + count, 4):
        log = AuditLog(path, max_bytes=max_bytes)
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
    audit._run(audit.make_parser().read(["verify", *map(str, words)]))
    return capsys.readouterr().out.splitlines()


def mistake(*words: object) -> str:
    with pytest.raises(UserError) as found:
        audit._run(audit.make_parser().read(["verify", *map(str, words)]))
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
    path = write(tmp_path / "audit.jsonl", 20, max_bytes=1500)
    assert (tmp_path / "audit.jsonl.3").exists()
    assert verified(capsys, path)[0].startswith("intact: 20 lines in ")
    assert [json.loads(line)["id"] for line in lines_in(path)] == [f"r{number}" for number in range(20)]
    assert (tmp_path / "audit.jsonl.key").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("tamper", "line", "count"),
    [
        (lambda lines: [lines[0], lines[1].replace("r1", "rX"), *lines[2:]], 2, 1),
        (lambda lines: [*lines[:5], lines[5].replace("r5", "rX")], 6, 1),
        (lambda lines: [lines[0], *lines[2:]], 2, 1),
        (lambda lines: [lines[0], lines[2], lines[1], *lines[3:]], 2, 3),
        (lambda lines: lines[1:], 1, 1),
        (lambda lines: [lines[0], "{}", *lines[1:]], 2, 1),
        (lambda lines: [*lines, lines[5]], 7, 1),
        (lambda lines: [*lines, old_line(6, hashlib.sha256(lines[5].encode()).hexdigest())], 7, 1),
        (lambda lines: [re.sub(', "mac": "[0-9a-f]+"', "", line) for line in lines], 2, 5),
    ],
    ids=["changed", "last", "dropped", "moved", "first dropped", "added", "added last", "added without MAC", "no MACs"],
)
def test_tampering_is_found(tmp_path: Path, tamper: Callable[[list[str]], list[str]], line: int, count: int) -> None:
    path = write(tmp_path / "audit.jsonl", 6)
    path.write_text("\n".join(tamper(path.read_text().splitlines())) + "\n")
    told = mistake(path).split("\nerror: ")
    assert told[0].startswith(f"{path}, line {line} ") and len(told) == count, told


def test_a_log_that_is_written_all_anew(tmp_path: Path) -> None:
    """Without the key that can't be done so that nobody sees it; its anchor can't be taken away, either."""
    path = write(tmp_path / "audit.jsonl", 6)
    write_old(path, 6)
    assert "line 6 is not the one that the anchor records" in mistake(path)
    write(tmp_path / "other" if (tmp_path / "other").mkdir() else tmp_path / "other" / "audit.jsonl", 6)
    path.write_bytes((tmp_path / "other" / "audit.jsonl").read_bytes())
    assert "was changed, or written with a different key" in mistake(path)
    (tmp_path / "audit.jsonl.anchor").write_bytes((tmp_path / "other" / "audit.jsonl.anchor").read_bytes())
    assert mistake(path) == f"{path}.anchor was changed, or written with a different key"
    with pytest.raises(UserError, match="written with a different key"):
        AuditLog(path)
    assert mistake(path, "--audit-key", tmp_path / "none") == (
        f"no such key file: {tmp_path / 'none'}; give --audit-key"
    )
    (tmp_path / "audit.jsonl.key").unlink()
    assert "line 1 can't be checked without the key" in mistake(path)
    write_old(path, 6)
    assert mistake(path) == f"no key file {path}.key, although {path}.anchor exists: give --audit-key"


def forge(path: Path, keep: Callable[[str], bool]) -> None:
    """Write a log anew without its key, and take its anchor away."""
    previous, lines = "0" * 64, []
    for line in filter(keep, lines_in(path)):
        fields = json.loads(line)
        for name in ("mac", "line", "file", "previous"):
            fields.pop(name, None)
        lines.append(json.dumps({**fields, "previous": previous}))
        previous = hashlib.sha256(lines[-1].encode()).hexdigest()
    for file in path.parent.glob(f"{path.name}*"):
        if file.suffix != ".key":
            file.unlink()
    path.write_text("".join(f"{line}\n" for line in lines))


@pytest.mark.parametrize("max_bytes", [1 << 20, 1500])
def test_a_log_that_is_forged_without_macs(tmp_path: Path, max_bytes: int) -> None:
    """Where there is a key, lines without MACs want one behind them that has one; no start makes up for that."""
    path = write(tmp_path / "audit.jsonl", 10, max_bytes=max_bytes)
    forge(path, lambda line: '"r3"' not in line)
    reason = (
        "none of the log's 9 lines has a MAC, although there is a key: they were rewritten without it, or are older (then"
        " verify them together with the next file)"
    )
    assert mistake(path) == reason
    with pytest.raises(UserError, match="none of the log's 9 lines has a MAC, although there is a key"):
        AuditLog(path)
    assert mistake(path) == reason and len(lines_in(path)) == 9
    with path.open("a") as stream:
        stream.write("half a line")
    assert mistake(path) == reason


def test_the_seal_of_a_log_of_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first line with a MAC holds the number and the last hash of those without: none can be changed or added."""
    path, old = tmp_path / "audit.jsonl", tmp_path / "audit.jsonl.1"
    write_old(path, 4)
    AuditLog(path).close()
    assert verified(capsys, path)[0] == "intact: 4 lines in 2 files", "until it comes the anchor holds them"
    write_old(old, 5)
    assert "none of the log's 5 lines has a MAC" in mistake(path)
    write_old(old, 4)
    write(path, 2, first=4)
    verified(capsys, path)
    keyed = path.read_text()
    for count in (3, 5):
        write_old(old, count)
        assert "audit.jsonl, line 1 doesn't follow the previous line" in mistake(path)
    write_old(old, 4)
    path.unlink()
    (tmp_path / "audit.jsonl.anchor").unlink()
    assert "none of the log's 4 lines has a MAC" in mistake(path)
    with pytest.raises(UserError, match="none of the log's 4 lines has a MAC"):
        AuditLog(path)
    path.write_text(keyed)
    assert "is missing or damaged" in mistake(path)


@pytest.mark.parametrize("is_empty", [False, True])
def test_a_log_that_was_dropped_as_a_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, is_empty: bool
) -> None:
    """The key remembers that there was a start before. Verify says so until somebody has noted that they know."""
    path = write(tmp_path / "audit.jsonl", 6)
    assert not caplog.records
    path.unlink()
    (tmp_path / "audit.jsonl.anchor").unlink()
    if is_empty:
        path.touch()
        assert "is missing or damaged" in mistake(path)
    write(path, 1)
    assert "no anchor found" in caplog.text
    told = mistake(path)
    assert told.startswith("line 1: no anchor found, although the key is older than this start: earlier lines may")
    known = told.split("expected: ")[1].split()
    assert known[:3] == ["--lines", "2", "--last-hash"]
    assert verified(capsys, path, *known)[0] == "intact: 2 lines in 1 file"
    write(path, 3, first=1)
    assert verified(capsys, path, *known)[0] == "intact: 5 lines in 1 file"
    assert mistake(path).startswith("line 1: no anchor found"), "for ever, without that note"


@pytest.mark.parametrize("kept", [0, 3, 5])
def test_a_dropped_tail_is_found(tmp_path: Path, kept: int) -> None:
    path = write(tmp_path / "audit.jsonl", 6)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:kept]))
    count = 6 - kept
    dropped = f"its last {count} lines were dropped" if count > 1 else "its last line was dropped"
    assert mistake(path) == f"the log has {kept} of 6 lines: {dropped}"
    with pytest.raises(UserError, match=r"lacks line 6, which its anchor records: its end was dropped"):
        AuditLog(path)
    (tmp_path / "audit.jsonl.anchor").unlink()
    assert mistake(path) == f"{path}.anchor is missing or damaged: can't check whether the end was dropped"


def test_a_torn_last_line_is_told_as_such(tmp_path: Path) -> None:
    path = write(tmp_path / "audit.jsonl", 6)
    whole = path.read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    path.write_bytes(whole[:-1])
    assert mistake(path) == f"the log has 5 of 6 lines, and {len(last) - 1} bytes of the next: the rest was cut off"
    path.write_bytes(whole[: -len(last) - 10])
    assert mistake(path).startswith("the log has 4 of 6 lines, and ")


def test_a_file_of_the_middle_that_is_gone(tmp_path: Path) -> None:
    path = write(tmp_path / "audit.jsonl", 20, max_bytes=1500)
    (tmp_path / "audit.jsonl.2").unlink()
    assert "doesn't follow the previous line" in mistake(path)


def test_an_end_that_was_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What verify prints is pasted back: either part of it finds that all was written anew; more lines are no mistake."""
    path = write(tmp_path / "audit.jsonl", 20, max_bytes=1500)
    noted = verified(capsys, path)[-1].split()
    assert noted[:3] == ["--lines", "20", "--last-hash"]
    write(path, 1, first=20, max_bytes=1500)
    for given in (noted, noted[:2], noted[2:]):
        assert verified(capsys, path, *given)[0].startswith("intact: 21 lines in ")
    (tmp_path / "new").mkdir()
    new = write(tmp_path / "new" / "audit.jsonl", 18)
    assert mistake(new, *noted) == "the log has 18 of 20 lines: its last 2 lines were dropped"
    assert mistake(new, *noted[2:]) == f"no line of the log (18 lines) has the hash {noted[3]}: its end was dropped"
    last = verified(capsys, new)[-1].split()[3]
    assert mistake(new, "--lines", 3, "--last-hash", last) == (
        f"the hash {last} is that of line 18, not of line 3: they don't belong together"
    )
    with pytest.raises(UserError, match="64 hexadecimal digits"):
        audit.make_parser().read(["verify", str(path), "--last-hash", "abc"])


@pytest.mark.parametrize("files", [1, 3])
def test_a_log_of_before_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str], files: int) -> None:
    """It had no key. It is verified as it was, and covered by the chain that goes on from it."""
    path = tmp_path / "audit.jsonl"
    write_old(path, 4, files)
    assert verified(capsys, path)[0].startswith(f"intact: {4 * files} lines")
    write(path, 5, first=4 * files)
    told = verified(capsys, path)
    assert told[0] == f"intact: {4 * files + 5} lines in {files + 1} files"
    assert told[1].startswith(f"{4 * files} of them were written without a key")
    assert [json.loads(line)["id"] for line in lines_in(path)] == [f"r{number}" for number in range(4 * files + 5)]
    old = tmp_path / f"audit.jsonl.{files}"
    old.write_text(old.read_text().replace("/v1/completions", "/v1/messages"))
    assert "doesn't follow the previous line" in mistake(path)
    old.unlink()
    if files > 1:
        for file in range(1, files):
            (tmp_path / f"audit.jsonl.{file}").unlink()
    assert verified(capsys, path)[:2] == [
        "intact: 5 lines in 1 file",
        f"the {4 * files} earlier lines are in other files",
    ]


def test_a_broken_log_of_before_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    write_old(path, 4)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(UserError, match=r"line 1 doesn't follow the previous line.*to start over"):
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
    log = AuditLog(tmp_path / "a.jsonl")
    log.write({"id": "r0"})
    log.close()
    (tmp_path / "archive").mkdir()
    (tmp_path / "archive" / "a.jsonl").write_bytes((tmp_path / "a.jsonl").read_bytes())
    (tmp_path / "work").write_text("Once upon a time\n")

    def digest(log: str, key: str, text: str) -> None:
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        words = ["digest", str(tmp_path / log), "--audit-key", str(tmp_path / key)]
        audit._run(audit.make_parser().read(words))

    for name in ("a.jsonl", "archive/a.jsonl"):
        digest(name, "a.jsonl.key", "yes")
        assert capsys.readouterr().out == f"{found}\n"
    for name, key, text, told in (
        ("work", "a.jsonl.key", "yes", "work was not written with this key: give --audit-key"),
        ("nothing", "a.jsonl.key", "yes", "no such audit log"),
        ("archive/a.jsonl", "b.jsonl.key", "yes", "was not written with this key: give --audit-key"),
        ("a.jsonl", "b.jsonl.key", "yes", "written with a different key"),
        ("a.jsonl", "none", "yes", "none; give --audit-key"),
        ("a.jsonl", "a.jsonl.key", "", "standard input is empty"),
    ):
        with pytest.raises(UserError, match=told):
            digest(name, key, text)


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
        audit._run(audit.make_parser().read(["report", str(path), *words]))
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
