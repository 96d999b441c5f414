"""Weight files of which only some bytes are on this machine: the spans that are, and those that weights need.

A span is [start, stop), in bytes of a file. Beside a stand-in, NAME.spans lists what it has of the real file.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Sequence
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
    except (OSError, ValueError, TypeError):
        return []


def write_here(file: Path, start: int, data: bytes) -> None:
    """Put bytes of the real file into its stand-in, and record them once they are on the disk."""
    descriptor = os.open(file, os.O_WRONLY)
    try:
        view = memoryview(data)
        while view:
            written = os.pwrite(descriptor, view, start + len(data) - len(view))
            view = view[written:]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    with _locked(file):
        known = merged([*spans_here(file), (start, start + len(data))])
        temporary = _record(file).with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(known))
        os.replace(temporary, _record(file))


def _record(file: Path) -> Path:
    return file.with_name(f"{file.name}.spans")


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Keep other threads, and other ranks of this host, from changing a record at the same time."""
    with file.with_name(f"{file.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
