"""Downloads models from the Hugging Face hub: small files at once, and only the weights that a rank needs.

A plan needs the model's structure before it is decided which rank needs what. So a repo becomes a folder, a *view*, in
which missing weight files are represented by stand-ins: the real header, fetched alone, and a hole where the data would
be. mlx-lm opens such a folder like any other, because it reads weights only when they are used.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download, snapshot_download, try_to_load_from_cache
from tqdm import tqdm

from hippo_mpi.checkpoint.hub_errors import explain
from hippo_mpi.checkpoint.hub_spans import NoRangesError, fetch_head, fetch_spans
from hippo_mpi.config.bundled import BUNDLED_MODELS, BUNDLED_NAMES
from hippo_mpi.errors import ModelError
from hippo_mpi.units import show_bytes
from hippo_mpi.views.spans import Span, num_bytes, spans_here, spans_of, without, write_here
from hippo_mpi.views.view import (
    LAYOUT,
    NOTE,
    SMALL_FILES,
    is_usable,
    is_view,
    note_of,
    put_view,
    remove_view,
    synced_view,
    view_of_repo,
)

_FILES_OF_A_PLAN = [
    "config.json",
    "generation_config.json",
    "hf_quant_config.json",
    "model.safetensors.index.json",
    "*.py",
]
_HEADERS_AT_ONCE = 16  # concurrent requests for headers
_WHOLE = 0.9  # of a file's bytes: whoever needs more gets the whole file


def find_model(
    model: str, revision: str | None, on_progress: Callable[[], None] = lambda: None, is_for_plan: bool = False
) -> Path:
    """Return the folder of a model: a local one, a bundled one by its name, or the view of another host's or of a repo.

    Args:
        model: its path or repo, or the name of a bundled one, as hippo_mpi.models lists them.
        revision: of the repo.
        on_progress: called for every piece that arrives.
        is_for_plan: whether only the files of a repo that a plan needs are downloaded.

    Raises:
        ModelError: there is no such model.
    """
    path = Path(os.path.expanduser(model))
    if os.path.exists(path):  # what is too long for a name, too, is no folder
        return path
    if model in BUNDLED_NAMES:
        return BUNDLED_MODELS / model
    if view := synced_view(model):
        return view
    if "/" not in model:
        raise ModelError(f"no such model folder: {model}; bundled models: {', '.join(BUNDLED_NAMES) or 'none'}")
    if model.startswith(("/", "./", "../", "~")) or model.count("/") != 1:
        raise ModelError(f"no such model folder: {model}")
    return open_repo(model, revision, on_progress, is_for_plan)


def open_repo(repo: str, revision: str | None, on_progress: Callable[[], None], is_for_plan: bool = False) -> Path:
    """Return the view of a repo: its small files, and its weight files, real ones or stand-ins.

    Args:
        repo: its name on the hub.
        revision: of the repo; None: the default branch.
        on_progress: called for every piece that arrives.
        is_for_plan: whether only the files that a plan needs are downloaded.

    Raises:
        ModelError: the hub has no such repo or can't be reached, and the cache doesn't have it either.
    """
    try:
        patterns = _FILES_OF_A_PLAN if is_for_plan else [*SMALL_FILES]
        small: Any = {"allow_patterns": patterns, "tqdm_class": ticker(on_progress)}
        snapshot = Path(snapshot_download(repo, revision=revision, **small))
        view = view_of_repo(repo, snapshot.name)
        if is_view(view) and not is_usable(view):
            remove_view(view)
        if not is_view(view):
            _make_view(view, repo, snapshot, on_progress)
        _link_small_files(view, snapshot)
    except ModelError:
        raise
    except Exception as error:  # the hub's client raises its own errors and those of two HTTP libraries
        raise explain(error, repo, revision) from error
    return view


def downloaded_share(folder: Path) -> float:
    """Return the share of a model's weight bytes that is on this machine: 1.0 for an ordinary folder."""
    files = list(folder.glob("*.safetensors"))
    total = sum(file.stat().st_size for file in files)
    is_whole = not is_view(folder)
    here = sum(file.stat().st_size if is_whole or file.is_symlink() else num_bytes(spans_here(file)) for file in files)
    return here / total if total else 0.0


def fetch(folder: Path, needed: Mapping[str, Iterable[str]], on_progress: Callable[[], None]) -> None:
    """Download what is missing of arrays into a view: their bytes, or whole files that consist of little else.

    Args:
        folder: the view.
        needed: names of stored arrays, by their files.
        on_progress: called for every piece that arrives.

    Raises:
        ModelError: a download fails, or the view is of a folder of another host.
    """
    note = note_of(folder)
    for name, arrays in sorted(needed.items()):
        file = folder / name
        if file.is_symlink():
            continue
        missing = without(spans_of(file, arrays), spans_here(file))
        if not note.get("repo"):
            _check_is_here(folder, missing)
            continue
        repo, commit = str(note["repo"]), str(note["commit"])
        try:
            with contextlib.suppress(NoRangesError):
                if num_bytes(missing) < _WHOLE * file.stat().st_size:
                    fetch_spans(repo, commit, file, missing, on_progress)
                    continue
            path = hf_hub_download(repo, name, revision=commit, tqdm_class=ticker(on_progress))
        except Exception as error:
            raise explain(error, repo, commit) from error
        on_progress()
        _link(file, Path(path))


def _check_is_here(view: Path, missing: Sequence[Span]) -> None:
    if missing:
        origin = note_of(view).get("origin", view)
        raise ModelError(
            f"{show_bytes(num_bytes(missing))} of this rank's layers of {origin} aren't on this host: run"
            f" hippo_mpi.cluster sync {origin} with the same hostfile and --layer-split as this run, or with --whole"
        )


def ticker(on_progress: Callable[[], None]) -> type[tqdm]:  # type: ignore[type-arg]
    """Return a silent progress bar that calls `on_progress` for every piece that arrives."""

    class Ticker(tqdm):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            on_progress()
            return super().update(n)

    return Ticker


def _make_view(view: Path, repo: str, snapshot: Path, on_progress: Callable[[], None]) -> None:
    view.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=view.parent))  # ranks of one host may do this at the same time
    try:
        with ThreadPoolExecutor(_HEADERS_AT_ONCE) as pool:
            made = [
                pool.submit(_make_weight_file, folder / name, repo, snapshot) for name in _weight_files(repo, snapshot)
            ]
            for one in as_completed(made):
                one.result()
                on_progress()
        (folder / NOTE).write_text(json.dumps({"repo": repo, "commit": snapshot.name, "layout": LAYOUT}))
        put_view(folder, view)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _link_small_files(view: Path, snapshot: Path) -> None:
    """Link small files that were downloaded after the view was made, as a view for a plan has fewer of them."""
    for path in snapshot.iterdir():
        if path.suffix != ".safetensors" and not (view / path.name).exists():
            with contextlib.suppress(FileExistsError):  # another rank was faster
                (view / path.name).symlink_to(path.resolve())


def _weight_files(repo: str, snapshot: Path) -> list[str]:
    index = snapshot / "model.safetensors.index.json"
    if index.exists():
        named = set(json.loads(index.read_text())["weight_map"].values())
        for name in named:
            if not isinstance(name, str) or Path(name).name != name:
                raise ModelError(f"the index of {repo} has an invalid file name: {name!r}")
        return sorted(named)
    if isinstance(try_to_load_from_cache(repo, "model.safetensors", revision=snapshot.name), str):
        return ["model.safetensors"]
    names = HfApi().list_repo_files(repo, revision=snapshot.name)
    return [name for name in names if name.startswith("model") and name.endswith(".safetensors")]


def _make_weight_file(path: Path, repo: str, snapshot: Path) -> None:
    """Link the real weight file if it is in the cache; otherwise make a stand-in."""
    cached = try_to_load_from_cache(repo, path.name, revision=snapshot.name)
    if isinstance(cached, str):
        path.symlink_to(Path(cached).resolve())
    else:
        _make_stand_in(path, repo, snapshot.name)


def _make_stand_in(path: Path, repo: str, commit: str) -> None:
    """Write a sparse file with the real one's head, and a hole in place of the data."""
    head, total = fetch_head(repo, commit, path.name)
    with path.open("wb") as stream:
        stream.truncate(total)
    write_here(path, 0, head)


def _link(place: Path, target: Path) -> None:
    temporary = place.with_suffix(f".{os.getpid()}")
    temporary.symlink_to(target.resolve())
    os.replace(temporary, place)
