"""What was changed on a host, and what was there before: written down before each change, so that all can be put back.

Python 3.8 and its library only: `session` sends this file to hosts that have nothing else.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import time
from typing import Any

FOLDER = "~/.hippo-mpi"
NAME = "changes.json"
SILENCE_S = 30
"""After which who sends files to a host counts as gone."""
_LOCK_S = SILENCE_S + 5.0  # for one who is gone
_COMMAND_S = 30.0  # for a command that changes a setting


class Record:
    """The record of this host, in `FOLDER`; only one process at a time has it.

    Each of its `entries` has a `kind`, `of` (the verb that made it), `is_done`, and what its kind needs: `made` and
    `folder` a path that wasn't there, `line` a file's path and the line, `command` the words that do and undo it.

    Args:
        makes: whether to make the folder if it is missing.

    Raises:
        BlockingIOError: another process has it, and keeps it.
        FileNotFoundError: there is no folder.
        ValueError: the file isn't one of ours.
        OSError: it can't be read or written.
    """

    def __init__(self, makes: bool = False) -> None:
        self.folder = os.path.expanduser(FOLDER)
        self._path = os.path.join(self.folder, NAME)
        is_new = False
        if makes:
            with contextlib.suppress(FileExistsError):
                os.mkdir(self.folder, 0o700)
                is_new = True
        self._lock = os.open(self.folder, os.O_RDONLY)
        try:
            self._take_lock()
            self.entries = self._read()
            # An empty folder is what a set-up left that was killed at once.
            if is_new or (makes and not set(os.listdir(self.folder)) - {f"{NAME}.new"}):
                self.begin({"kind": "made", "of": "setup", "path": self.folder})
        except BaseException:
            os.close(self._lock)
            raise

    def _take_lock(self) -> None:
        ends_s = time.monotonic() + _LOCK_S
        while True:
            try:
                return fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > ends_s:
                    raise
                time.sleep(0.2)

    def close(self) -> None:
        """Let others have it."""
        os.close(self._lock)

    def _read(self) -> list[dict[str, Any]]:
        try:
            with open(self._path, encoding="utf-8") as file:
                entries = json.load(file)["changes"]
        except FileNotFoundError:
            return []
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{self._path} can't be read: move it away") from None
        return list(entries)

    def _write(self) -> None:
        """Replace the file; it is on disk before anything is changed."""
        _replace(self._path, json.dumps({"version": 1, "changes": self.entries}, indent=1).encode(), ".new")
        os.fsync(self._lock)

    def begin(self, entry: dict[str, Any]) -> None:
        """Write down a change that is about to be made; once, however often it is tried."""
        if not any(_what(one) == _what(entry) for one in self.entries):
            self.entries.append({**entry, "is_done": False})
            self._write()

    def done(self, entry: dict[str, Any]) -> None:
        """Write down that a change is made."""
        self._mark(entry, True)

    def _mark(self, entry: dict[str, Any], is_done: bool) -> None:
        for one in self.entries:
            if _what(one) == _what(entry) and one["is_done"] != is_done:
                one["is_done"] = is_done
                self._write()

    def forget(self, entry: dict[str, Any]) -> None:
        """Strike a change out: it is undone."""
        self.entries = [one for one in self.entries if _what(one) != _what(entry)]
        self._write()

    def undo(self, entry: dict[str, Any]) -> None:
        """Put back what was before a change, and strike it out; a second time does no harm.

        Raises:
            OSError, RuntimeError: it can't be put back; the change stays in the record.
        """
        if entry["kind"] == "made":
            if entry["path"] == self.folder:
                return  # last of all, by `end`
            remove(entry["path"])
            remove(f"{entry['path']}.new")
        elif entry["kind"] == "folder":
            with contextlib.suppress(OSError):  # something else is in it now
                os.rmdir(entry["path"])
        elif entry["kind"] == "line":
            _take_line(entry)
        else:
            self._undo_command(entry)
        self.forget(entry)

    def _undo_command(self, entry: dict[str, Any]) -> None:
        """Run the command that undoes another; that it fails matters only if the other is known to be in force."""
        was_done = entry["is_done"]
        self._mark(entry, False)  # a kill after the command leaves nothing to undo, too
        why = run(entry["undo"], entry["root"])
        if why and was_done:
            self._mark(entry, True)
            raise RuntimeError(f"{' '.join(entry['undo'])}: {why}")

    def end(self) -> list[str]:
        """Remove record and folder, if nothing is left to undo; return what else is in the folder."""
        if not all(self._is_folder(one) for one in self.entries):
            return []
        is_ours = bool(self.entries) or not os.path.exists(self._path)
        remove(f"{self._path}.new")
        remove(self._path)
        left = sorted(os.listdir(self.folder))
        if is_ours and not left:
            os.rmdir(self.folder)
        return left

    def _is_folder(self, entry: dict[str, Any]) -> bool:
        return bool(entry["kind"] == "made" and entry["path"] == self.folder)


def _what(entry: dict[str, Any]) -> Any:
    """Return what tells a change from others."""
    return entry["kind"], entry.get("path"), entry.get("undo") and entry.get("do")


def remove(path: str) -> None:
    """Remove a file or a folder, if it is there.

    Raises:
        OSError: it can't be removed.
    """
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def run(words: list[str], needs_root: bool, timeout_s: float = _COMMAND_S) -> str:
    """Run a command, as root if it must be; return "", or why it failed."""
    sudo = ["sudo", "-n", "--"] if needs_root and os.geteuid() != 0 else []
    try:
        ended = subprocess.run([*sudo, *words], stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return f"no end within {timeout_s:.0f} s"
    except OSError as error:
        return f"{error.filename or words[0]}: {error.strerror}"
    lines = ended.stderr.decode("utf-8", "replace").strip().splitlines() or [f"it ended with status {ended.returncode}"]
    return lines[-1] if ended.returncode else ""


def add_line(record: Record, path: str, line: str) -> bool:
    """Add a line to a file that only its owner may read, and to the record; return False if it is there already.

    Raises:
        OSError: it can't be written.
    """
    before = _content(path)
    if before is not None and line.encode() in before.splitlines():
        return False
    folder = os.path.dirname(path)
    if not os.path.isdir(folder):
        record.begin({"kind": "folder", "of": "setup", "path": folder})
        os.mkdir(folder, 0o700)
    kept = None if before is None else base64.b64encode(before).decode()
    entry = {"kind": "line", "of": "setup", "path": path, "line": line, "before": kept}
    record.begin(entry)
    _replace(path, _with_line(before, line))
    record.done(entry)
    return True


def _content(path: str) -> bytes | None:
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        return None


def _with_line(before: bytes | None, line: str) -> bytes:
    start = before or b""
    return start + b"\n" * (bool(start) and not start.endswith(b"\n")) + line.encode() + b"\n"


def _take_line(entry: dict[str, Any]) -> None:
    now = _content(entry["path"])
    before = None if entry["before"] is None else base64.b64decode(entry["before"])
    remove(f"{entry['path']}.hippo-new")
    if now is None:
        return
    if now == _with_line(before, entry["line"]):
        kept = before
    else:  # others have been added meanwhile
        kept = b"".join(one for one in now.splitlines(True) if one.strip() != entry["line"].encode())
    if kept is None:
        os.unlink(entry["path"])
    elif kept != now:
        _replace(entry["path"], kept)


def _replace(path: str, content: bytes, ending: str = ".hippo-new") -> None:
    """Write a file as a whole, by way of one beside it, with the mode that it had."""
    new = path + ending
    mode = os.stat(path).st_mode & 0o777 if os.path.exists(path) else 0o600
    try:
        with open(new, "wb") as file:
            os.fchmod(file.fileno(), mode)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except OSError:
        remove(new)
        raise
