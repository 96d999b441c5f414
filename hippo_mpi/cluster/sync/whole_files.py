"""Weight files of which every byte is on this host: what they hash to, and how one gives way. Loads no MLX."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from hippo_mpi.cluster.sync.frames import PIECE_BYTES
from hippo_mpi.views.spans import header_bytes, pieces, read_span


def digest_of_whole(file: Path, size: int, on_progress: Callable[[], None]) -> str:
    """Return the SHA-256 of a file, as the hub has it.

    Raises:
        OSError: it can't be read, or is shorter than `size` bytes.
    """
    digest = hashlib.sha256()
    for span in pieces([(0, size)], PIECE_BYTES):
        digest.update(read_span(file, span))
        on_progress()
    return digest.hexdigest()


def replace_by_stand_in(link: Path, size: int) -> None:
    """Put a stand-in that has nothing in the place of a link; until the right head is there, it shows the old one.

    Raises:
        OSError: it can't be written.
    """
    temporary = link.with_name(f"{link.name}.{os.getpid()}")
    with link.open("rb") as stream, temporary.open("wb") as new:
        head = stream.read(8)
        with contextlib.suppress(ValueError):
            head += stream.read(header_bytes(head) - 8)
        new.write(head)
        new.truncate(size)
    os.replace(temporary, link)
