"""The audit log: who asked for what, when, and how it ended, as JSON lines in a hash chain with a key (audit_chain.py).

A line is written completely when its request ends, so that a kill loses none; a thread syncs it to disk, and then the
anchor, as soon as the disk permits, at most every _SYNC_INTERVAL_S. Requests are answered even if their lines can't be
written: the next line that can be says how many are missing.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import logging
import os
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hippo_mpi.durable_files import FileLock, create_beside, open_no_link, sync_folder
from hippo_mpi.errors import UserError
from hippo_mpi.serving.api.audit_chain import Anchor, anchor_path_of, key_path_of, numbers_of
from hippo_mpi.serving.api.audit_start import find_end
from hippo_mpi.units import count_of

_log = logging.getLogger(__name__)
_MAX_FILE_BYTES = 64 << 20  # then a new file begins
_SYNC_INTERVAL_S = 0.5
_COMPLAINT_INTERVAL_S = 60.0


def key_id(key: str) -> str:
    """Return a name for an API key that doesn't reveal it."""
    return hashlib.sha256(key.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class _Written:
    """What the log has: its end, this process's requests, and how many lost requests its notes account for."""

    end: Anchor
    num_requests: int = 0
    num_noted: int = 0


class AuditLog:
    """An audit log that is appended to, and locked until it is closed.

    A file that has grown large becomes FILE.1, FILE.2 ..., and a new one continues the chain. Those may be moved away:
    their numbers aren't used again.

    Args:
        path: of the current file.
        has_text: whether prompts and answers are written, too, and not only their digests.
        key_path: of the key, which is created if it is missing; None: beside the log.
        max_bytes: the size beyond which a new file begins.

    Raises:
        UserError: the file can't be written, another process writes it, or its chain is broken already.
    """

    def __init__(
        self, path: Path, has_text: bool = False, key_path: Path | None = None, max_bytes: int = _MAX_FILE_BYTES
    ) -> None:
        path = path.resolve()  # the log's other files are beside the file itself, not beside links to it
        self._path, self.has_text, self._max_bytes = path, has_text, max_bytes
        self.num_lost = 0
        """Number of requests of this process that aren't in the log."""
        self._reason = ""  # why the last of them were lost
        self._wanted_bytes, self._complained_s = 0, -_COMPLAINT_INTERVAL_S
        self._has_half_a_line, self._sync_error = False, ""
        self._sync_lock, self._is_dirty, self._is_closed = threading.Lock(), threading.Event(), threading.Event()
        try:
            self._lock = FileLock(path)
            try:
                self._key, end, self._notes = find_end(path, key_path or key_path_of(path))
                self._written = self._on_disk = _Written(end)
                self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
                self._anchor = open_no_link(anchor_path_of(path))
                sync_folder(path.parent)
                with contextlib.suppress(OSError):  # the notes are then written with the first request
                    self._append()
                self._bring_to_disk()
            except BaseException:
                self._lock.release()
                raise
        except OSError as error:
            raise UserError(f"the audit log {path} can't be written: {error.strerror}") from None
        _log.info("audit log %s: %s", path, _told(end))
        self._thread = threading.Thread(target=self._keep_syncing, name="hippo-audit", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def close(self) -> None:
        """Sync everything to disk, and release the lock."""
        atexit.unregister(self.close)
        self._is_closed.set()
        self._is_dirty.set()
        self._thread.join()
        os.close(self._file)
        os.close(self._anchor)
        self._lock.release()

    def text_digest(self, text: str) -> str:
        """Return the digest that stands for a text in this log."""
        return self._key.text_digest(text)

    def write(self, record: dict[str, Any]) -> None:
        """Append a request's record; if that fails, count it as lost, and let the next line say so."""
        try:
            self._append(record)
        except OSError as error:
            self.num_lost += 1
            self._reason = str(error.strerror)
            lacks = f"{count_of(self.num_lost, 'request')} answered without being logged so far"
            self._complain(f"can't be written ({error.strerror}): {lacks}")

    def is_writable(self) -> bool:
        """Return whether the last request could be written or, if not, there is room for one like it by now."""
        if self.num_lost == self._written.num_noted and not self._sync_error:
            return True
        try:
            disk = os.statvfs(self._path.parent)
            if disk.f_bavail * disk.f_frsize < 2 * self._wanted_bytes:
                return False
            self._append()
        except OSError:
            return False
        return True

    def _append(self, *records: dict[str, Any]) -> None:
        """Write pending notes and the records, all or nothing.

        Raises:
            OSError: nothing was written.
        """
        if self._sync_error:
            self._take_back()
        if self._written.end.end > self._max_bytes:
            self._begin_file()
        before = self._written
        notes = list(self._notes)
        if lost := self.num_lost - before.num_noted:
            notes.append({"note": f"{count_of(lost, 'request')} not logged ({self._reason})", "lost": lost})
        end, data = before.end, b""
        for record in (*notes, *records):
            begins = {"file": end.file} if end.end == 0 else {}
            fields = {"time": round(time.time(), 3), **record, **begins, "line": end.num_lines + 1}
            line = self._key.sealed({**fields, "previous": end.last_hash})
            data += line + b"\n"
            end = end.followed_by(line)
        self._write_whole(data)
        if lost:
            _log.warning("audit log %s can be written again; %s not logged", self._path, count_of(lost, "request"))
        self._written = _Written(end, before.num_requests + len(records), self.num_lost)
        self._notes = []
        self._is_dirty.set()

    def _take_back(self) -> None:
        """Cut off the lines since the last sync, which has failed: which of them reached the disk is unknown."""
        with self._sync_lock:
            os.ftruncate(self._file, self._on_disk.end.end)
            self.num_lost += self._written.num_requests - self._on_disk.num_requests
            self._written, self._reason, self._sync_error = self._on_disk, self._sync_error, ""

    def _write_whole(self, data: bytes) -> None:
        wanted = len(data)
        if self._has_half_a_line:
            os.ftruncate(self._file, self._written.end.end)
            self._has_half_a_line = False
        try:
            while data:
                data = data[os.write(self._file, data) :]
            self._wanted_bytes = 0
        except OSError:
            self._wanted_bytes = max(self._wanted_bytes, wanted)
            self._has_half_a_line = True
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._written.end.end)
                self._has_half_a_line = False
            raise

    def _complain(self, what: str) -> None:
        """Log an error, at most one every _COMPLAINT_INTERVAL_S."""
        now = time.monotonic()
        if now - self._complained_s > _COMPLAINT_INTERVAL_S:
            self._complained_s = now
            _log.error("the audit log %s %s", self._path, what)

    # ---- files

    def _begin_file(self) -> None:
        """Rename the file to a number that none had before, and begin a new one; if that fails, go on with the old."""
        try:
            number = max([self._written.end.file, *(number + 1 for number in numbers_of(self._path))])
            new, new_path = create_beside(self._path)
            try:
                with self._sync_lock:
                    self._bring_to_disk()
                    if self._sync_error:
                        return
                    _change_places(new_path, self._path, self._path.with_name(f"{self._path.name}.{number}"))
                    self._file, new = new, self._file
                    end = replace(self._written.end, file=number + 1, start=0, end=0)
                    self._written = self._on_disk = replace(self._written, end=end)
            finally:
                os.close(new)
                new_path.unlink(missing_ok=True)
            sync_folder(self._path.parent)
            self._sync()
        except OSError as error:
            self._complain(f"can't be rotated, and keeps growing ({error.strerror})")

    def _keep_syncing(self) -> None:
        while not self._is_closed.is_set():
            self._is_dirty.wait()
            self._is_dirty.clear()
            self._sync()
            self._is_closed.wait(_SYNC_INTERVAL_S)
        self._sync()

    def _sync(self) -> None:
        try:
            with self._sync_lock:
                self._bring_to_disk()
        except OSError as error:
            self._complain(f"can't be synced to disk ({error.strerror})")

    def _bring_to_disk(self) -> None:
        """Sync all lines to disk, and only then the anchor, so that it never has a line that a power cut has taken.

        While notes are pending no anchor is written: with one, the next start would find nothing to note, and they
        would be lost.

        Raises:
            OSError: the disk (for example of a network) has no room for them after all, or is broken.
        """
        if self._sync_error:
            return  # another fsync might succeed, although what the failed one didn't write is lost
        written = self._written
        try:
            os.fsync(self._file)
        except OSError as error:
            self._sync_error = str(error.strerror)
            raise
        self._on_disk = written
        if self._notes:
            return
        os.pwrite(self._anchor, written.end.written(self._key), 0)
        os.fsync(self._anchor)


def _told(end: Anchor) -> str:
    """Return where an audit log goes on, for the server's log: whoever keeps that can verify this end later."""
    if not end.num_lines:
        return "a new log"
    return (
        f"continues after {count_of(end.num_lines, 'line')}; to check later that they are still there: hippo_mpi.audit"
        f" verify --lines {end.num_lines} --last-hash {end.last_hash}"
    )


def _change_places(new: Path, current: Path, older: Path) -> None:
    """Rename the current file to `older`, and the new one to `current`.

    Raises:
        OSError: that failed; the files have their old names.
    """
    current.rename(older)
    try:
        new.rename(current)
    except OSError:
        older.rename(current)
        raise
