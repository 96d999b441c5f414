"""Parts of a repo's weight files, by HTTP ranges: the head of a file, and the bytes of some of its arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from huggingface_hub import hf_hub_url
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # documented, but not marked as exported
    build_hf_headers,
    hf_raise_for_status,
    http_stream_backoff,
)

from hippo_mpi.errors import ModelError
from hippo_mpi.views.spans import Span, header_bytes, pieces, write_here

_HEAD_GUESS_BYTES = 100_000  # as much as nearly all heads have
_PIECE_BYTES = 16 << 20
_AT_ONCE = 4
_TRIES = 5
_TIMEOUT_S = 10.0  # without a byte


class NoRangesError(Exception):
    """The hub sends whole files only."""


def fetch_head(repo: str, commit: str, name: str) -> tuple[bytes, int]:
    """Return the head of a safetensors file, as it is, and the file's size.

    Raises:
        ModelError: it is no such file.
    """
    head, total = _read(repo, commit, name, (0, _HEAD_GUESS_BYTES), lambda: None)
    try:
        size = header_bytes(head)
    except ValueError as error:
        raise ModelError(f"{name} of {repo} is not a safetensors file: {error}") from None
    if size > len(head):
        head += _read(repo, commit, name, (len(head), size), lambda: None)[0]
    return head[:size], total


def fetch_spans(repo: str, commit: str, file: Path, spans: Sequence[Span], on_progress: Callable[[], None]) -> None:
    """Download spans of a file into its stand-in, some at once; what has arrived is kept if another fails.

    Raises:
        NoRangesError: the hub sends whole files only.
    """

    def fetch(span: Span) -> None:
        write_here(file, span[0], read_all(repo, commit, file.name, span, on_progress))
        on_progress()

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for _ in pool.map(fetch, pieces(spans, _PIECE_BYTES)):
            pass


def read_all(repo: str, commit: str, name: str, span: Span, on_progress: Callable[[], None]) -> bytes:
    """Return all bytes of a span, in as many requests as it takes.

    Raises:
        OSError: the connection ends again and again.
    """
    data = bytearray()
    for _ in range(_TRIES):
        data += _read(repo, commit, name, (span[0] + len(data), span[1]), on_progress)[0]
        if len(data) == span[1] - span[0]:
            return bytes(data)
    raise ConnectionError(f"{name} ended after {len(data):,} of {span[1] - span[0]:,} bytes")


def _read(repo: str, commit: str, name: str, span: Span, on_progress: Callable[[], None]) -> tuple[bytes, int]:
    """Return the bytes of a span, or the first of them, and the file's size."""
    start, stop = span
    headers = build_hf_headers() | {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    data = bytearray()
    with http_stream_backoff(
        "GET", hf_hub_url(repo, name, revision=commit), headers=headers, timeout=_TIMEOUT_S, follow_redirects=True
    ) as response:
        hf_raise_for_status(response)
        if response.status_code != 206 and start:
            raise NoRangesError
        if response.status_code == 206:
            total = int(response.headers["Content-Range"].rpartition("/")[2])
        else:
            total = int(response.headers["Content-Length"])
        for chunk in response.iter_bytes():
            data += chunk
            on_progress()
            if len(data) >= stop - start:
                break
    return bytes(data[: stop - start]), total
