"""Says which bytes of a model's files each rank of a run needs: python -m hippo_mpi.runtime.model_needs, for sync.

A JSON object on standard input asks, one on standard output answers. The command that syncs loads no MLX, and only a
model's own code tells which stored arrays a layer is made from: so this runs beside it, on its machine. Layers are
shared out by the planner that a run's rank 0 uses, over what the hosts' own Pythons say of themselves there
(`--introduce`): memory and speed as their ranks would say. As these change, sync names the split at its end.
"""

from __future__ import annotations

import fnmatch
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hippo_mpi.checkpoint.checkpoint import Checkpoint, ModelSource, open_checkpoint
from hippo_mpi.checkpoint.hub import find_model
from hippo_mpi.config.bundled import BUNDLED_MODELS
from hippo_mpi.errors import ForeignError, HippoError, ModelError, print_error
from hippo_mpi.planning.layer_split import check_layer_split, plan_split
from hippo_mpi.planning.machine import available_bytes, measured_speeds
from hippo_mpi.planning.model_costs import model_info
from hippo_mpi.runtime.agreement import Introduction, machines_of
from hippo_mpi.sharding.slot_caches import KVSettings
from hippo_mpi.views.spans import Span, header_bytes, merged, spans_of
from hippo_mpi.views.view import NOTE, SMALL_FILES, note_of, sample_of_files


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked.

    Args:
        model, revision, precision, trust_remote_code, layer_split, max_context: options of a run.
        whole: whether every rank is to have all of the model.
        is_adapter: whether the model is an adapter's folder: all of it is needed, and at that path.
        ranks: host of each; if its layers are to be planned, with what it says of itself, and the hostfile of its speed.
    """

    model: str
    revision: str | None
    precision: str | None
    trust_remote_code: bool
    layer_split: list[int] | None
    max_context: int | None
    whole: bool
    ranks: list[dict[str, Any]]
    is_adapter: bool = False


def answer(question: Question) -> dict[str, Any]:
    """Return where a model's files are, how big they are, and which spans of them each rank needs.

    Raises:
        HippoError: there is no such model, or it doesn't fit.
    """
    if question.is_adapter:
        return _answer_adapter(question)
    folder = find_model(question.model, question.revision)
    if folder.parent == BUNDLED_MODELS and question.model == folder.name:
        raise ModelError(f"{question.model} comes with hippo_mpi: every host has it")
    files = sorted(folder.glob("model*.safetensors"))
    if not folder.is_dir() or not files:
        raise ModelError(f"{folder} has no model*.safetensors")
    sizes = {file.name: file.stat().st_size for file in files}
    heads = {file.name: _head_bytes(file) for file in files}
    needs, counts = _everything(sizes, question), None
    if not question.whole:
        source = ModelSource(folder, trust_remote_code=question.trust_remote_code, precision=question.precision)
        checkpoint = open_checkpoint(source)
        counts = _counts(checkpoint, question)
        needs = [_needs(checkpoint, sum(counts[:rank]), count, heads) for rank, count in enumerate(counts)]
    note = note_of(folder)
    model = {
        "model": question.model, "sizes": sizes, "repo": note.get("repo", ""),
        "revision": (question.revision or "main") if note.get("repo") else "",
        "commit": note.get("commit") or sample_of_files(folder),
        "origin": "" if note.get("repo") else note.get("origin") or os.path.abspath(folder),
    }  # fmt: skip
    small = [path.name for path in folder.iterdir() if path.is_file() and path.name != NOTE and _is_small(path.name)]
    return {
        "folder": str(folder.absolute()), "files": model, "heads": heads, "small": sorted(small), "counts": counts,
        "needs": needs,
    }  # fmt: skip


def _answer_adapter(question: Question) -> dict[str, Any]:
    folder = Path(os.path.abspath(os.path.expanduser(question.model)))
    files = sorted(folder.glob("*.safetensors"))  # also those of earlier steps: ranks compare all that is there
    for name in ("adapters.safetensors", "adapter_config.json"):
        if not (folder / name).is_file():
            raise ModelError(f"--adapter-path {question.model} has no {name}")
    sizes = {file.name: file.stat().st_size for file in files}
    model = {
        "model": question.model, "sizes": sizes, "commit": sample_of_files(folder), "origin": str(folder),
        "link": question.model,
    }  # fmt: skip
    return {
        "folder": str(folder), "files": model, "heads": {file.name: _head_bytes(file) for file in files},
        "small": ["adapter_config.json"], "counts": None, "needs": _everything(sizes, question),
    }  # fmt: skip


def _everything(sizes: dict[str, int], question: Question) -> list[dict[str, list[Span]]]:
    return [{name: [(0, size)] for name, size in sizes.items()} for _ in question.ranks]


def _is_small(name: str) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in SMALL_FILES)


def _head_bytes(file: Path) -> int:
    with file.open("rb") as stream:
        return header_bytes(stream.read(8))


def _counts(checkpoint: Checkpoint, question: Question) -> list[int]:
    info = model_info(checkpoint, KVSettings())
    if question.layer_split is not None:
        check_layer_split(info, len(question.ranks), question.layer_split)
        return question.layer_split
    machines = machines_of([_introduction(**one) for one in question.ranks])
    return plan_split(info, machines, question.max_context).counts


def _introduction(
    host: str, memory_bytes: int, bytes_per_s: float, flops_per_s: float, given_speed: float | None = None
) -> Introduction:
    speed, is_measured = given_speed or bytes_per_s, given_speed is None
    return Introduction(host, {}, {}, memory_bytes, speed, is_measured, flops_per_s / bytes_per_s)


def _needs(checkpoint: Checkpoint, start: int, count: int, heads: dict[str, int]) -> dict[str, list[Span]]:
    """Return the spans that layers [start, start + count) come from, and the heads of all files, which every rank reads."""
    arrays = checkpoint.stage_arrays(start, start + count)
    folder = checkpoint.source.path
    return {
        name: merged([(0, size), *(spans_of(folder / name, arrays[name]) if name in arrays else ())])
        for name, size in heads.items()
    }


def main() -> None:
    """Answer once; ends the process."""
    try:
        if sys.argv[1:] == ["--introduce"]:
            found: dict[str, Any] = {"memory_bytes": available_bytes(), **asdict(measured_speeds())}
        else:
            found = answer(Question(**json.load(sys.stdin)))
        print(json.dumps(found))
    except HippoError as error:
        print_error(str(error))
        sys.exit(error.exit_code)
    except Exception as error:
        print_error(str(ForeignError.caused_by(error)))
        sys.exit(ForeignError.exit_code)


if __name__ == "__main__":
    main()
