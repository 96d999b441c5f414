"""Views: folders of models of which only some bytes are on this machine; where they are, and what they say of themselves.

A view of a hub's repo is made by the first rank that needs it, or by `hippo_mpi.cluster sync`; one of a folder of
another machine by sync alone. Loads no MLX.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hippo_mpi.views.spans import Span, spans_here

LAYOUT = 2
"""Of views: since 2, stand-ins have the real files' heads, byte for byte."""
NOTE = ".hippo-hub.json"
"""Marks a view; has its repo and commit, or its origin's path, and the content that is there instead of a commit."""
SMALL_FILES = ("*.json", "*.py", "tokenizer.model", "*.tiktoken", "*.txt", "*.jsonl", "*.jinja")
STAGED = ".staged-"
"""Begins the names of folders in which what isn't a view yet, or any more, is; sync removes those that a kill has left."""
_SAMPLES_PER_FILE, _SAMPLE_BYTES = 64, 1024
_LOCAL = "local--"
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]")


def views_folder() -> Path:
    """Return the folder of all views; the hub's own variables say where it is."""
    from huggingface_hub import constants  # which reads them when it is imported, as a host's are set only then

    return Path(constants.HF_HOME) / "hippo_mpi"


def view_of_repo(repo: str, commit: str) -> Path:
    """Return where the view of a repo is, or would be."""
    return views_folder() / f"{repo.replace('/', '--')}--{commit}"


def view_of_folder(origin: str, content: str) -> Path:
    """Return where the view of another machine's folder is, or would be.

    Args:
        origin: the folder's path there.
        content: its `sample_of_files`.
    """
    return views_folder() / f"{_LOCAL}{_UNSAFE.sub('-', Path(origin).name)}--{content[:16]}"


def is_view(folder: Path) -> bool:
    """Return whether a folder is a view."""
    return (folder / NOTE).exists()


def is_usable(view: Path) -> bool:
    """Return whether a view is as views are made now, and what it links to is still there."""
    return note_of(view).get("layout") == LAYOUT and all(
        path.exists() for path in view.iterdir() if path.is_symlink()
    )  # the hub's cache is cleaned


def note_of(view: Path) -> dict[str, Any]:
    """Return what a view says of itself: nothing if that can't be read, and a folder that is none."""
    try:
        note = json.loads((view / NOTE).read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return note if isinstance(note, dict) else {}


def remove_view(view: Path) -> None:
    """Remove a view: a kill in the middle leaves what the next sync removes, and nothing at its path."""
    away = Path(tempfile.mkdtemp(prefix=STAGED, dir=view.parent))
    with contextlib.suppress(FileNotFoundError):  # another process was faster
        os.replace(view, away)
    shutil.rmtree(away, ignore_errors=True)


def put_view(made: Path, view: Path) -> None:
    """Let a finished folder be a view, unless another process was faster; what a kill has left of one gives way.

    Raises:
        OSError: something else is at its path.
    """
    folder = os.open(views_folder(), os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)  # or two ranks of a host would remove each other's
        if is_view(view):
            return
        if view.parent == views_folder() and view.is_dir():
            remove_view(view)
        os.rename(made, view)
    finally:
        os.close(folder)


def commit_of(folder: Path) -> str | None:
    """Return the commit of a view's repo, or the content of its origin; None for an ordinary folder."""
    commit = note_of(folder).get("commit")
    return None if commit is None else str(commit)


def synced_view(model: str) -> Path | None:
    """Return the newest view of another machine's folder that is called so there; None if there is none.

    Args:
        model: as it is typed: the folder's whole path, or what was typed for sync.
    """
    path, found = os.path.abspath(os.path.expanduser(model)), []
    for note in views_folder().glob(f"{_LOCAL}*/{NOTE}"):
        try:
            said = note_of(note.parent)
            if model in said["models"] or path == said["origin"]:
                found.append((note.stat().st_mtime_ns, note.parent))
        except (OSError, KeyError, TypeError):
            continue
    return max(found)[1] if found else None


def content_here(folder: Path, sizes: Mapping[str, int]) -> dict[str, list[Span]]:
    """Return which bytes of a model's weight files a folder has: of an ordinary one, or by a link, whole files.

    Args:
        folder: a view, or an ordinary folder.
        sizes: of the real files, by name.
    """
    is_whole, found = not is_view(folder), {}
    for name, size in sizes.items():
        file = folder / name
        if file.exists() and file.stat().st_size == size:
            found[name] = [(0, size)] if is_whole or file.is_symlink() else spans_here(file)
    return found


def sample_of_files(folder: Path) -> str:
    """Return a hash over an adapter's configuration and pieces of every weight file.

    The structure alone doesn't distinguish fine-tunes of one model.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.glob("adapter_config.json")):
        digest.update(path.read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        with path.open("rb") as stream:
            for piece in range(_SAMPLES_PER_FILE):
                stream.seek(size * piece // _SAMPLES_PER_FILE)
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()
