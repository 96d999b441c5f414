"""Loads this rank's layers of a model, for a script that calls the model on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from hippo_mpi.checkpoint.checkpoint import ModelSource
from hippo_mpi.checkpoint.hub import find_model
from hippo_mpi.config.bundled import BUNDLED_MODEL
from hippo_mpi.engine.text import open_tokenizer
from hippo_mpi.errors import HippoError
from hippo_mpi.library.pipelined import START_TIMEOUT_S, TIMEOUT_S, connect
from hippo_mpi.runtime.agreement import Agreement, negotiate
from hippo_mpi.runtime.layout_planner import PlanConstraints
from hippo_mpi.sharding.slot_caches import KVSettings
from hippo_mpi.sharding.stage import load_stage
from hippo_mpi.transport.script_ring import Group, ScriptRing, join


@dataclass(frozen=True)
class LoadOptions:
    """Which model to load, and how ranks share it; the same on every rank."""

    model: str = str(BUNDLED_MODEL)
    layer_split: tuple[int, ...] | None = None
    max_context: int | None = None
    revision: str | None = None
    adapter_path: str | None = None
    precision: str | None = None
    trust_remote_code: bool = False

    def negotiate(self, ring: ScriptRing, shares_head: bool) -> Agreement:
        """Open the checkpoint on every rank, compare the ranks, and plan which one holds which layers.

        Args:
            ring: the script's ranks.
            shares_head: whether every rank holds norm and head.

        Raises:
            HippoError: on a single rank, the model can't be used or doesn't fit. Several ranks end.
        """
        control = ring.control

        def looking() -> None:
            control.progress("listing the hub's files")

        def find_source() -> ModelSource:
            path = find_model(self.model, self.revision, looking)
            return ModelSource(path, self.adapter_path, self.trust_remote_code, self.precision)

        arguments = {name: str(value) for name, value in vars(self).items()}
        options = PlanConstraints(self.layer_split, self.max_context)
        return negotiate(ring.world, control, find_source, options, KVSettings(), arguments, shares_head=shares_head)


def load(
    path_or_repo: str | Path = BUNDLED_MODEL,
    group: Group | None = None,
    *,
    layer_split: Sequence[int] | None = None,
    max_context: int | None = None,
    revision: str | None = None,
    adapter_path: str | None = None,
    precision: str | None = None,
    trust_remote_code: bool = False,
    timeout: float = TIMEOUT_S,
    start_timeout: float = START_TIMEOUT_S,
) -> tuple[nn.Module, TokenizerWrapper]:
    """Load a pipelined model and its tokenizer; every rank of the group calls this with the same arguments.

    Each rank reads (or downloads from the hub) the layers that the planner assigns to it, and the head; a single rank
    has the whole model. See `pipeline` for how the model can be used.

    Args:
        path_or_repo: folder or Hugging Face repo of a model, or a bundled one's name.
        group: from `mx.distributed.init()`; None: the one that the launcher's environment describes.
        layer_split: layers per rank; None: the planner's, by the ranks' memory and speed.
        max_context: tokens of KV cache to plan for; None: as many as fit, up to the model's own limit.
        revision: of the repo.
        adapter_path: folder with trained adapter weights.
        precision: to cast or quantise the weights to while loading, as with --precision.
        trust_remote_code: whether the checkpoint's own Python code may run.
        timeout: seconds that a rank may be silent, or a call without progress, before all ranks end with status 3.
        start_timeout: seconds that ranks wait for each other to start.

    Returns:
        The model, and its tokenizer.

    Raises:
        PlanError: on a single rank, the model doesn't fit. Several ranks end with its line and status 2.
        ModelError: on a single rank, the model can't be read. Several ranks end.
    """
    ring = join(group, start_timeout, timeout)
    split = tuple(layer_split) if layer_split is not None else None
    options = LoadOptions(str(path_or_repo), split, max_context, revision, adapter_path, precision, trust_remote_code)
    agreement = options.negotiate(ring, shares_head=True)
    checkpoint, rank = agreement.checkpoint, ring.world.rank
    try:
        tokenizer = open_tokenizer(checkpoint.source.path, checkpoint.config.get("eos_token_id"), (), trust_remote_code)
        stage = load_stage(
            checkpoint, *agreement.layers_of(rank), lambda _: ring.control.progress("loading weights"), shares_head=True
        )
    except HippoError as error:
        ring.control.fail(error)
    connect(stage, ring)
    return stage.model, tokenizer
