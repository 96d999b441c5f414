"""A model as sync sees it: files, and where a host has them, or would. Loads no MLX."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hippo_mpi.errors import UserError
from hippo_mpi.views.spans import Span, merged
from hippo_mpi.views.view import sample_of_files, synced_view, view_of_folder, view_of_repo, views_folder

_MAX_BYTES = 1 << 50
_NAME = re.compile(r"(?![.-])[A-Za-z0-9 ._+=@,()-]{1,200}")
_REPO = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9._-]+")
_REVISION = re.compile(r"(?![./])[A-Za-z0-9._/-]{1,200}")
_HASH = re.compile(r"[0-9a-f]{16,64}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class ModelFiles:
    """Which model is meant, and its weight files.

    Args:
        model: as typed.
        commit: of its repo; of a folder, the sample of what its files hold.
        sizes: of the weight files, by name.
        repo: on the hub; empty: a folder of one machine.
        revision: of the repo, as typed, or the hub's default.
        origin: the folder's path on the machine that it comes from.
        link: of an adapter, the path at which every rank opens it.
    """

    model: str
    commit: str
    sizes: Mapping[str, int]
    repo: str = ""
    revision: str = ""
    origin: str = ""
    link: str = ""

    @classmethod
    def from_object(cls, fields: dict[str, Any]) -> ModelFiles:
        """Return what another process says.

        Raises:
            UserError: a name in it is no file's, or leads elsewhere.
        """
        found = cls(**fields)
        for name in found.sizes:
            check_name(name)
        texts = (found.model, found.commit, found.repo, found.revision, found.origin, found.link)
        sizes = found.sizes.values()
        if not all(isinstance(text, str) for text in texts) or not all(_is_offset(size) for size in sizes):
            raise UserError("files of a model that can't be read")
        parts = {*found.revision.split("/"), *found.repo.split("/")}
        is_repo = _REPO.fullmatch(found.repo) and _REVISION.fullmatch(found.revision)
        if not _HASH.fullmatch(found.commit) or (found.repo and (not is_repo or ".." in parts)):
            raise UserError(f"a model that is called {found.repo!a}, {found.revision!a}, {found.commit!a}")
        return found

    def as_object(self) -> dict[str, Any]:
        """Return it for JSON."""
        return asdict(self)

    def folder(self) -> Path:
        """Return the folder in which a rank of this machine looks for it, whether it is there or not.

        Raises:
            UserError: another model is at its path.
        """
        if self.repo:
            return view_of_repo(self.repo, self.commit)
        path, views = Path(os.path.expanduser(self.link or self.model)), os.path.realpath(views_folder())
        is_ours = bool(self.link) and path.is_symlink() and os.path.dirname(os.path.realpath(path)) == views
        is_taken = os.path.lexists(path) if self.link else os.path.exists(path)  # a link's disk may be away just now
        if is_taken and not is_ours:
            if not path.is_dir() or sample_of_files(path) != self.commit:
                what = "adapter" if self.link else "model"
                raise UserError(f"{path} there is another {what} than here: move it away, or make it the same")
            return path
        found = None if self.link else synced_view(self.model)
        is_same = found and found.name.endswith(f"--{self.commit[:16]}")
        return found if found and is_same else view_of_folder(self.origin, self.commit)


def check_name(name: Any) -> str:
    """Return the name of a file in a model's folder.

    Raises:
        UserError: it is none, or leads elsewhere.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UserError(f"{str(name)[:100]!a} is no name of a model's file")
    return name


def read_spans(found: Any, sizes: Mapping[str, int]) -> dict[str, list[Span]]:
    """Return the spans that another process says it has, or needs, of a model's files.

    Raises:
        UserError: they can't be read.
    """
    try:
        spans = {name: merged((start, stop) for start, stop in found[name]) for name in sizes if name in found}
    except (TypeError, ValueError):
        raise UserError("spans that can't be read") from None
    for name, some in spans.items():
        if not all(_is_offset(number) and number <= sizes[name] for span in some for number in span):
            raise UserError(f"spans of {name} that aren't in it")
    return spans


def read_sums(found: Any, names: Iterable[str]) -> dict[str, str]:
    """Return the SHA-256 that another process says of files; what is none is left out."""
    given = found if isinstance(found, dict) else {}
    return {name: given[name] for name in names if isinstance(given.get(name), str) and _SHA256.fullmatch(given[name])}


def _is_offset(number: Any) -> bool:
    return type(number) is int and 0 <= number <= _MAX_BYTES
