"""Input that a launcher copies: its end, as far as it can be seen."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hippo_mpi.transport import copied_input
from hippo_mpi.transport.copied_input import CopiedInput

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's /proc")


@contextlib.contextmanager
def launcher(stdin: int) -> Iterator[int]:
    """A process that has this as its standard input, and reads nothing."""
    with subprocess.Popen(["sleep", "60"], stdin=stdin) as process:
        try:
            yield process.pid
        finally:
            process.kill()


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    read, write = os.pipe()
    yield read, write
    for descriptor in (read, write):
        with contextlib.suppress(OSError):
            os.close(descriptor)


def is_ended(found: CopiedInput, limit_s: float = 10.0) -> bool:
    began = time.monotonic()
    assert found.read_line() is None
    return time.monotonic() - began < limit_s


@pytest.mark.slow
def test_lines_and_a_last_one_without_an_end(pipe: tuple[int, int]) -> None:
    with launcher(subprocess.DEVNULL) as pid:
        found = CopiedInput(pipe[0], pid, lambda: None)
        os.write(pipe[1], "ä\nb\n\nc".encode())
        assert [found.read_line() for _ in range(5)] == ["ä", "b", "", "c", None]


def test_a_pipe_that_others_may_still_write_into_goes_on(pipe: tuple[int, int]) -> None:
    theirs = os.pipe()
    with launcher(theirs[0]) as pid:
        os.close(theirs[0])
        found = CopiedInput(pipe[0], pid, lambda: None)
        assert copied_input._look(pid) is copied_input._State.OPEN
        os.write(theirs[1], b"not read yet")
        os.close(theirs[1])
        assert copied_input._look(pid) is copied_input._State.OPEN
        os.write(pipe[1], b"late\n")
        assert found.read_line() == "late"


def test_a_pipe_without_writers_is_at_its_end(pipe: tuple[int, int]) -> None:
    theirs = os.pipe()
    with launcher(theirs[0]) as pid:
        for descriptor in theirs:
            os.close(descriptor)
        assert is_ended(CopiedInput(pipe[0], pid, lambda: None))


@pytest.mark.slow
def test_a_file_that_has_been_read_is_at_its_end(pipe: tuple[int, int], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("some text")
    with open(tmp_path / "file", "rb", buffering=0) as file, launcher(file.fileno()) as pid:
        assert copied_input._look(pid) is copied_input._State.OPEN
        file.read()  # its position is the launcher's, too
        assert is_ended(CopiedInput(pipe[0], pid, lambda: None))


def test_where_the_end_cannot_be_seen_silence_is_told_and_ends(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(copied_input, "SILENCE_S", 0.5)
    ours, theirs = socket.socketpair()
    with ours, theirs, launcher(theirs.fileno()) as pid:
        found = CopiedInput(pipe[0], pid, lambda: None)
        os.write(pipe[1], b"one\n")
        assert found.read_line() == "one"
        assert is_ended(found)
        assert capsys.readouterr().err.count("silence count as the end") == 1


def test_a_text_has_no_pauses_where_the_end_cannot_be_seen(pipe: tuple[int, int]) -> None:
    found = CopiedInput(pipe[0], None, lambda: None)
    os.write(pipe[1], b"all\nof it")
    assert found.read_all() == "all\nof it"


def test_a_launcher_that_is_gone_is_told(pipe: tuple[int, int]) -> None:
    gone: list[bool] = []
    CopiedInput(pipe[0], None, lambda: gone.append(True))
    os.close(pipe[1])
    ends = time.monotonic() + 10
    while not gone and time.monotonic() < ends:
        time.sleep(0.01)
    assert gone
