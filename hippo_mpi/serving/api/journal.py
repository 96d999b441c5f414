"""What was asked and what was told of it, in an SQLite file: what a server that dies leaves to the next one.

A thread writes; what comes while it does goes into the next commit together. Who waits for a commit (`then`) tells clients
only what is in the file, so that what they have seen is never made anew. A commit is in the system's hands when it is
done, without waiting for the disk (WAL, synchronous=NORMAL): it outlives this process; a power cut may take the last of
them, and those tokens are then computed again, with the same random numbers.
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
_MOST_BYTES = 1 << 30  # of all that is kept; beyond that the oldest answers go before their time
_ADD = "INSERT INTO requests (id, record) VALUES (?, ?)"
_NOTE = "INSERT INTO lines SELECT number, ? FROM requests WHERE id = ?"
_END = "UPDATE requests SET expires = ? WHERE id = ? AND expires IS NULL"
_FORGET = "UPDATE requests SET expires = 0 WHERE id = ?"  # nobody finds it any more, and it is deleted soon
_GATHER_S = (
    0.002  # for the other outputs of a step: without it the front takes 0.25 ms for a token of 16 streams, not 0.17
)
_SURVIVE = "UPDATE requests SET deaths = deaths - 1 WHERE expires IS NULL AND deaths > 0"  # this server didn't die
_SWEEP_S = 5.0  # between two looks for what has been kept long enough
_AT_ONCE = 256  # lines that one statement deletes
_SLICE_S = 0.01  # of deleting, then it is written what has come meanwhile: somebody may wait for it
_PATIENCE_S = 2.0  # with a disk that doesn't answer; then clients are told without it

Then = Callable[[], None]
Left = tuple[Record, list[Line], int]
"""A request that was under way when a server died, what came for it, and how many servers in a row have died since."""


@dataclass(frozen=True, eq=False)
class _Operation:
    """Something to write.

    Args:
        name: id of the request.
        put_s: since when it waits.
    """

    name: str
    statement: str
    values: Sequence[Any]
    put_s: float


class Journal:
    """Keeps requests until they expire.

    Args:
        path: of the file, which is made, and which nobody else can read.
        most_bytes: of all that is kept.

    Attributes:
        silent_s: how long ago it was written last, before it was opened.

    Raises:
        UserError: it can't be used.
    """

    def __init__(self, path: Path, most_bytes: int = _MOST_BYTES) -> None:
        path = Path(os.path.realpath(path))  # by whatever name, it is one journal
        self.path, self._most_bytes = path, most_bytes
        self._lock_file = _locked(path)
        self.silent_s = _silent_s(path)
        try:
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
            self._writer = self._open()
            self._prepare()
        except (OSError, sqlite3.Error) as error:
            raise UserError(f"the journal {path} can't be used: {error}") from None
        self._operations: queue.SimpleQueue[_Operation | None] = queue.SimpleQueue()
        self._waiting: dict[_Operation, Then] = {}  # for operations, in their order; each is called once
        self._next_sweep_s = 0.0
        self._torn: set[str] = set()  # requests of which something could not be written: the rest would be no answer
        self._thread = threading.Thread(target=self._write_all, name="hippo-journal", daemon=True)

    def start(self) -> list[Left]:
        """Return what the server before this one has left, oldest first, whose death counts from now on, and begin to write:
        `then`s are called in the running loop.

        Raises:
            UserError: it can't be read.
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
        """Write what is left, for as long as there is patience."""
        self._watching.cancel()
        self._operations.put(_Operation("", _SURVIVE, (), time.monotonic()))
        self._operations.put(None)
        self._thread.join(_PATIENCE_S)
        self._lock_file.close()

    # ---- what is written

    def add(self, name: str, text: str, then: Then) -> None:
        """Keep a request, whose record is this text."""
        self._put(name, _ADD, (name, text), then)

    def note(self, name: str, line: Line, then: Then) -> None:
        """Keep what came for a request."""
        self._put(name, _NOTE, (line_text(line), name), then)

    def end(self, name: str, keep_s: float, then: Then) -> None:
        """Let a request expire so many seconds from now."""
        self._put(name, _END, (time.time() + keep_s, name), then)

    def delete(self, name: str, then: Then) -> None:
        """Forget a request."""
        self._put(name, _FORGET, (name,), then)

    # ---- what is read

    def find(self, name: str) -> tuple[Record, list[Line]] | None:
        """Return a request that has ended, and all that came for it; blocks."""
        with contextlib.closing(self._open()) as reader:
            reader.execute("BEGIN")  # one view of both tables
            sql = "SELECT number, record FROM requests WHERE id = ? AND expires > ?"
            row = reader.execute(sql, (name, time.time())).fetchone()
            return None if row is None else (read_record(row[1]), _lines(reader, row[0]))

    def _take_left(self) -> list[Left]:
        found = []
        self._writer.execute("BEGIN IMMEDIATE")
        sql = "SELECT number, record, deaths, lines_before FROM requests WHERE expires IS NULL ORDER BY number"
        for number, text, deaths, lines_before in self._writer.execute(sql).fetchall():
            try:
                record, lines = read_record(text), _lines(self._writer, number)
            except (msgspec.DecodeError, ValueError, RecursionError) as error:  # written by another version
                _log.warning("a request in the journal %s can't be read, and is forgotten: %r", self.path, error)
                self._writer.execute("UPDATE requests SET expires = 0 WHERE number = ?", (number,))
                continue
            deaths = 1 if len(lines) > lines_before else deaths + 1
            sql = "UPDATE requests SET deaths = ?, lines_before = ? WHERE number = ?"
            self._writer.execute(sql, (deaths, len(lines), number))
            found.append((record, lines, deaths))
        self._writer.execute("COMMIT")
        return found

    # ---- the file

    def _open(self) -> sqlite3.Connection:
        found = sqlite3.connect(self.path, timeout=_PATIENCE_S, isolation_level=None, check_same_thread=False)
        for pragma in ("journal_mode = WAL", "synchronous = NORMAL", "foreign_keys = ON", "secure_delete = ON"):
            found.execute(f"PRAGMA {pragma}")
        return found

    def _prepare(self) -> None:
        """Make the tables, or see that they are ours."""
        (version,) = self._writer.execute("PRAGMA user_version").fetchone()
        if version == _VERSION:
            return
        if version or self._writer.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            raise sqlite3.DatabaseError("it is another program's, or another version's: set it aside")
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
                time.sleep(_GATHER_S)
                while not self._operations.empty():
                    batch.append(self._operations.get())
                is_over = None in batch
                self._commit([operation for operation in batch if operation is not None])
            if time.monotonic() >= self._next_sweep_s:
                self._sweep()
        ends_s = time.monotonic() + _PATIENCE_S / 2
        while self._next_sweep_s <= time.monotonic() < ends_s:  # what was to be deleted isn't left to the next server
            self._sweep()
        self._writer.close()

    def _commit(self, batch: Sequence[_Operation]) -> None:
        """Write operations, all or none, and tell those who wait for them either way."""
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
            _log.error("the journal can't be written (%s): a restart would make the rest of these answers anew", error)
            with contextlib.suppress(sqlite3.Error):
                self._writer.execute("ROLLBACK")
        if any(one.statement == _FORGET for one in batch):
            self._next_sweep_s = 0.0
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._tell, batch)

    def _sweep(self) -> None:
        """Delete a slice of what has expired, or is too much; the next is due at once if there is more."""
        is_tidy = False
        try:
            os.utime(self.path)  # the server lives, whether it has something to write or not
            self._writer.execute("BEGIN IMMEDIATE")
            ends_s = time.monotonic() + _SLICE_S
            while not is_tidy and time.monotonic() < ends_s:
                is_tidy = not self._delete_some()
            self._writer.execute("COMMIT")
        except (OSError, sqlite3.Error) as error:
            is_tidy = True  # for now
            _log.warning("the journal can't be tidied: %s", error)
            with contextlib.suppress(sqlite3.Error):
                self._writer.execute("ROLLBACK")
        self._next_sweep_s = time.monotonic() + _SWEEP_S if is_tidy else 0.0

    def _delete_some(self) -> bool:
        """Delete lines of what is to go first, and with its last ones the request; False if nothing is to go."""
        pages, free, size = (
            self._writer.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("page_count", "freelist_count", "page_size")
        )
        until = float("inf") if (pages - free) * size > self._most_bytes else time.time()
        sql = "SELECT number FROM requests WHERE expires < ? ORDER BY expires LIMIT 1"
        number = self._writer.execute(sql, (until,)).fetchone()
        if number is None:
            return False
        self._writer.execute("UPDATE requests SET expires = 0 WHERE number = ?", number)  # nobody finds a part of it
        sql = "DELETE FROM lines WHERE rowid IN (SELECT rowid FROM lines WHERE request = ? LIMIT ?)"
        if self._writer.execute(sql, (*number, _AT_ONCE)).rowcount < _AT_ONCE:
            self._writer.execute("DELETE FROM requests WHERE number = ?", number)
        return True

    # ---- in the event loop

    def _tell(self, done: Iterable[_Operation]) -> None:
        """Call what waits for operations, unless it has been called."""
        for one in done:
            if then := self._waiting.pop(one, None):
                then()

    async def _watch(self) -> None:
        """Let nobody wait for a disk that doesn't answer."""
        while True:
            await asyncio.sleep(_PATIENCE_S / 4)
            before_s = time.monotonic() - _PATIENCE_S
            late = [one for one in self._waiting if one.put_s < before_s]
            if late:
                _log.warning("the journal's disk doesn't answer: answers go on without it")
                self._tell(late)


def _lines(reader: sqlite3.Connection, number: int) -> list[Line]:
    rows = reader.execute("SELECT line FROM lines WHERE request = ? ORDER BY rowid", (number,))
    return [read_line(text) for (text,) in rows]


def _silent_s(path: Path) -> float:
    written = [file.stat().st_mtime for file in (path, path.with_name(f"{path.name}-wal")) if file.exists()]
    return time.time() - max(written, default=0.0)


def _locked(path: Path) -> IO[bytes]:
    """Return an open file that holds the journal for this process. It isn't the journal's own: closing any descriptor of
    that would give up SQLite's locks.

    Raises:
        UserError: another process has it, or there is no such folder.
    """
    lock = path.with_name(f"{path.name}.lock")
    try:
        found = lock.open("ab")
        fcntl.flock(found, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another server has the journal {path}: each needs one of its own") from None
    except OSError as error:
        raise UserError(f"the journal {path} can't be used: {error.strerror}") from None
    return found
