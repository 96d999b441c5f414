"""Weight files of which only some bytes are on this machine: the spans that are, and those that weights need.

A span is [start, stop), in bytes of a file. Beside a stand-in, NAME.spans lists what it has of the real file, and
NAME.sums the SHA-256 of every piece that has arrived, by which damage is found.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

Span = tuple[int, int]
MAX_HEADER_BYTES = 100 << 20
"""Of a safetensors file, as its own library has it."""


def header_bytes(beginning: bytes) -> int:
    """Return how long the head of a safetensors file is, by its first 8 bytes.

    Raises:
        ValueError: it is no such file.
    """
    size = int.from_bytes(beginning[:8], "little")
    if len(beginning) < 8 or not 0 < size <= MAX_HEADER_BYTES:
        raise ValueError(f"invalid header size of {size:,} bytes")
    return 8 + size


def header_of(head: bytes) -> dict[str, dict[str, Any]]:
    """Return what the head of a safetensors file says of each array.

    Raises:
        ValueError: it is no such file.
    """
    header = json.loads(head[8 : header_bytes(head)])
    header.pop("__metadata__", None)
    return header  # type: ignore[no-any-return]


def spans_of(file: Path, names: Iterable[str]) -> list[Span]:
    """Return where some arrays of a safetensors file are."""
    with file.open("rb") as stream:
        head = stream.read(8)
        head += stream.read(header_bytes(head) - 8)
    header = header_of(head)
    offsets = (header[name]["data_offsets"] for name in names)
    return merged((len(head) + start, len(head) + stop) for start, stop in offsets)


def merged(spans: Iterable[Span]) -> list[Span]:
    """Return the same bytes as few spans, in order."""
    found: list[Span] = []
    for start, stop in sorted(span for span in spans if span[0] < span[1]):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(stop, found[-1][1])
        else:
            found.append((start, stop))
    return found


def without(spans: Iterable[Span], others: Iterable[Span]) -> list[Span]:
    """Return the bytes of `spans` that aren't in `others`."""
    left = merged(spans)
    for start, stop in others:
        left = [
            piece
            for one, end in left
            for piece in ((one, min(end, start)), (max(one, stop), end))
            if piece[0] < piece[1]
        ]
    return merged(left)


def num_bytes(spans: Iterable[Span]) -> int:
    """Return how many bytes are in spans that don't overlap."""
    return sum(stop - start for start, stop in spans)


def pieces(spans: Sequence[Span], most_bytes: int) -> Iterator[Span]:
    """Return the spans, cut into pieces of at most so many bytes."""
    for start, stop in spans:
        for first in range(start, stop, most_bytes):
            yield first, min(first + most_bytes, stop)


def spans_here(file: Path) -> list[Span]:
    """Return what a stand-in has of the real file."""
    try:
        return merged((int(start), int(stop)) for start, stop in json.loads(_record(file).read_text()))
    except (OSError, ValueError, TypeError, OverflowError, RecursionError):
        return []


def write_here(file: Path, start: int, data: bytes | bytearray, digest: str = "") -> None:
    """Put bytes of the real file into its stand-in, and record them, and their digest, once they are on the disk.

    Args:
        file: the stand-in.
        start: where they are in the real file.
        data: the bytes.
        digest: their SHA-256, if it is known.

    Raises:
        OSError: they can't be written; what was recorded before still holds.
    """
    descriptor = os.open(file, os.O_WRONLY)
    try:
        left = memoryview(data)
        while left:
            written = os.pwrite(descriptor, left, start + len(data) - len(left))
            left = left[written:]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    span = start, start + len(data)
    with _locked(file):
        with _sums(file).open("a") as stream:
            stream.write(f"{span[0]} {span[1]} {digest or hashlib.sha256(data).hexdigest()}\n")
        _replace(_record(file), json.dumps(merged([*spans_here(file), span])))


def read_span(file: Path, span: Span) -> bytearray:
    """Return the bytes of a span.

    Raises:
        OSError: they can't be read, or the file ends before.
    """
    data = bytearray(span[1] - span[0])
    with file.open("rb", buffering=0) as stream:
        stream.seek(span[0])
        left = memoryview(data)
        while left:
            if not (count := stream.readinto(left)):
                raise OSError(errno.EIO, f"{file.name} ends before byte {span[1]:,}")
            left = left[count:]
    return data


def recorded(file: Path) -> dict[Span, str]:
    """Return the digests of what a stand-in has, by the spans in which it arrived."""
    try:
        lines = _sums(file).read_text().splitlines()
    except (OSError, ValueError):
        return {}
    found = {}
    for line in lines:
        with contextlib.suppress(ValueError):  # a line that a power cut has left
            start, stop, digest = line.split()
            found[int(start), int(stop)] = digest
    here = spans_here(file)
    return {span: digest for span, digest in found.items() if not without([span], here)}


def forget_damaged(
    file: Path, within: Span | None = None, on_progress: Callable[[int], None] = lambda num_bytes: None
) -> list[Span]:
    """Look whether what a stand-in has is as it arrived; record that it doesn't have what isn't, and return that.

    Args:
        file: the stand-in.
        within: only pieces that overlap this; None: all.
        on_progress: called with the size of each piece that was looked at.

    Raises:
        OSError: it can't be read or written.
    """
    found = []
    for span, digest in recorded(file).items():
        if within is None or (span[0] < within[1] and within[0] < span[1]):
            if hashlib.sha256(read_span(file, span)).hexdigest() != digest:
                found.append(span)
            on_progress(span[1] - span[0])
    if found:
        forget(file, merged(found))
    return merged(found)


def forget(file: Path, spans: Sequence[Span]) -> None:
    """Record that a stand-in doesn't have these bytes.

    Raises:
        OSError: it can't be written.
    """
    with _locked(file):
        kept = {span: digest for span, digest in recorded(file).items() if without([span], spans) == [span]}
        _replace(_record(file), json.dumps(without(spans_here(file), spans)))
        _replace(_sums(file), "".join(f"{start} {stop} {digest}\n" for (start, stop), digest in kept.items()))


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _sums(file: Path) -> Path:
    return file.with_name(f"{file.name}.sums")


def _record(file: Path) -> Path:
    return file.with_name(f"{file.name}.spans")


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Keep other threads, and other ranks of this host, from changing a record at the same time."""
    with file.with_name(f"{file.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
