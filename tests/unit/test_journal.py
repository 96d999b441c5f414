"""What a journal keeps, for how long, and what becomes of it when the disk is full or silent."""

from __future__ import annotations

import asyncio
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable, Coroutine
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hippo_mpi.engine.messages import OutputMessage
from hippo_mpi.engine.request import Request, SamplingParams, TokenLogprobs
from hippo_mpi.errors import ContextError, ForeignError, RankError, UserError
from hippo_mpi.serving.api import journal as journal_module
from hippo_mpi.serving.api.journal import Journal, Left
from hippo_mpi.serving.api.journal_records import Line, Record, line_text, record_text

SAMPLINGS = [
    SamplingParams(temp=0.5, seed=2**63, logit_bias=((3, -1.5),), stop_words=("a", "b")),
    SamplingParams(forced=(4, 5), grammar="x"),
]
PROMPT = [1, 2]
REQUESTS = [Request(5, PROMPT, SAMPLINGS[0]), Request(6, PROMPT, SAMPLINGS[1]), Request(7, [3], SAMPLINGS[0])]
OPEN = "import sys, pathlib; from hippo_mpi.serving.api.journal import Journal; Journal(pathlib.Path(sys.argv[1]))"
OUTPUT = OutputMessage(1, "a fox\n", 7, 2, 3, 1, TokenLogprobs(-0.5, [(7, -0.5), (8, -1.25)]), "stop", [1, 2])


def record(name: str) -> Record:
    return Record(
        name,
        "me",
        "kk",
        "/v1/completions",
        "m",
        5,
        {"prompt": ["ä", [1]]},
        REQUESTS,
        True,
        False,
        False,
    )


def add(kept: Journal, name: str, then: Callable[[], None]) -> None:
    kept.add(name, record_text(record(name)), then)


def run(work: Callable[[Journal], Coroutine[Any, Any, None]], path: Path) -> None:
    async def main() -> None:
        kept = Journal(path)
        kept.start()
        try:
            await asyncio.wait_for(work(kept), 20)
        finally:
            kept.close()
        errors = list[Any]()
        asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
        await asyncio.sleep(0.01)
        assert not errors and not kept._waiting, "it ends in order"

    asyncio.run(main())


def taken_up(path: Path) -> list[Left]:
    """What a server finds that ends in order."""
    found = list[Left]()

    async def main() -> None:
        kept = Journal(path)
        found.extend(kept.start())
        kept.close()

    asyncio.run(main())
    return found


async def written(*operations: Callable[[Callable[[], None]], None]) -> None:
    """Wait until all of them are in the file."""
    events = [asyncio.Event() for _ in operations]
    for operation, event in zip(operations, events, strict=True):
        operation(event.set)
    for event in events:
        await event.wait()


def test_requests_and_outputs_come_back_as_they_were(tmp_path: Path) -> None:
    lines: list[Line] = [
        (0, OutputMessage(0, "", None, 0, 0, 0, None, None, None)),
        (1, OUTPUT),
        (0, ContextError(5, 4)),
        (0, UserError("no")),
        (0, ForeignError("odd")),
        (1, RankError("gone")),
    ]

    async def write(kept: Journal) -> None:
        await written(
            lambda then: add(kept, "a", then),
            *(lambda then, line=line: kept.note("a", line, then) for line in lines),
            lambda then: add(kept, "b", then),
            lambda then: kept.end("b", 60, then),
            lambda then: add(kept, "c", then),
            lambda then: kept.delete("c", then),
            lambda then: kept.end("c", 60, then),
        )
        assert kept.find("c") is None
        found = kept.find("b")
        assert found == (record("b"), [])
        assert kept.find("a") is None, "it is under way"

    run(write, tmp_path / "journal")

    ((found, told, num_deaths),) = taken_up(tmp_path / "journal")
    assert num_deaths == 1
    assert found == record("a") and found.prompts == [PROMPT, [3]]
    assert found.requests[0].prompt is found.requests[1].prompt, "whose tokens are counted once"
    assert told[:2] == lines[:2]
    assert [(index, type(error), str(error)) for index, error in told[2:]] == [
        (index, type(error), str(error)) for index, error in lines[2:]
    ]
    assert stat.S_IMODE((tmp_path / "journal").stat().st_mode) == 0o600


def test_what_has_expired_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also from the file's bytes: who asks for nothing to be stored has texts in it, too."""
    monkeypatch.setattr(journal_module, "_SWEEP_INTERVAL_S", 0.05)
    secret = OutputMessage(0, "a secret of foxes", 7, 0, 0, 0, None, "stop", None)

    async def write(kept: Journal) -> None:
        await written(
            lambda then: add(kept, "a", then),
            lambda then: kept.note("a", (0, secret), then),
            lambda then: kept.end("a", 0.2, then),
        )
        assert kept.find("a") is not None
        await asyncio.sleep(0.25)
        assert kept.find("a") is None
        with closing(sqlite3.connect(tmp_path / "journal")) as reader:
            while reader.execute("SELECT count(*) FROM lines").fetchone()[0]:
                await asyncio.sleep(0.05)

    run(write, tmp_path / "journal")
    assert not any(b"secret of foxes" in file.read_bytes() for file in tmp_path.iterdir())


def test_what_is_too_much_goes_before_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "_SWEEP_INTERVAL_S", 0.05)

    async def main() -> None:
        kept = Journal(tmp_path / "journal", max_bytes=1 << 20)
        kept.start()
        long = OutputMessage(0, "x" * (600 << 10), 7, 0, 0, 0, None, "stop", None)
        for name, keep_s in (("old", 100.0), ("new", 200.0)):
            await written(
                lambda then, name=name: add(kept, name, then),  # type: ignore[misc]
                lambda then, name=name: kept.note(name, (0, long), then),  # type: ignore[misc]
                lambda then, name=name, keep_s=keep_s: kept.end(name, keep_s, then),  # type: ignore[misc]
            )
        while kept.find("old") is not None:
            await asyncio.sleep(0.05)
        assert kept.find("new") is not None
        kept.close()

    asyncio.run(asyncio.wait_for(main(), 20))


def num_left(kept: Journal) -> tuple[int, int]:
    """How many requests are in the file, and how many lines."""
    with closing(sqlite3.connect(kept.path)) as reader:
        return tuple(reader.execute("SELECT (SELECT count(*) FROM requests), (SELECT count(*) FROM lines)").fetchone())


def test_all_that_has_expired_goes_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However much comes between two looks: or the file would grow without an end."""

    async def write(kept: Journal) -> None:
        for number in range(500):
            add(kept, str(number), lambda: None)
            kept.note(str(number), (0, OUTPUT), lambda: None)
            kept.end(str(number), 0.0, lambda: None)
        await written(lambda then: add(kept, "last", then))
        kept._next_sweep_s = 0.0
        await written(lambda then: kept.note("last", (0, OUTPUT), then))
        while num_left(kept) != (1, 1):
            await asyncio.sleep(0.01)

    monkeypatch.setattr(journal_module, "_SWEEP_INTERVAL_S", 3600.0)
    run(write, tmp_path / "journal")


def test_a_long_answer_that_goes_holds_up_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes meanwhile is written between two slices of it; nobody finds a part, and a clean end takes the rest."""
    monkeypatch.setattr(journal_module, "_SWEEP_SLICE_S", 1e-3)

    async def write(kept: Journal) -> None:
        await written(lambda then: add(kept, "long", then), lambda then: add(kept, "other", then))
        with closing(sqlite3.connect(kept.path)) as writer, writer:
            writer.executemany("INSERT INTO lines VALUES (1, ?)", [(line_text((0, OUTPUT)),)] * 50_000)
        await written(lambda then: kept.end("long", 60, then))
        await written(lambda then: kept.delete("long", then))
        assert kept.find("long") is None
        await written(lambda then: kept.note("other", (0, OUTPUT), then))
        assert num_left(kept)[1] > 10_000

    run(write, tmp_path / "journal")
    assert num_left(Journal(tmp_path / "journal")) == (1, 1)


def test_a_full_disk_keeps_nobody_waiting(tmp_path: Path) -> None:
    """What could not be written whole is not kept; what comes when there is room again is."""
    long = OutputMessage(0, "x" * (200 << 10), 7, 0, 0, 0, None, None, None)

    async def write(kept: Journal) -> None:
        await written(lambda then: add(kept, "a", then))
        kept._writer.execute("PRAGMA max_page_count = 20")
        await written(lambda then: kept.note("a", (0, long), then))
        kept._writer.execute("PRAGMA max_page_count = 1000000")
        await written(
            lambda then: kept.note("a", (0, OUTPUT), then),
            lambda then: kept.end("a", 60, then),
            lambda then: add(kept, "b", then),
            lambda then: kept.end("b", 60, then),
        )
        assert kept.find("a") is None
        assert kept.find("b") is not None

    run(write, tmp_path / "journal")


def test_a_silent_disk_keeps_nobody_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process holds the file, which is as good as a disk that doesn't answer."""
    monkeypatch.setattr(journal_module, "_DISK_TIMEOUT_S", 0.4)

    async def write(kept: Journal) -> None:
        kept._writer.execute("PRAGMA busy_timeout = 3000")
        with closing(sqlite3.connect(tmp_path / "journal", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            await written(lambda then: add(kept, "a", then))
            other.execute("COMMIT")
        await written(lambda then: kept.end("a", 60, then))
        assert kept.find("a") is not None

    run(write, tmp_path / "journal")


def test_who_has_just_come_waits_for_a_slow_disk(tmp_path: Path) -> None:
    """Only those who have waited too long are told of what isn't in the file."""

    async def write(kept: Journal) -> None:
        with closing(sqlite3.connect(tmp_path / "journal", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            late, recent = asyncio.Event(), asyncio.Event()
            add(kept, "a", late.set)
            (operation,) = kept._waiting
            kept._waiting = {replace(operation, put_s=operation.put_s - 60): kept._waiting[operation]}
            kept.note("a", (0, OUTPUT), recent.set)
            await late.wait()
            assert not recent.is_set()
            other.execute("COMMIT")
            await recent.wait()

    run(write, tmp_path / "journal")


def test_servers_that_die_of_a_request_are_counted(tmp_path: Path) -> None:
    """Until something of it comes: then it was something else. One that ended in order didn't die."""
    path, counts = tmp_path / "journal", list[int]()

    async def write(kept: Journal) -> None:
        await written(lambda then: add(kept, "a", then))

    async def note(kept: Journal) -> None:
        await written(lambda then: kept.note("a", (0, OUTPUT), then))

    def look() -> None:
        counts.extend(num_deaths for _, _, num_deaths in taken_up(path))

    def die() -> None:
        code = (
            "import asyncio, os, pathlib, sys; from hippo_mpi.serving.api.journal import Journal\n"
            "async def main(): os._exit(Journal(pathlib.Path(sys.argv[1])).start()[0][2])\n"
            "asyncio.run(main())"
        )
        counts.append(subprocess.run([sys.executable, "-c", code, path]).returncode)

    run(write, path)
    die()
    die()
    look()
    run(note, path)
    die()
    look()
    assert counts == [1, 2, 3, 1, 2]


def test_servers_that_die_before_they_serve_are_not_counted(tmp_path: Path) -> None:
    """A host that doesn't answer, say: what was under way is not at fault."""

    async def write(kept: Journal) -> None:
        await written(lambda then: add(kept, "a", then))

    run(write, tmp_path / "journal")
    for _ in range(6):
        subprocess.run([sys.executable, "-c", OPEN, tmp_path / "journal"], check=True)
    assert [num_deaths for _, _, num_deaths in taken_up(tmp_path / "journal")] == [1]


def test_what_another_version_has_written_is_forgotten(tmp_path: Path) -> None:
    async def write(kept: Journal) -> None:
        await written(lambda then: add(kept, "a", then), lambda then: add(kept, "b", then))
        await written(lambda then: kept._put("a", "UPDATE requests SET record = '{}' WHERE id = ?", ("a",), then))

    run(write, tmp_path / "journal")
    assert [record.id for record, _, _ in taken_up(tmp_path / "journal")] == ["b"]
    for part in ("journal-wal", "journal-shm"):
        (tmp_path / part).unlink(missing_ok=True)
    (tmp_path / "journal").write_bytes((tmp_path / "journal").read_bytes()[:5000])
    with pytest.raises(UserError, match="can't be used"):
        Journal(tmp_path / "journal")


def test_a_journal_is_one_server_s(tmp_path: Path) -> None:
    """By whatever name they call it."""
    kept = Journal(tmp_path / "journal")
    (tmp_path / "link").symlink_to("journal")
    for path in (kept.path, tmp_path / "link"):
        other = subprocess.run([sys.executable, "-c", OPEN, path], capture_output=True, text=True)
        assert "is in use by another server" in other.stderr
    (tmp_path / "round").symlink_to("round")
    with pytest.raises(UserError, match=r"can't be used: .*Too many levels of symbolic links"):
        Journal(tmp_path / "round")
    (tmp_path / "other").write_text("no journal at all, but something that somebody wrote down " * 20)
    with pytest.raises(UserError, match="can't be used"):
        Journal(tmp_path / "other")
    with pytest.raises(UserError, match="No such file"):
        Journal(tmp_path / "nowhere" / "journal")
