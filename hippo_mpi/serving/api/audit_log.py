"""Who asked for what, when, and how it ended: JSON lines in a chain that a key holds together (audit_chain.py).

A line is written as a whole when its request ends, so a kill takes none; a thread brings it to disk (fsync), and then the
anchor, as soon as the disk lets it, at most every _SYNC_EVERY_S. What can't be written costs no answer: the next line that
can says what is missing.
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
_MOST_BYTES = 64 << 20  # then a new file begins
_SYNC_EVERY_S = 0.5
_COMPLAIN_EVERY_S = 60.0


def key_id(key: str) -> str:
    """Return a name for an API key that doesn't give it away."""
    return hashlib.sha256(key.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class _Written:
    """What is in the log: where it ends, and of this process how many requests, and how many lost ones lines tell of."""

    end: Anchor
    num_requests: int = 0
    num_noted: int = 0


class AuditLog:
    """Appends to a file; one that has grown large is set aside as FILE.1, FILE.2 ... and the chain goes on in a new one.

    Those may be moved away: their numbers aren't given again. Nobody else may write the log until it is closed.

    Args:
        has_text: whether prompts and answers are written down, too, and not only their digests.
        key_path: where the key is, or is made; beside the log if not given.

    Raises:
        UserError: the file can't be written, another process writes it, or its chain is broken already.
    """

    def __init__(
        self, path: Path, has_text: bool = False, key_path: Path | None = None, most_bytes: int = _MOST_BYTES
    ) -> None:
        path = path.resolve()  # beside the file itself, wherever links to it are
        self._path, self.has_text, self._most_bytes = path, has_text, most_bytes
        self.num_lost = 0
        """Requests of this process that aren't in the log."""
        self._reason = ""  # why the last ones were lost
        self._wanted_bytes, self._complained_s = 0, -_COMPLAIN_EVERY_S
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
                with contextlib.suppress(OSError):  # else notes come with the first request
                    self._append()
                self._bring_to_disk()
            except BaseException:
                self._lock.release()
                raise
        except OSError as error:
            raise UserError(f"the audit log {path} can't be written: {error.strerror}") from None
        _log.info("audit log %s: %s", path, _told(end))
        self._thread = threading.Thread(target=self._sync_again_and_again, name="hippo-audit", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def close(self) -> None:
        """Bring all to disk, and let others write."""
        atexit.unregister(self.close)
        self._is_closed.set()
        self._is_dirty.set()
        self._thread.join()
        os.close(self._file)
        os.close(self._anchor)
        self._lock.release()

    def text_digest(self, text: str) -> str:
        """Return what stands for a text in this log."""
        return self._key.text_digest(text)

    def write(self, record: dict[str, Any]) -> None:
        """Add a line, or note in the next one that it is missing."""
        try:
            self._append(record)
        except OSError as error:
            self.num_lost += 1
            self._reason = str(error.strerror)
            lacks = f"it lacks {count_of(self.num_lost, 'request')} by now, which are answered all the same"
            self._complain(f"can't be written ({error.strerror}): {lacks}")

    def is_writable(self) -> bool:
        """Whether the last request could be written down or, if not, there is room for one like it by now."""
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
        """Write notes that are due, and records, all or nothing.

        Raises:
            OSError: nothing was written.
        """
        if self._sync_error:
            self._take_back()
        if self._written.end.end > self._most_bytes:
            self._begin_file()
        before = self._written
        notes = list(self._notes)
        if lost := self.num_lost - before.num_noted:
            notes.append({"note": f"lacks {count_of(lost, 'request')} ({self._reason})", "lost": lost})
        end, data = before.end, b""
        for record in (*notes, *records):
            begins = {"file": end.file} if end.end == 0 else {}
            fields = {"time": round(time.time(), 3), **record, **begins, "line": end.num_lines + 1}
            line = self._key.sealed({**fields, "previous": end.last_hash})
            data += line + b"\n"
            end = end.followed_by(line)
        self._write_whole(data)
        if lost:
            _log.warning("audit log %s goes on; it lacks %s", self._path, count_of(lost, "request"))
        self._written = _Written(end, before.num_requests + len(records), self.num_lost)
        self._notes = []
        self._is_dirty.set()

    def _take_back(self) -> None:
        """Take back the lines that may not have reached the disk: nobody knows which of them did."""
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
        """Log an error, but not the same for every request."""
        now = time.monotonic()
        if now - self._complained_s > _COMPLAIN_EVERY_S:
            self._complained_s = now
            _log.error("the audit log %s %s", self._path, what)

    # ---- files

    def _begin_file(self) -> None:
        """Set the file aside under a number that no other had, and begin a new one; if that can't be, go on in the old."""
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
            self._complain(f"grows: no new file can be begun ({error.strerror})")

    def _sync_again_and_again(self) -> None:
        while not self._is_closed.is_set():
            self._is_dirty.wait()
            self._is_dirty.clear()
            self._sync()
            self._is_closed.wait(_SYNC_EVERY_S)
        self._sync()

    def _sync(self) -> None:
        try:
            with self._sync_lock:
                self._bring_to_disk()
        except OSError as error:
            self._complain(f"can't be brought to disk ({error.strerror})")

    def _bring_to_disk(self) -> None:
        """Bring all lines to disk, and only then the anchor, so that it never tells of a line that a power cut took.

        There is none while notes are due: a next start would have nothing to note, and nobody would learn of them.

        Raises:
            OSError: the disk (of a network, say) has no room for them after all, or is broken.
        """
        if self._sync_error:
            return  # another call may succeed all the same: what it didn't write is forgotten
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
    """Say where a log goes on, for whoever keeps what servers say elsewhere."""
    if not end.num_lines:
        return "a new one"
    return (
        f"goes on after {count_of(end.num_lines, 'line')}; hippo_mpi.audit verify finds out whether they are still there,"
        f" with --lines {end.num_lines} --last-hash {end.last_hash}"
    )


def _change_places(new: Path, current: Path, older: Path) -> None:
    """Rename the current file to the older one, and the new one to the current.

    Raises:
        OSError: all is as it was.
    """
    current.rename(older)
    try:
        new.rename(current)
    except OSError:
        older.rename(current)
        raise
