"""Requests and their outputs in an SQLite file, from which the next server goes on after one has died.

A thread writes; operations that come during a commit go into the next one together. Outputs are shown to clients only
when the file has them (`then` is called), so that what a client has seen is never computed anew. A commit is in the
operating system's hands when it is done, without waiting for the disk (WAL, synchronous=NORMAL): it survives this
process. A power cut may take the last commits, whose tokens are then computed again, with the same random numbers.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import msgspec

from hippo_mpi.errors import UserError
from hippo_mpi.serving.api.journal_records import Line, Record, line_text, read_line, read_record

_log = logging.getLogger(__name__)
_VERSION = 2  # of the tables, and of what is in them
_TABLES = """
CREATE TABLE requests (number INTEGER PRIMARY KEY, id TEXT UNIQUE NOT NULL, record TEXT NOT NULL,
                       expires REAL, -- seconds since 1970; NULL: it is under way
                       deaths INTEGER NOT NULL DEFAULT 0, -- of servers, without a line between
                       lines_before INTEGER NOT NULL DEFAULT 0); -- the last of them
CREATE TABLE lines (request INTEGER NOT NULL REFERENCES requests ON DELETE CASCADE, line TEXT NOT NULL);
CREATE INDEX lines_of ON lines (request);
CREATE INDEX expiring ON requests (expires);
"""
_MAX_BYTES = 1 << 30  # of everything in the file; beyond that the oldest answers are deleted before they expire
_ADD = "INSERT INTO requests (id, record) VALUES (?, ?)"
_NOTE = "INSERT INTO lines SELECT number, ? FROM requests WHERE id = ?"
_END = "UPDATE requests SET expires = ? WHERE id = ? AND expires IS NULL"
_FORGET = "UPDATE requests SET expires = 0 WHERE id = ?"  # it can't be found any more, and is deleted soon
# For the other outputs of a step to come: without it the front takes 0.25 ms for a token of 16 streams, not 0.17.
_GATHER_DELAY_S = 0.002
_SURVIVE = "UPDATE requests SET deaths = deaths - 1 WHERE expires IS NULL AND deaths > 0"  # this server didn't die
_SWEEP_INTERVAL_S = 5.0  # between two deletions of what has expired
_LINES_PER_DELETE = 256  # that one statement deletes
_SWEEP_SLICE_S = 0.01  # of deleting, before what has come meanwhile is written: a client may wait for it
_DISK_TIMEOUT_S = 2.0  # for a disk that doesn't answer; then outputs go to clients without it

Then = Callable[[], None]
Left = tuple[Record, list[Line], int]
"""A request that was under way when a server died, its outputs, and how many servers have died since the last one."""


@dataclass(frozen=True, eq=False)
class _Operation:
    """A statement to execute in the next commit.

    Args:
        name: id of the request.
        statement: in SQL.
        values: of its parameters.
        put_s: when it was queued, on time.monotonic().
    """

    name: str
    statement: str
    values: Sequence[Any]
    put_s: float


class Journal:
    """A journal, which keeps requests and their outputs until they expire.

    Args:
        path: of the file, which is created if needed, and which other users can't read.
        max_bytes: of everything in it.

    Attributes:
        silent_s: how many seconds before it was opened it was last written.

    Raises:
        UserError: it can't be used, or another server uses it.
    """

    def __init__(self, path: Path, max_bytes: int = _MAX_BYTES) -> None:
        path = Path(os.path.realpath(path))  # links to it mean the same journal
        self.path, self._max_bytes = path, max_bytes
        self._lock_file = _locked(path)
        self.silent_s = _silent_s(path)
        try:
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
            self._writer = self._open()
            self._prepare()
        except (OSError, sqlite3.Error) as error:
            raise UserError(f"the journal {path} can't be used: {error}") from None
        self._operations: queue.SimpleQueue[_Operation | None] = queue.SimpleQueue()
        self._waiting: dict[_Operation, Then] = {}  # in the order of the operations; each is called once
        self._next_sweep_s = 0.0
        self._torn: set[str] = set()  # ids of requests of which an operation failed: the rest wouldn't be an answer
        self._thread = threading.Thread(target=self._write_all, name="hippo-journal", daemon=True)

    def start(self) -> list[Left]:
        """Start writing, and return what the previous server has left, oldest first.

        For each of these requests another death of a server is counted. From now on, each `then` is called in the
        running loop.

        Raises:
            UserError: the file can't be read.
        """
        try:
            left = self._take_left()
        except sqlite3.Error as error:
            raise UserError(f"the journal {self.path} can't be used: {error}") from None
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        self._watching = asyncio.ensure_future(self._watch())
        return left

    def close(self) -> None:
        """Write what is queued, give up after _DISK_TIMEOUT_S, and release the file."""
        self._watching.cancel()
        self._operations.put(_Operation("", _SURVIVE, (), time.monotonic()))
        self._operations.put(None)
        self._thread.join(_DISK_TIMEOUT_S)
        self._lock_file.close()

    # ---- what is written

    def add(self, name: str, text: str, then: Then) -> None:
        """Queue a new request with the text of its record; `then` is called when it is in the file."""
        self._put(name, _ADD, (name, text), then)

    def note(self, name: str, line: Line, then: Then) -> None:
        """Queue an output or error of a request; `then` is called when it is in the file."""
        self._put(name, _NOTE, (line_text(line), name), then)

    def end(self, name: str, keep_s: float, then: Then) -> None:
        """Queue the end of a request, which expires in `keep_s` seconds; `then` is called when it is in the file."""
        self._put(name, _END, (time.time() + keep_s, name), then)

    def delete(self, name: str, then: Then) -> None:
        """Queue that a request is forgotten; `then` is called when it can't be found any more."""
        self._put(name, _FORGET, (name,), then)

    # ---- what is read

    def find(self, name: str) -> tuple[Record, list[Line]] | None:
        """Return a request that has ended, with all its outputs, or None; blocks while it reads.

        Raises:
            sqlite3.Error: the file can't be read.
        """
        with contextlib.closing(self._open()) as reader:
            reader.execute("BEGIN")  # one view of both tables
            sql = "SELECT number, record FROM requests WHERE id = ? AND expires > ?"
            row = reader.execute(sql, (name, time.time())).fetchone()
            return None if row is None else (read_record(row[1]), _lines(reader, row[0]))

    def _take_left(self) -> list[Left]:
        left = []
        self._writer.execute("BEGIN IMMEDIATE")
        sql = "SELECT number, record, deaths, lines_before FROM requests WHERE expires IS NULL ORDER BY number"
        for number, text, deaths, lines_before in self._writer.execute(sql).fetchall():
            try:
                record, lines = read_record(text), _lines(self._writer, number)
            except (msgspec.DecodeError, ValueError, RecursionError) as error:  # written by another version
                _log.warning("dropping an unreadable request from the journal %s: %r", self.path, error)
                self._writer.execute("UPDATE requests SET expires = 0 WHERE number = ?", (number,))
                continue
            deaths = 1 if len(lines) > lines_before else deaths + 1
            sql = "UPDATE requests SET deaths = ?, lines_before = ? WHERE number = ?"
            self._writer.execute(sql, (deaths, len(lines), number))
            left.append((record, lines, deaths))
        self._writer.execute("COMMIT")
        return left

    # ---- the file

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=_DISK_TIMEOUT_S, isolation_level=None, check_same_thread=False)
        for pragma in ("journal_mode = WAL", "synchronous = NORMAL", "foreign_keys = ON", "secure_delete = ON"):
            connection.execute(f"PRAGMA {pragma}")
        return connection

    def _prepare(self) -> None:
        """Create the tables, or check that they are ours."""
        (version,) = self._writer.execute("PRAGMA user_version").fetchone()
        if version == _VERSION:
            return
        if version or self._writer.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            raise sqlite3.DatabaseError("it belongs to another program or version: move it away")
        self._writer.executescript(f"BEGIN; {_TABLES} PRAGMA user_version = {_VERSION}; COMMIT;")

    def _put(self, name: str, statement: str, values: Sequence[Any], then: Then) -> None:
        operation = _Operation(name, statement, values, time.monotonic())
        self._waiting[operation] = then
        self._operations.put(operation)

    def _write_all(self) -> None:
        is_over = False
        while not is_over:
            with contextlib.suppress(queue.Empty):
                batch = [self._operations.get(timeout=max(0.0, self._next_sweep_s - time.monotonic()))]
                time.sleep(_GATHER_DELAY_S)
                while not self._operations.empty():
                    batch.append(self._operations.get())
                is_over = None in batch
                self._commit([operation for operation in batch if operation is not None])
            if time.monotonic() >= self._next_sweep_s:
                self._sweep()
        ends_s = time.monotonic() + _DISK_TIMEOUT_S / 2
        while self._next_sweep_s <= time.monotonic() < ends_s:  # so that the next server has nothing to delete
            self._sweep()
        self._writer.close()

    def _commit(self, batch: Sequence[_Operation]) -> None:
        """Execute operations, all or none, and call what waits for them in both cases."""
        try:
            self._writer.execute("BEGIN IMMEDIATE")
            for one in batch:
                if one.name not in self._torn:
                    self._writer.execute(one.statement, one.values)
                elif one.statement != _NOTE:
                    self._writer.execute(_FORGET, (one.name,))
            self._writer.execute("COMMIT")
        except sqlite3.Error as error:
            self._torn |= {one.name for one in batch}
            _log.error(
                "the journal can't be written (%s): a restart would generate the rest of these answers again", error
            )
            with contextlib.suppress(sqlite3.Error):
                self._writer.execute("ROLLBACK")
        if any(one.statement == _FORGET for one in batch):
            self._next_sweep_s = 0.0
        with contextlib.suppress(RuntimeError):  # the event loop has ended
            self._loop.call_soon_threadsafe(self._tell, batch)

    def _sweep(self) -> None:
        """Delete for _SWEEP_SLICE_S what has expired or exceeds the size; if more is left, the next is due at once."""
        is_tidy = False
        try:
            os.utime(self.path)  # shows when the server last lived, even if it has nothing to write
            self._writer.execute("BEGIN IMMEDIATE")
            ends_s = time.monotonic() + _SWEEP_SLICE_S
            while not is_tidy and time.monotonic() < ends_s:
                is_tidy = not self._delete_some()
            self._writer.execute("COMMIT")
        except (OSError, sqlite3.Error) as error:
            is_tidy = True  # try again at the next sweep
            _log.warning("can't delete expired answers from the journal: %s", error)
            with contextlib.suppress(sqlite3.Error):
                self._writer.execute("ROLLBACK")
        self._next_sweep_s = time.monotonic() + _SWEEP_INTERVAL_S if is_tidy else 0.0

    def _delete_some(self) -> bool:
        """Delete lines of the next request to delete, and with its last ones itself; return False if there is none."""
        pages, free, size = (
            self._writer.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("page_count", "freelist_count", "page_size")
        )
        until = float("inf") if (pages - free) * size > self._max_bytes else time.time()
        sql = "SELECT number FROM requests WHERE expires < ? ORDER BY expires LIMIT 1"
        number = self._writer.execute(sql, (until,)).fetchone()
        if number is None:
            return False
        self._writer.execute("UPDATE requests SET expires = 0 WHERE number = ?", number)  # can't be found any more
        sql = "DELETE FROM lines WHERE rowid IN (SELECT rowid FROM lines WHERE request = ? LIMIT ?)"
        if self._writer.execute(sql, (*number, _LINES_PER_DELETE)).rowcount < _LINES_PER_DELETE:
            self._writer.execute("DELETE FROM requests WHERE number = ?", number)
        return True

    # ---- in the event loop

    def _tell(self, done: Iterable[_Operation]) -> None:
        """Call what waits for these operations and hasn't been called yet."""
        for one in done:
            if then := self._waiting.pop(one, None):
                then()

    async def _watch(self) -> None:
        """Call what has waited longer than _DISK_TIMEOUT_S for a disk that doesn't answer."""
        while True:
            await asyncio.sleep(_DISK_TIMEOUT_S / 4)
            before_s = time.monotonic() - _DISK_TIMEOUT_S
            late = [one for one in self._waiting if one.put_s < before_s]
            if late:
                _log.warning("the journal's disk doesn't respond: answers continue without it")
                self._tell(late)


def _lines(reader: sqlite3.Connection, number: int) -> list[Line]:
    rows = reader.execute("SELECT line FROM lines WHERE request = ? ORDER BY rowid", (number,))
    return [read_line(text) for (text,) in rows]


def _silent_s(path: Path) -> float:
    written = [file.stat().st_mtime for file in (path, path.with_name(f"{path.name}-wal")) if file.exists()]
    return time.time() - max(written, default=0.0)


def _locked(path: Path) -> IO[bytes]:
    """Return an open file that locks the journal for this process.

    It is another file than the journal itself: closing any descriptor of that would release SQLite's locks.

    Raises:
        UserError: another process has it, or it can't be opened.
    """
    lock = path.with_name(f"{path.name}.lock")
    try:
        lock_file = lock.open("ab")
        fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"the journal {path} is in use by another server: each needs its own") from None
    except OSError as error:
        raise UserError(f"the journal {path} can't be used: {error.strerror}") from None
    return lock_file
