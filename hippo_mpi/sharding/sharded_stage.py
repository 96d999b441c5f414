"""Layers of a model, of each of which this rank holds a part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from hippo_mpi.checkpoint.checkpoint import Checkpoint, load_weights
from hippo_mpi.sharding.sharded_head import HeadShards
from hippo_mpi.sharding.stage import Forward, Place, Stage
from hippo_mpi.sharding.tensor import ShardPlan, shard_model
from hippo_mpi.tracing.dataflow import Dataflow
from hippo_mpi.transport.collective import Collective


class ShardedStage(Stage):
    """A part of every layer of a stage, ready to run steps that all ranks of the stage take together.

    What one of them makes or receives alone (on rank 0, what comes of the tokens) is shared by a sum to which the
    others add zeros.

    Args:
        model: an mlx-lm model, reduced to this rank's part.
        flow: what `trace` found for the same model.
        layers: [start, stop) of the stage.
        place: of this rank among those of the stage: the first of them receives, and in the first stage it holds
            embedding, norm and head.
        num_places: how many ranks hold the stage; the last of them sends.
        collective: what the layers add up with.
        head: how the matrix that makes logits is split, if it is.
    """

    def __init__(
        self,
        model: nn.Module,
        flow: Dataflow,
        layers: tuple[int, int],
        place: int,
        num_places: int,
        collective: Collective,
        head: HeadShards | None = None,
    ) -> None:
        super().__init__(model, flow, *layers)
        self.is_first, self.is_last = place == 0, place == num_places - 1
        self.leads = self.holds_head = self.is_first and self.start == 0
        self.is_sharded = True
        self.collective, self.is_lazy = collective, collective.is_lazy
        self._wants_logits = True
        if head is not None:
            part = dict(model.named_modules())[head.path]
            part.__class__ = self._unless_unwanted(type(part), head)
        if self.is_whole:
            self._hook_layers()  # to share what they are given

    @property
    def sends(self) -> bool:
        """Whether this rank sends to another stage what this one has made."""
        return self.is_last and not self.is_whole

    @property
    def hands_over_early(self) -> bool:
        """Whether the next stage gets what it needs as soon as this stage's last layer has run.

        What the first stage has prepared for later layers is shared only in the phantoms of these.
        """
        return self.start > 0 and self.stop == self.flow.num_layers

    def forward(self, tokens: mx.array, cache: list[Any], wants_logits: bool = True, **options: Any) -> Forward:
        """Begin a step; other ranks than the first look at the shape of the tokens only."""
        self._wants_logits = wants_logits
        self.collective.begin(notes=wants_logits)
        return super().forward(tokens, cache, wants_logits, **options)

    def shared(self, array: mx.array) -> mx.array:
        """Return what the first rank of this stage has for an array."""
        return self.collective.sum(array if self.is_first else mx.zeros_like(array))

    def received(
        self, cut: int, incoming: Sequence[mx.array] | None, rows_tokens: tuple[int, int]
    ) -> dict[Place, mx.array]:
        """Return the arrays that arrived at the cut before call `cut`, on every rank of this stage.

        Of what the first stage has prepared, only the first rank has something; it is shared where it is used.
        """
        arrays = super().received(cut, incoming, rows_tokens) if self.is_first else {}
        for call, path in self.crossing[cut]:
            shape = self.flow.calls[call].outputs.get(path)
            if shape is not None:
                own = arrays.get((call, path))
                arrays[call, path] = self.shared(mx.zeros(shape(*rows_tokens), shape.dtype) if own is None else own)
        return arrays

    def _unless_unwanted(self, kind: type, head: HeadShards) -> type:
        """Return a subclass of the head's class that takes part in no sum where a step wants no logits."""

        def call(module: Any, x: mx.array) -> mx.array:
            if self._wants_logits:
                return getattr(kind, head.method)(module, x)  # type: ignore[no-any-return]
            return mx.zeros((*x.shape[:-1], head.bounds[-1]), x.dtype)

        return type(kind.__name__, (kind,), {head.method: call})


def load_sharded_stage(
    checkpoint: Checkpoint,
    plan: ShardPlan,
    layers: tuple[int, int],
    place: int,
    collective: Collective,
    on_progress: Callable[[int], None] = lambda done_bytes: None,
) -> ShardedStage:
    """Load a rank's part of every layer of a stage; on rank 0 also embedding, norm and head, or its part of that.

    Weights are read and cut some 64 MiB at a time, so that only few whole tensors are ever held beside the rank's own part.

    Args:
        checkpoint: the model's structure, from `open_checkpoint`.
        plan: from `plan_shards`.
        layers: [start, stop) of the stage.
        place: of this rank among those of the stage.
        collective: what the layers add up with.
        on_progress: called with the bytes read so far.

    Raises:
        ModelError: a file can't be read or downloaded.
        UserError: an adapter can't be fused.
    """
    flow = checkpoint.flow
    wanted = flow.stage_weights(*layers)
    if place > 0 and flow.num_rounds == 1:  # a model that loops over its layers may use its norm in between
        wanted = wanted - (flow.head_weights - (flow.output_weights if plan.head else set()))
    model = load_weights(checkpoint, wanted, on_progress, lambda model: shard_model(model, plan, place, collective))
    return ShardedStage(model, flow, layers, place, plan.num_ranks, collective, plan.head)
