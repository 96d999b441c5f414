"""Reads pieces and SHA-256 of a repo's files from the hub: python -m hippo_mpi.checkpoint.hub_place, for sync.

Loads no MLX. It speaks as cluster/sync/place.py does, and keeps nothing; but if the hub sends whole files only, they
stay in its cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

from hippo_mpi.checkpoint.hub import ticker
from hippo_mpi.checkpoint.hub_errors import explain
from hippo_mpi.checkpoint.hub_spans import NoRangesError, read_all
from hippo_mpi.cluster.sync.frames import MARK, FrameError, Frames
from hippo_mpi.cluster.sync.model_files import ModelFiles, check_name
from hippo_mpi.errors import HippoError
from hippo_mpi.views.spans import Span, read_span

_SILENCE_S = 600.0  # without a word, after which whoever asks counts as gone
_TOLD_EVERY_S = 1.0
_AT_ONCE = 8
_SHA256 = re.compile(r"[0-9a-f]{64}")  # files in Git itself have another hash


def read_piece(model: ModelFiles, name: str, span: Span, on_progress: Callable[[], None]) -> bytes | bytearray:
    """Return bytes of a file.

    Raises:
        HippoError: the hub doesn't let us have them.
    """
    try:
        with contextlib.suppress(NoRangesError):
            return read_all(model.repo, model.commit, name, span, on_progress)
        path = hf_hub_download(model.repo, name, revision=model.commit, tqdm_class=ticker(on_progress))
        return read_span(Path(path), span)
    except Exception as error:  # the hub's client raises its own errors and those of two HTTP libraries
        raise explain(error, model.repo, model.commit) from error


def sums_of(model: ModelFiles, names: Sequence[str], on_progress: Callable[[], None]) -> dict[str, str]:
    """Return the hub's SHA-256 of files, as far as it has them.

    Raises:
        HippoError: it doesn't say.
    """

    def ask(name: str) -> str:
        return get_hf_file_metadata(hf_hub_url(model.repo, name, revision=model.commit)).etag or ""

    found = {}
    try:
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for name, etag in zip(names, pool.map(ask, names), strict=True):
                found[name] = etag
                on_progress()
    except Exception as error:  # see read_piece
        raise explain(error, model.repo, model.commit) from error
    return {name: etag for name, etag in found.items() if _SHA256.fullmatch(etag)}


def main() -> None:
    """Answer until the input ends; ends the process."""
    frames = Frames(0, os.dup(1), _SILENCE_S)
    os.dup2(2, 1)
    with contextlib.suppress(FrameError, KeyboardInterrupt):
        frames.write(MARK)
        errand, _ = frames.receive()
        model = ModelFiles.from_object(errand["model"])
        told_s, done = time.monotonic(), 0

        def tell() -> None:
            nonlocal told_s, done
            done += 1
            if time.monotonic() > told_s + _TOLD_EVERY_S:
                told_s = time.monotonic()
                frames.send({"goes_on": done})

        while True:
            asked, _ = frames.receive()
            try:
                if asked["op"] == "sums":
                    frames.send({"sums": sums_of(model, [check_name(name) for name in asked["names"]], tell)})
                    continue
                data = read_piece(model, check_name(asked["name"]), (asked["start"], asked["stop"]), tell)
                frames.send({"digest": hashlib.sha256(data).hexdigest()}, data)
            except HippoError as error:
                frames.send({"error": str(error)})


if __name__ == "__main__":
    main()
