"""Who asked for what, when, and how it ended: JSON lines, each chained to the one before by its hash.

A line that is changed, dropped, added or moved breaks the chain behind it, within a file and from one to the next.
Lines that are dropped at the end break nothing: only who has noted the last hash, or the number of lines, can tell.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hippo_mpi.errors import UserError

_log = logging.getLogger(__name__)
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
        chain = read_chain(files_of(path))
        if chain.mistakes:
            raise UserError(f"{chain.mistakes[0]}: set it aside to begin anew")
        self._hash = chain.last_hash
        _log.info("audit log %s: --lines %d --last-hash %s", path, chain.num_lines, chain.last_hash)
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


def key_id(key: str) -> str:
    """Return a name for an API key that doesn't give it away."""
    return digest(key)[:16]


def files_of(path: Path) -> list[Path]:
    """The files of a log, oldest first."""
    numbered = [p for p in path.parent.glob(f"{path.name}.*") if p.suffix[1:].isdigit()]
    older = sorted(numbered, key=lambda p: int(p.suffix[1:]))
    return [*older, *([path] if path.exists() else [])]


@dataclass
class Chain:
    """A log as it was read: its number of lines over all files, the hash of the last one, and what is wrong with it."""

    num_lines: int = 0
    last_hash: str = _FIRST
    mistakes: list[str] = field(default_factory=list)


def read_chain(files: Sequence[Path], last_hash: str | None = None, num_lines: int | None = None) -> Chain:
    """Check every line of a log and, if its end was noted before, that nothing of what was there then is missing.

    Args:
        files: oldest first.
        last_hash: of the last line at that time.
        num_lines: of all files at that time; lines that came later are no mistake.

    Raises:
        UserError: a file can't be read.
    """
    chain, noted_at = Chain(), 0
    for path, number, line in _lines(files):
        try:
            told = json.loads(line)["previous"]
        except (ValueError, KeyError, TypeError):
            told = None
        if told is None:
            chain.mistakes.append(f"{path}, line {number} is no line of an audit log")
        elif told != chain.last_hash:
            why = "one was changed, dropped or moved"
            chain.mistakes.append(f"{path}, line {number} doesn't follow the line before: {why}")
        chain.num_lines, chain.last_hash = chain.num_lines + 1, hashlib.sha256(line).hexdigest()
        if chain.last_hash == last_hash:
            noted_at = chain.num_lines
    if not chain.mistakes and (mistake := _missing(chain, last_hash, noted_at, num_lines)):
        chain.mistakes.append(mistake)
    return chain


def _missing(chain: Chain, last_hash: str | None, noted_at: int, num_lines: int | None) -> str | None:
    """Say what an unbroken chain lacks of what was noted of it; `noted_at` is the line that has the hash, 0 if none has."""
    if num_lines is not None and chain.num_lines < num_lines:
        count = num_lines - chain.num_lines
        dropped = f"its last {count} lines were" if count > 1 else "its last line was"
        return f"the log has {chain.num_lines:,} of {num_lines:,} lines: {dropped} dropped"
    if last_hash is None or (last_hash == _FIRST and not num_lines):
        return None
    if not noted_at:
        return f"no line of the log ({chain.num_lines:,} lines) has the hash {last_hash}: its end was dropped"
    if num_lines is not None and noted_at != num_lines:
        return f"the hash {last_hash} is that of line {noted_at}, not of line {num_lines}: they were not noted together"
    return None


def _lines(files: Sequence[Path]) -> Iterator[tuple[Path, int, bytes]]:
    for path in files:
        try:
            with path.open("rb") as lines:
                for number, line in enumerate(lines, start=1):
                    yield path, number, line.removesuffix(b"\n")
        except OSError as error:
            raise UserError(f"the audit log {path} can't be read: {error.strerror}") from None
