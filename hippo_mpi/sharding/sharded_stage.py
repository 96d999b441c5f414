"""All layers of a model, of each of which this rank holds a part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from hippo_mpi.checkpoint.checkpoint import Checkpoint, load_weights
from hippo_mpi.sharding.sharded_head import HeadShards
from hippo_mpi.sharding.stage import Forward, Stage, argument, replace_argument
from hippo_mpi.sharding.tensor import ShardPlan, shard_model
from hippo_mpi.tracing.dataflow import Dataflow
from hippo_mpi.transport.collective import Collective


class ShardedStage(Stage):
    """A part of every layer of `model`, ready to run steps that all ranks take together.

    Rank 0 embeds; what it makes of the tokens for the layers is shared by a sum to which others add zeros.

    Args:
        model: an mlx-lm model, reduced to this rank's part.
        flow: what `trace` found for the same model.
        leads: whether this is rank 0, which holds embedding, norm and head.
        collective: what the layers add up with.
        head: how the matrix that makes logits is split, if it is.
    """

    def __init__(
        self, model: nn.Module, flow: Dataflow, leads: bool, collective: Collective, head: HeadShards | None = None
    ) -> None:
        super().__init__(model, flow, 0, flow.num_layers)
        self.is_sharded, self.leads, self.holds_head = True, leads, leads
        self.collective, self.is_lazy = collective, collective.is_lazy
        self._next_call, self._wants_logits = 0, True
        if head is not None:
            part = dict(model.named_modules())[head.path]
            part.__class__ = self._unless_unwanted(type(part), head)
        for layer in model.layers:
            layer.__class__ = self._sharing(type(layer))

    def forward(self, tokens: mx.array, cache: list[Any], wants_logits: bool = True, **options: Any) -> Forward:
        """Begin a step; other ranks than the first look at the shape of the tokens only."""
        self._next_call, self._wants_logits = 0, wants_logits
        self.collective.begin()
        return super().forward(tokens, cache, wants_logits, **options)

    def _sharing(self, kind: type) -> type:
        """Return a subclass of a layer's class that is given what rank 0 has made of the tokens."""

        def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
            inputs: dict[str, Any] = {"args": args, "kwargs": kwargs}
            prepared = self.flow.calls[self._next_call].prepared
            self._next_call += 1
            for path in sorted(prepared, key=repr):
                own = argument(inputs, path)
                replace_argument(inputs, path, self.collective.sum(own if self.leads else mx.zeros_like(own)))
            return kind.__call__(layer, *inputs["args"], **inputs["kwargs"])

        return type(kind.__name__, (kind,), {"__call__": call})

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
    rank: int,
    collective: Collective,
    on_progress: Callable[[int], None] = lambda done_bytes: None,
) -> ShardedStage:
    """Load a rank's part of every layer of a model, and of the head; on rank 0 also embedding and norm.

    Weights are read and cut some 64 MiB at a time, so that only few whole tensors are ever held beside the rank's own part.

    Args:
        checkpoint: the model's structure, from `open_checkpoint`.
        plan: from `plan_shards`.
        rank: whose part.
        collective: what the layers add up with.
        on_progress: called with the bytes read so far.

    Raises:
        ModelError: a file can't be read or downloaded.
        UserError: an adapter can't be fused.
    """
    flow, leads = checkpoint.flow, rank == 0
    wanted = flow.stage_weights(0, flow.num_layers)
    if not leads and flow.num_rounds == 1:  # a model that loops over its layers may use its norm in between
        wanted = wanted - (flow.head_weights - (flow.output_weights if plan.head else set()))
    model = load_weights(checkpoint, wanted, on_progress, lambda model: shard_model(model, plan, rank, collective))
    return ShardedStage(model, flow, leads, collective, plan.head)
