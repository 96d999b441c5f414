"""Checks and opens a checkpoint on disk (or on the hub) without reading a single weight.

mlx-lm does the loading. Its arrays are lazy, so every rank can open the whole model and find its structure, while only
the weights that the rank holds are ever evaluated, that is, read.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import load_adapters, load_config, load_model

from hippo_mpi.checkpoint.adapters import adapt
from hippo_mpi.checkpoint.blueprint import assumptions, build_from_config, has_weights
from hippo_mpi.checkpoint.hub import fetch, find_model
from hippo_mpi.checkpoint.model_errors import loading_errors, running_errors
from hippo_mpi.checkpoint.precision import convert
from hippo_mpi.config.options import DraftOptions, ModelOptions
from hippo_mpi.errors import ModelError
from hippo_mpi.tracing.dataflow import Dataflow
from hippo_mpi.tracing.graph import ancestors
from hippo_mpi.tracing.trace import trace
from hippo_mpi.views.view import commit_of, is_view, sample_of_files

_STEP_BYTES = 64 << 20  # of weights that are read at once


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from; the fields are mostly options of mlx_lm.generate.

    With `precision` None, weights stay as they are stored. With `needs_weights` False, for making only a plan, a folder
    with a config and no weights will do.
    """

    path: Path
    adapter_path: str | None = None
    trust_remote_code: bool = False
    precision: str | None = None
    needs_weights: bool = True

    @classmethod
    def from_options(
        cls, options: ModelOptions, needs_weights: bool = True, on_progress: Callable[[], None] = lambda: None
    ) -> ModelSource:
        """Return the source that --model and related options name; a hub model's small files are downloaded.

        Raises:
            ModelError: there is no such model.
        """
        path = find_model(options.model, options.revision, on_progress, not needs_weights)
        return cls(path, options.adapter_path, options.trust_remote_code, options.precision, needs_weights)

    @classmethod
    def of_draft(
        cls, options: ModelOptions, needs_weights: bool = True, on_progress: Callable[[], None] = lambda: None
    ) -> ModelSource | None:
        """Return the source that --draft-model names; None if it isn't given, or the command has no such option.

        Raises:
            ModelError: there is no such model.
        """
        name = options.draft_model if isinstance(options, DraftOptions) else None
        if not name:
            return None
        path = find_model(name, None, on_progress, not needs_weights)
        return cls(path, trust_remote_code=options.trust_remote_code, needs_weights=needs_weights)


@dataclass
class Checkpoint:
    """A checkpoint's structure: its dataflow, from `trace`, and the bytes of every weight."""

    source: ModelSource
    config: dict[str, Any]
    flow: Dataflow
    weight_bytes: dict[str, int]
    matrix_sizes: dict[str, int]  # elements of the weights that are multiplied with: also of quantised ones
    expert_share: dict[str, float]  # of weights stacked over experts: the share that one token reads
    assumptions: tuple[str, ...] = ()  # sentences that say what had to be assumed of a model without weights

    def digest(self) -> str:
        """Return a short hash of structure and weights (samples of them), equal on ranks that hold the same model."""
        config = {k: v for k, v in self.config.items() if not k.startswith("_")}
        content = commit_of(self.source.path) or sample_of_files(self.source.path)
        adapter = sample_of_files(Path(self.source.adapter_path)) if self.source.adapter_path else ""
        identity = [config, sorted(self.weight_bytes.items()), self.flow.digest(), content, adapter]
        return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:16]

    def stage_arrays(self, start: int, stop: int, shares_head: bool = False) -> dict[str, set[str]]:
        """Return the stored arrays, by file, that layers [start, stop) come from; with start 0, embedding and head too."""
        return _stored_arrays(self.source, self.flow.stage_weights(start, stop, shares_head))

    def stage_weights(self, start: int, stop: int) -> set[str]:
        """Return the names of the weights that layers [start, stop) need; with start 0, of embedding and head too."""
        return self.flow.stage_weights(start, stop)


def open_checkpoint(source: ModelSource) -> Checkpoint:
    """Check a checkpoint and find its structure.

    Raises:
        ModelError: something is missing, damaged or unknown; the message says what.
        ForeignError: the model's own code raises something when it is run.
    """
    with loading_errors(source.path):
        _check_files(source.path, source.needs_weights)
    model, config = open_lazily(source)
    weights = tree_flatten(model.parameters())
    sizes = {name: array.nbytes for name, array in weights}
    matrices = _matrix_sizes(model)
    shares = _expert_shares(config, {name: array.shape for name, array in weights})
    with running_errors(source.path):
        flow = trace(model)
    assumed = () if has_weights(source.path) else assumptions(source.path, config, source.precision)
    return Checkpoint(source, config, flow, sizes, matrices, shares, assumed)


def load_weights(
    checkpoint: Checkpoint,
    wanted: set[str],
    on_progress: Callable[[int], None] = lambda done_bytes: None,
    change: Callable[[nn.Module], None] = lambda model: None,
) -> nn.Module:
    """Load a model with some of its weights; every other weight is absent.

    From the hub, only these weights are downloaded.

    Absent weights are NaNs that take no memory: if one were ever used by mistake, the answer would show it.

    Args:
        checkpoint: the model's structure.
        wanted: names of weights.
        on_progress: called with the bytes read so far.
        change: called with the model before weights are read, as by cutting them; weights that get their name by it are
            wanted, too.

    Raises:
        ModelError: a file is missing, or can't be downloaded or read.
    """
    folder = checkpoint.source.path
    if not has_weights(folder):
        raise ModelError(f"{folder} has no model*.safetensors: it can be planned, but not run")
    if is_view(folder):
        fetch(folder, _stored_arrays(checkpoint.source, wanted), lambda: on_progress(0))
    model, _ = open_lazily(checkpoint.source)
    known = {name for name, _ in tree_flatten(model.parameters())}
    change(model)
    wanted = wanted | {name for name, _ in tree_flatten(model.parameters()) if name not in known}
    with loading_errors(folder, "can't be read"):
        hold_weights(model, wanted, on_progress)
    return model


def hold_weights(
    model: nn.Module, wanted: set[str], on_progress: Callable[[int], None] = lambda done_bytes: None
) -> None:
    """Read the weights `wanted` of a model, unless they have been read, and release every other one.

    Args:
        model: changed in place.
        wanted: names of weights.
        on_progress: called with the bytes read so far.
    """
    weights = dict(tree_flatten(model.parameters()))
    absent = {name: _absent(weight) for name, weight in weights.items() if name not in wanted}
    mx.eval(absent)
    model.update(tree_unflatten(list(absent.items())))
    del weights
    here = [(name, array) for name, array in tree_flatten(model.parameters()) if name in wanted]
    done_bytes, step, step_bytes = 0, [], 0
    for name, array in here:
        step.append(array)
        step_bytes += array.nbytes
        if step_bytes > _STEP_BYTES or name == here[-1][0]:
            mx.eval(step)
            done_bytes += step_bytes
            step, step_bytes = [], 0
            on_progress(done_bytes)


def _absent(weight: mx.array) -> mx.array:
    value = (
        mx.array(float("nan"), weight.dtype) if mx.issubdtype(weight.dtype, mx.floating) else mx.array(0, weight.dtype)
    )
    return mx.broadcast_to(value, weight.shape)


def _stored_arrays(source: ModelSource, wanted: set[str]) -> dict[str, set[str]]:
    """Return the stored arrays, by file, that weights come from, although mlx-lm renames, stacks and splits them."""
    stored: list[tuple[str, str]] = []
    arrays: list[mx.array] = []
    load = mx.load

    def noting_load(file: Any, *args: Any, **kwargs: Any) -> Any:
        loaded: Any = load(file, *args, **kwargs)
        if Path(file).parent == source.path:  # and not an adapter's
            stored.extend((Path(file).name, name) for name in loaded)
            arrays.extend(loaded.values())
        return loaded

    mx.load = noting_load
    try:
        model, _ = open_lazily(source)
    finally:
        mx.load = load
    targets = [mx.stop_gradient(weight) for name, weight in tree_flatten(model.parameters()) if name in wanted]
    found: dict[str, set[str]] = {}
    for index in set().union(*ancestors(targets, arrays)[0]):
        file, name = stored[index]
        found.setdefault(file, set()).add(name)
    return found


def open_lazily(source: ModelSource) -> tuple[nn.Module, dict[str, Any]]:
    """Open a model whose weights are read only when they are evaluated; return it and its config.

    Raises:
        ModelError: something is missing, damaged or unknown; the message says what.
    """
    with loading_errors(source.path), contextlib.redirect_stdout(io.StringIO()):
        if has_weights(source.path):
            model, config = load_model(source.path, lazy=True, trust_remote_code=source.trust_remote_code)
        else:
            model, config = build_from_config(source.path, source.trust_remote_code)
        if source.precision is not None:
            model, config = convert(model, config, source.precision)
        if source.adapter_path is not None:
            if not (Path(source.adapter_path) / "adapters.safetensors").exists():
                raise ModelError(f"--adapter-path {source.adapter_path} has no adapters.safetensors")
            model = load_adapters(model, source.adapter_path)
            model.eval()
        adapt(model, str(config["model_type"]))
    return model, config


def _check_files(path: Path, needs_weights: bool = True) -> None:
    if not path.is_dir():
        raise ModelError(f"{path} is not a directory")
    if not (path / "config.json").is_file():
        raise ModelError(f"{path} has no config.json: is it a model folder?")
    try:
        config = load_config(path)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path / 'config.json'} is not JSON: {error}") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise ModelError(f"{path / 'config.json'} has no model_type")
    files = sorted(path.glob("model*.safetensors"))
    if not files and needs_weights:
        raise ModelError(f"{path} has no model*.safetensors")
    index = path / "model.safetensors.index.json"
    if index.is_file() and files:
        named = set(json.loads(index.read_text()).get("weight_map", {}).values())
        missing = sorted(named - {file.name for file in files})
        if missing:
            raise ModelError(f"{path} is missing {len(missing)} of {len(named)} weight files: {', '.join(missing[:3])}")
    for file in files:
        _check_safetensors(file)


def _check_safetensors(file: Path) -> None:
    """Compare a file's size with its header, because MLX would notice a truncated file only when it reads the weights.

    Raises:
        ModelError: the file is truncated, or not a safetensors file.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size:
            raise ModelError(f"{file} is damaged or truncated ({size:,} bytes)")
        try:
            header = json.loads(stream.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError):
            raise ModelError(f"{file} is not a safetensors file") from None
    promised = 8 + length + max(ends, default=0)
    if size < promised:
        raise ModelError(f"{file} is truncated: {size:,} bytes of {promised:,}; download it again")


_TOP_K_KEYS = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_top_k",
    "top_k_experts",
    "experts_per_token",
)


def _matrix_sizes(model: nn.Module) -> dict[str, int]:
    """Return the elements of each matrix; a quantised one has several in each 32 bits, and its scales are none."""
    found = {}
    for path, module in model.named_modules():
        bits = getattr(module, "bits", None) if "scales" in module else None
        for name, array in module.items():
            if isinstance(array, mx.array) and array.ndim > 1 and not (bits and name in ("scales", "biases")):
                found[f"{path}.{name}" if path else name] = array.size * 32 // bits if bits else array.size
    return found


def _expert_shares(config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> dict[str, float]:
    text = {**config, **config.get("text_config", {})}
    top_k = next((int(text[key]) for key in _TOP_K_KEYS if isinstance(text.get(key), int)), None)
    if top_k is None:
        return {}
    return {name: min(1.0, top_k / shape[0]) for name, shape in shapes.items() if len(shape) == 3 and shape[0] > top_k}
