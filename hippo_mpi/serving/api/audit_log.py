"""Who asked for what, when, and how it ended: JSON lines, each chained to the one before by its hash.

A line that is changed, dropped, added or moved breaks the chain behind it, within a file and from one to the next.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hippo_mpi.errors import UserError

_FIRST = "0" * 64  # what the first line of all has instead of a hash
_MOST_BYTES = 64 << 20  # then a new file begins


class AuditLog:
    """Appends to a file; one that has grown large is set aside as FILE.1, FILE.2 ... and the chain goes on in a new one.

    Args:
        has_text: whether prompts and answers are written down, too, and not only their digests.

    Raises:
        UserError: the file can't be written, or its chain is broken already.
    """

    def __init__(self, path: Path, has_text: bool = False, most_bytes: int = _MOST_BYTES) -> None:
        self._path, self.has_text, self._most_bytes = path, has_text, most_bytes
        files = files_of(path)
        mistakes, self._hash = check(files) if files else ([], _FIRST)
        if mistakes:
            raise UserError(f"{mistakes[0]}: set it aside to begin anew")
        try:
            self._file = path.open("ab")
        except OSError as error:
            raise UserError(f"the audit log {path} can't be written: {error.strerror}") from None

    def write(self, record: dict[str, Any]) -> None:
        """Add a line; it is on its way to the disk when this returns."""
        if self._file.tell() > self._most_bytes:
            self._file.close()
            self._path.rename(f"{self._path}.{len(files_of(self._path))}")
            self._file = self._path.open("ab")
        line = json.dumps({"time": round(time.time(), 3), **record, "previous": self._hash}).encode()
        self._file.write(line + b"\n")
        self._file.flush()
        self._hash = hashlib.sha256(line).hexdigest()


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def files_of(path: Path) -> list[Path]:
    """The files of a log, oldest first."""
    numbered = [p for p in path.parent.glob(f"{path.name}.*") if p.suffix[1:].isdigit()]
    older = sorted(numbered, key=lambda p: int(p.suffix[1:]))
    return [*older, *([path] if path.exists() else [])]


def check(files: Sequence[Path]) -> tuple[list[str], str]:
    """(what is wrong with a chain, the hash of its last line).

    Raises:
        UserError: a file can't be read.
    """
    mistakes, previous = [], _FIRST
    for path, number, line in _lines(files):
        try:
            told = json.loads(line)["previous"]
        except (ValueError, KeyError, TypeError):
            told = None
        if told is None:
            mistakes.append(f"{path}, line {number} is no line of an audit log")
        elif told != previous:
            mistakes.append(f"{path}, line {number} doesn't follow the line before: one was changed, dropped or moved")
        previous = hashlib.sha256(line).hexdigest()
    return mistakes, previous


def _lines(files: Sequence[Path]) -> Iterator[tuple[Path, int, bytes]]:
    for path in files:
        try:
            with path.open("rb") as lines:
                for number, line in enumerate(lines, start=1):
                    yield path, number, line.removesuffix(b"\n")
        except OSError as error:
            raise UserError(f"the audit log {path} can't be read: {error.strerror}") from None
