"""An audit log through full disks, kills, power cuts, archiving and second servers: it goes on, and stays verifiable."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hippo_mpi import audit
from hippo_mpi.errors import UserError
from hippo_mpi.serving.api.audit_log import AuditLog
from tests import ranks
from tests.small_disk import fill
from tests.unit.test_audit_log import REQUEST, lines_in, mistake, verified, write, write_old

WRITER = """
import sys
from pathlib import Path
from hippo_mpi.serving.api.audit_log import AuditLog
log = AuditLog(Path(sys.argv[1]), max_bytes=200_000)
print("open", flush=True)
for number in range(int(sys.argv[2])):
    log.write({"id": f"r{number}", "text": "x" * 20_000})
"""


def ids(path: Path) -> list[str]:
    return [fields["id"] for line in lines_in(path) if "id" in (fields := json.loads(line))]


# ---- archiving


def test_older_files_may_be_moved_away(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever is moved, no number is given twice, and what is here and what was moved can both be verified."""
    path, archive = tmp_path / "audit.jsonl", tmp_path / "archive"
    archive.mkdir()
    log, moved = AuditLog(path, max_bytes=1000), set()
    for number in range(30):
        log.write({"id": f"r{number}"})
        if number % 7 == 6:
            for file in tmp_path.glob("audit.jsonl.[0-9]*"):
                assert file.name not in moved
                moved.add(file.name)
                file.rename(archive / file.name)
    log.close()
    assert len(moved) > 4
    assert "earlier lines are in other files" in verified(capsys, path)[1]
    log = AuditLog(path, max_bytes=1000)
    for number in range(30, 40):
        log.write({"id": f"r{number}"})
    log.close()
    verified(capsys, path)
    key = ("--audit-key", tmp_path / "audit.jsonl.key")
    told = verified(capsys, archive / "audit.jsonl", *key)
    assert told[0].startswith("intact: ") and told[1].startswith("these are older files")
    told = verified(capsys, archive / "audit.jsonl.2", *key)
    assert told[1].endswith("earlier lines are in other files")
    assert sorted([*ids(archive / "audit.jsonl"), *ids(path)]) == sorted(f"r{number}" for number in range(40))


def test_a_new_file_that_can_not_be_opened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With no descriptor left the old file grows; nothing is lost."""
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path, max_bytes=1000)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = os.open("/dev/null", os.O_RDONLY)
    resource.setrlimit(resource.RLIMIT_NOFILE, (used, hard))
    try:
        for number in range(8):
            log.write({"id": f"r{number}"})
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        os.close(used)
    assert log.num_lost == 0 and not (tmp_path / "audit.jsonl.1").exists()
    log.write({"id": "r8"})
    log.close()
    assert (tmp_path / "audit.jsonl.1").exists() and ids(path) == [f"r{number}" for number in range(9)]
    verified(capsys, path)


# ---- full disks


def test_a_disk_that_is_full_for_a_while(small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Lines are written as a whole or not at all; afterwards the gap is noted, and the chain whole."""
    path = small_disk / "audit.jsonl"
    log = AuditLog(path)
    log.write({"id": "r0"})
    before = path.read_bytes()
    filler = fill(small_disk)
    for number in (1, 2, 3):
        log.write({"id": f"r{number}", "text": "x" * 9000})
    assert (log.num_lost, log.is_writable()) == (3, False)
    assert path.read_bytes() == before
    assert verified(capsys, path)[0].startswith("intact: 1 line ")
    filler.unlink()
    assert log.is_writable()
    log.write({"id": "r4"})
    log.close()
    assert ids(path) == ["r0", "r4"]
    assert verified(capsys, path)[1] == "line 2: 3 requests not logged (No space left on device)"
    log = AuditLog(path)
    log.close()
    audit._run(audit.make_parser().read(["report", str(path)]))
    assert "3 more could not be logged" in capsys.readouterr().out


def test_a_disk_that_is_full_at_the_start(small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = small_disk / "audit.jsonl"
    write(path, 3)
    with path.open("ab") as stream:
        stream.write(b'{"id": "torn')
    filler = fill(small_disk)
    log = AuditLog(path)
    log.write({"id": "r3", "text": "x" * 9000})
    filler.unlink()
    log.write({"id": "r4"})
    log.close()
    assert ids(path)[-1] == "r4"
    verified(capsys, path)


@pytest.mark.parametrize("max_bytes", [1000, 1 << 20])
def test_a_disk_that_says_late_that_it_is_full(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, max_bytes: int
) -> None:
    """As those of networks do. Lines that may not be there are taken back, and counted."""
    path, sync = tmp_path / "audit.jsonl", os.fsync

    def refuse(_: int) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    log = AuditLog(path, max_bytes=max_bytes)
    log.write({"id": "r0", **REQUEST})
    log._sync()
    monkeypatch.setattr(os, "fsync", refuse)
    for number in (1, 2, 3, 4):
        log.write({"id": f"r{number}", **REQUEST})
    ends = time.monotonic() + 10
    while not log._sync_error:
        assert time.monotonic() < ends
        time.sleep(0.01)
    monkeypatch.setattr(os, "fsync", sync)
    log.write({"id": "r5", **REQUEST})
    log.close()
    kept = ids(path)
    assert kept[0] == "r0" and kept[-1] == "r5" and log.num_lost == 6 - len(kept) > 0
    assert any(line.endswith("(Disk quota exceeded)") for line in verified(capsys, path))
    write(path, 1, first=6)
    verified(capsys, path)


def test_folders_know_their_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut must not take a new or renamed file's name."""
    path, sync = tmp_path / "audit.jsonl", os.fsync
    names: list[set[str]] = []

    def spy(descriptor: int) -> None:
        sync(descriptor)
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            names.append(set(os.listdir(tmp_path)))

    monkeypatch.setattr(os, "fsync", spy)
    write(path, 4)
    assert names[-1] >= {"audit.jsonl", "audit.jsonl.key", "audit.jsonl.anchor"}
    write(path, 4, first=4, max_bytes=1500)
    assert names[-1] >= {"audit.jsonl", "audit.jsonl.1"} and not any(".new" in name for name in names[-1])


# ---- kills and power cuts


@pytest.mark.parametrize("tail", [b'{"time": 1.0, "id": "r3"', b"\0" * 5000, b"\0" * 5000 + b'half"}\n', b"{}\n"])
def test_a_torn_end_is_set_aside(tmp_path: Path, capsys: pytest.CaptureFixture[str], tail: bytes) -> None:
    path = write(tmp_path / "audit.jsonl", 3)
    with path.open("ab") as stream:
        stream.write(tail)
    write(path, 2, first=3)
    (aside,) = tmp_path.glob("audit.jsonl.torn-*")
    assert aside.read_bytes() == tail
    assert verified(capsys, path)[1] == (
        f"line 4: {len(tail)} bytes after the last line, left by a kill or a power cut, were removed (copy: {aside.name})"
    )
    assert ids(path) == ["r0", "r1", "r2", "r3", "r4"]


def test_a_torn_log_of_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "audit.jsonl"
    write_old(path, 3)
    with path.open("ab") as stream:
        stream.write(b'{"time": 1.0, "id": "r3"')
    assert "an incomplete line (24 bytes) follows" in verified(capsys, path)[-2]
    write(path, 1, first=3)
    verified(capsys, path)


def test_real_kills(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the middle of writing, again and again: no line that was there is lost, and the chain stays whole."""
    path, kept = tmp_path / "audit.jsonl", 0
    for wait_s in (0.02, 0.1, 0.3):
        with ranks.single([sys.executable, "-c", WRITER, str(path), "100000"]) as writer:
            writer.await_output("open")
            with pytest.raises(subprocess.TimeoutExpired):
                writer.process.wait(wait_s)
            writer.process.send_signal(signal.SIGKILL)
            writer.wait()
        log = AuditLog(path)
        log.close()
        verified(capsys, path)
        assert len(lines_in(path)) > kept
        kept = len(lines_in(path))


def test_an_anchor_that_is_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A kill between a line and its anchor, also while a new file was begun."""
    path, anchor = tmp_path / "audit.jsonl", tmp_path / "audit.jsonl.anchor"
    write(path, 3)
    old = anchor.read_bytes()
    write(path, 3, first=3)
    anchor.write_bytes(old)
    write(path, 2, first=6)
    old = anchor.read_bytes()
    write(path, 3, first=8, max_bytes=1000)
    assert (tmp_path / "audit.jsonl.1").exists()
    anchor.write_bytes(old)
    write(path, 1, first=11)
    (tmp_path / "audit.jsonl.2").exists()
    path.rename(tmp_path / "audit.jsonl.2")  # and the new one isn't there yet
    write(path, 1, first=12)
    verified(capsys, path)
    assert ids(path) == [f"r{number}" for number in range(13)]


def test_a_start_without_an_anchor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It goes on, and says so in the log for ever; half an anchor is none."""
    path = write(tmp_path / "audit.jsonl", 3)
    anchor = tmp_path / "audit.jsonl.anchor"
    anchor.write_bytes(anchor.read_bytes()[:100])
    write(path, 1, first=3)
    told = mistake(path)
    assert told.startswith("line 4: no anchor found")
    assert verified(capsys, path, *told.split("expected: ")[1].split())[0] == "intact: 5 lines in 1 file"


def test_a_note_comes_before_its_anchor(small_disk: Path) -> None:
    """A start whose note found no room leaves no anchor either, which would hide that there was none."""
    path, anchor = small_disk / "audit.jsonl", small_disk / "audit.jsonl.anchor"
    log = AuditLog(path)
    log.write({"text": ""})
    log.write({"text": "x" * (4000 - 2 * path.stat().st_size)})
    log.close()
    assert 3900 < path.stat().st_size < 4090, "its page has no room for a note"
    anchor.write_bytes(anchor.read_bytes()[:100])
    filler = fill(small_disk)
    with ranks.single([sys.executable, "-c", WRITER, str(path), "0"]) as writer:
        assert writer.wait() == 0
    filler.unlink()
    write(path, 1)
    assert mistake(path).startswith("line 3: no anchor found")


def test_what_a_start_says(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    path = write(tmp_path / "audit.jsonl", 2)
    assert caplog.messages == [f"audit log {path}: a new log"]
    AuditLog(path).close()
    assert re.fullmatch(
        rf"audit log {path}: continues after 2 lines; to check later that they are still there: hippo_mpi.audit"
        r" verify --lines 2 --last-hash [0-9a-f]{64}",
        caplog.messages[1],
    )


def test_a_start_reads_only_the_end(tmp_path: Path) -> None:
    """Older files are verify's business, not that of a start."""
    path = write(tmp_path / "audit.jsonl", 20, max_bytes=1500)
    (tmp_path / "audit.jsonl.1").write_bytes(b"something else\n")
    write(path, 1, first=20)
    assert "audit.jsonl.1, line 1 is not a line of an audit log" in mistake(path)


def test_the_end_is_on_disk_before_its_anchor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is anchored while the log is written is what verify needs."""
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path)
    for number in range(50):
        log.write({"id": f"r{number}", **REQUEST})
        verified(capsys, path)
    log.close()


# ---- keys and second servers


def test_a_second_server_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    with ranks.single([sys.executable, "-c", f"{WRITER}\nimport time; time.sleep(60)", str(path), "3"]) as writer:
        writer.await_output("open")
        with pytest.raises(UserError, match=f"{path} is being written by process {writer.process.pid} on ") as found:
            AuditLog(path)
        assert "\n" not in str(found.value)
    write(path, 1)


def test_a_key_that_others_may_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "audit.jsonl", 1)
    assert not caplog.records
    (tmp_path / "audit.jsonl.key").chmod(0o644)
    write(path, 1, first=1)
    assert f"other users may access the audit log's key {path}.key: chmod 600" in caplog.text


def test_a_link_to_a_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "disk").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "disk" / "audit.jsonl")
    write(link, 20, max_bytes=1500)
    assert link.is_symlink() and not (tmp_path / "link.1").exists()
    assert verified(capsys, link) == verified(capsys, tmp_path / "disk" / "audit.jsonl")


def test_a_key_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, key = tmp_path / "audit.jsonl", tmp_path / "key"
    AuditLog(path, key_path=key).close()
    log = AuditLog(path, key_path=key)
    log.write({"id": "r0"})
    log.close()
    assert not (tmp_path / "audit.jsonl.key").exists()
    verified(capsys, path, "--audit-key", key)
    with pytest.raises(UserError, match=r"audit.jsonl.key for the audit log .* give --audit-key"):
        AuditLog(path)
    key.write_text("abc\n")
    with pytest.raises(UserError, match="expected 64 hexadecimal digits"):
        AuditLog(path, key_path=key)


def test_a_log_that_can_not_be_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none/a.jsonl can't be written: No such file or directory"):
        AuditLog(tmp_path / "none" / "a.jsonl")
