"""The hash chain of an audit log and its anchor, written and checked with a key.

Every line has the SHA-256 of the line before, and a MAC (HMAC-SHA256) of its own. The anchor, a small file beside the
log, has the number of lines and the hash of the last one, with a MAC, too. So without the key no line can be changed,
dropped, added or moved, not even the last ones.

Logs of older versions had no key: their lines are chained by hashes alone. The first line with a MAC that follows seals
them, since its MAC covers its own number, which tells theirs, and the hash of their last line; until it is written, the
anchor does so. Where there is a key, lines without a MAC that nothing seals are mistakes.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hippo_mpi.durable_files import sync_folder
from hippo_mpi.errors import UserError
from hippo_mpi.units import count_of

FIRST = "0" * 64
"""The previous hash of a log's very first line."""
_ANCHOR_BYTES = 512  # one disk sector, which is written completely or not at all
_BROKEN = "doesn't follow the previous line: a line was changed, dropped or moved"
_SEALED = re.compile(rb'(.*), "mac": "([0-9a-f]{64})"\}', re.DOTALL)


class ChainKey:
    """The secret key of a log.

    Lines, anchors and texts have MACs of different kinds, so that the MAC of one can't stand in for another's.
    """

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def text_digest(self, text: str) -> str:
        """Return the digest that stands for a text; without the key, short texts can't be found by trying."""
        return self._mac(b"text", text.encode("utf-8", "surrogatepass"))

    def sealed(self, fields: dict[str, Any], kind: bytes = b"line") -> bytes:
        """Return a JSON object with its MAC as the last field."""
        body = json.dumps(fields).encode()
        return body[:-1] + b', "mac": "%s"}' % self._mac(kind, body).encode()

    def is_sealed(self, line: bytes, kind: bytes = b"line") -> bool:
        """Return whether a JSON object has the MAC that belongs to it."""
        match = _SEALED.fullmatch(line)
        return bool(match) and hmac.compare_digest(match[2].decode(), self._mac(kind, match[1] + b"}"))  # type: ignore[index]

    def _mac(self, kind: bytes, data: bytes) -> str:
        return hmac.new(self._secret, kind + b"\0" + data, hashlib.sha256).hexdigest()


def key_path_of(log: Path) -> Path:
    """Return the default path of a log's key, which is beside it; `log` may be one of its older files."""
    return log.with_name(f"{re.sub(r'[.][0-9]+$', '', log.name)}.key")


def read_key(path: Path) -> ChainKey | None:
    """Read a key; None if the file doesn't exist.

    Raises:
        UserError: it can't be read, or isn't a key.
    """
    try:
        text = path.read_text().strip()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the audit log's key {path} can't be read: {error}") from None
    if not re.fullmatch("[0-9a-f]{64}", text):
        raise UserError(f"{path} is not an audit log's key: expected 64 hexadecimal digits")
    return ChainKey(bytes.fromhex(text))


def make_key(path: Path) -> ChainKey:
    """Create a key file that only this user may read.

    Raises:
        OSError: it can't be written, or exists already.
    """
    secret = secrets.token_bytes(32)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.write(descriptor, secret.hex().encode() + b"\n")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    sync_folder(path.parent)
    return ChainKey(secret)


@dataclass(frozen=True)
class Anchor:
    """The end of a log.

    Args:
        num_lines: of all its files.
        last_hash: of the last line.
        file: number that the current file has, or will have when it is set aside.
        start: offset of the last line in it, in bytes.
        end: offset of the last line's end, in bytes.
    """

    num_lines: int = 0
    last_hash: str = FIRST
    file: int = 1
    start: int = 0
    end: int = 0

    def followed_by(self, line: bytes) -> Anchor:
        """Return the end after another line, given without its newline."""
        end = self.end + len(line) + 1
        return Anchor(self.num_lines + 1, hash_of(line), self.file, self.end, end)

    def written(self, key: ChainKey) -> bytes:
        """Return the content of an anchor file."""
        return key.sealed(asdict(self), b"anchor").ljust(_ANCHOR_BYTES - 1) + b"\n"


def anchor_path_of(log: Path) -> Path:
    """Return the path of a log's anchor."""
    return log.with_name(f"{log.name}.anchor")


def read_anchor(log: Path, key: ChainKey) -> Anchor | None:
    """Read a log's anchor; None if it is missing or incomplete.

    Raises:
        UserError: it can't be read, or was made with another key.
    """
    path = anchor_path_of(log)
    try:
        data = path.read_bytes().strip()
        fields = json.loads(data)
        del fields["mac"]
        anchor = Anchor(**fields)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    except OSError as error:
        raise UserError(f"the audit log's anchor {path} can't be read: {error.strerror}") from None
    if not key.is_sealed(data, b"anchor"):
        raise UserError(f"{path} was changed, or written with a different key")
    return anchor


def hash_of(line: bytes) -> str:
    """Return the SHA-256 of a line without its newline, in hexadecimal."""
    return hashlib.sha256(line).hexdigest()


def numbers_of(log: Path) -> list[int]:
    """Return the numbers of a log's older files that exist, oldest first."""
    names = (path.name.removeprefix(f"{log.name}.") for path in log.parent.glob(f"{_escaped(log.name)}.*"))
    return sorted(int(name) for name in names if name.isdecimal() and name.isascii())


def _escaped(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)


def files_of(log: Path, since: int = 1) -> list[Path]:
    """Return the files of a log that exist, oldest first, from number `since` on."""
    older = [log.with_name(f"{log.name}.{number}") for number in numbers_of(log) if number >= since]
    return [*older, *([log] if log.exists() else [])]


def lines_of(path: Path, start: int = 0) -> Iterator[bytes]:
    """Yield the lines of a file, each with its newline, from byte `start` on.

    Raises:
        UserError: it can't be read.
    """
    try:
        with path.open("rb") as stream:
            stream.seek(start)
            yield from stream
    except OSError as error:
        raise UserError(f"the audit log {path} can't be read: {error.strerror}") from None


@dataclass
class Chain:
    """The state of reading a log line by line: what was read so far, the log's own notes, and its mistakes.

    Args:
        key: of the log; None: lines with MACs are mistakes.
    """

    key: ChainKey | None
    num_lines: int = 0
    last_hash: str = FIRST
    num_before: int | None = 0  # lines in older files that aren't here; None: an unknown number
    num_unkeyed: int = 0
    is_keyed: bool = False  # whether any line has a MAC
    is_astray: bool = False  # the last line isn't the original: its hash, and so what has to follow, is unknown
    last_gap: int = 0  # number of the last line that notes that lines before it may have been dropped
    noted_at: int = 0  # number of the line whose hash was given to `read_chain`
    last_bytes: int = 0  # length of the last line, with its newline
    torn_bytes: int = 0  # of an incomplete line behind it
    mistakes: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def take(self, path: Path, number: int, line: bytes, is_first: bool = False) -> bool:
        """Check the next line; return True if nothing is wrong with it.

        Args:
            path: of its file.
            number: of the line in that file, from 1.
            line: without its newline.
            is_first: whether it is the first line of all files that exist.
        """
        mistake = self._mistake_of(path, number, line, is_first)
        self.is_astray = mistake not in (None, _BROKEN)
        self.num_lines, self.last_hash, self.last_bytes = self.num_lines + 1, hash_of(line), len(line) + 1
        if mistake:
            self.mistakes.append(f"{path}, line {number} {mistake}")
        return not mistake

    def _mistake_of(self, path: Path, number: int, line: bytes, is_first: bool) -> str | None:
        try:
            fields = json.loads(line)
            previous = fields["previous"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return "is not a line of an audit log"
        if "mac" not in fields:
            if self.is_keyed:
                return "has no MAC: it was added"
            self.num_unkeyed += 1
            if is_first and previous != FIRST and path.suffix[1:].isdecimal() and path.suffix != ".1":
                self.num_before, self.last_hash = None, previous
        else:
            if mistake := self._mistake_of_mac(number, line, fields):
                return mistake
            if is_first and fields["line"] > 1:
                self.num_before = self.num_lines = fields["line"] - 1
                self.last_hash = previous
            elif self.num_before is None:  # the first line with a MAC tells
                self.num_lines = fields["line"] - 1
                self.num_before = self.num_lines - self.num_unkeyed
            if "note" in fields:
                self.notes.append(f"line {fields['line']:,}: {fields['note']}")
                self.last_gap = fields["line"] if "gap" in fields else self.last_gap
        return None if previous == self.last_hash or self.is_astray else _BROKEN

    def _mistake_of_mac(self, number: int, line: bytes, fields: dict[str, Any]) -> str | None:
        was_keyed, self.is_keyed = self.is_keyed, True
        if self.key is None:  # a mistake of the first line with a MAC only
            return None if was_keyed else "can't be checked without the key (--audit-key)"
        if not self.key.is_sealed(line):
            return "was changed, or written with a different key"
        if ("file" in fields) != (number == 1):
            return (
                "is not where it was written: earlier lines were dropped"
                if number == 1
                else "belongs at the start of a file"
            )
        return None


def read_chain(
    files: list[Path],
    key: ChainKey | None = None,
    anchor: Anchor | None = None,
    last_hash: str | None = None,
    num_lines: int | None = None,
) -> Chain:
    """Check every line of a log and, if an earlier end is known, that nothing up to there is missing.

    Args:
        files: oldest first.
        key: of the log; None: it has none.
        anchor: the end that the log's own anchor has.
        last_hash: of the last line at an earlier time, as somebody noted it.
        num_lines: of all files at that time; later lines are no mistake.

    Raises:
        UserError: a file can't be read.
    """
    chain = Chain(key)
    for path in files:
        for number, line in enumerate(lines_of(path), start=1):
            if not line.endswith(b"\n") and path == files[-1]:
                chain.torn_bytes = len(line)
                break
            chain.take(path, number, line.removesuffix(b"\n"), path == files[0] and number == 1)
            if chain.last_hash == last_hash:
                chain.noted_at = chain.num_lines
            is_same = not anchor or chain.num_lines != anchor.num_lines or chain.last_hash == anchor.last_hash
            if not is_same and not chain.mistakes:
                chain.mistakes.append(f"{path}, line {number} is not the one that the anchor records")
    if not chain.mistakes and (mistake := _missing(chain, anchor, last_hash, num_lines)):
        chain.mistakes.append(mistake)
    return chain


def _missing(chain: Chain, anchor: Anchor | None, last_hash: str | None, num_lines: int | None) -> str | None:
    """Return what an unbroken chain lacks: lines that the anchor or a note has, or a seal; None: nothing."""
    for wanted in (anchor.num_lines if anchor else 0, num_lines or 0):
        if chain.num_lines < wanted:
            return _dropped(chain, wanted)
    is_sealed = chain.is_keyed or (anchor is not None and chain.num_lines == anchor.num_lines)
    if chain.key and chain.num_unkeyed and not is_sealed:
        return (
            f"none of the log's {count_of(chain.num_unkeyed, 'line')} has a MAC, although there is a key: they were rewritten"
            " without it, or are older (then verify them together with the next file)"
        )
    if last_hash is None or (last_hash == FIRST and not num_lines):
        return None
    if not chain.noted_at:
        return f"no line of the log ({chain.num_lines:,} lines) has the hash {last_hash}: its end was dropped"
    if num_lines is not None and chain.noted_at != num_lines:
        return f"the hash {last_hash} is that of line {chain.noted_at}, not of line {num_lines}: they don't belong together"
    return None


def _dropped(chain: Chain, wanted: int) -> str:
    has = f"the log has {chain.num_lines:,} of {wanted:,} lines"
    if chain.torn_bytes:
        return f"{has}, and {chain.torn_bytes:,} bytes of the next: the rest was cut off"
    count = wanted - chain.num_lines
    return f"{has}: {f'its last {count} lines were' if count > 1 else 'its last line was'} dropped"
