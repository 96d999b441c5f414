"""Turn an mlx-lm model into its pipelined self: this rank's layers, called as if the whole model were here."""

from __future__ import annotations

import copy
import hashlib
import inspect
import itertools
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from hippo_mpi.checkpoint.adapters import adapt
from hippo_mpi.checkpoint.checkpoint import hold_weights
from hippo_mpi.checkpoint.model_errors import running_errors
from hippo_mpi.errors import HippoError
from hippo_mpi.parallel.peer import Peer
from hippo_mpi.planning.costs import CacheCost, ModelInfo
from hippo_mpi.planning.layer_split import Machine, plan_split
from hippo_mpi.shard.stage import Stage
from hippo_mpi.tracing.dataflow import Dataflow
from hippo_mpi.tracing.graph import leaf
from hippo_mpi.tracing.trace import trace


def find_dataflow(model: nn.Module) -> Dataflow:
    """Find a model's dataflow, and leave the model as it was.

    Raises:
        ModelError: the model can't be cut.
        ForeignError: its own code raises something.
    """
    weights = tree_flatten(model.parameters())
    leaves = {name: leaf(weight.shape, weight.dtype) for name, weight in weights}
    model.update(tree_unflatten(list(leaves.items())))
    try:
        twin = copy.deepcopy(model, {id(array): array for array in leaves.values()})
    finally:
        model.update(tree_unflatten(weights))
    return trace(twin)


def even_split(flow: Dataflow, weight_bytes: dict[str, int], num_ranks: int) -> list[int]:
    """Return the allowed layers per rank that make the fullest rank as empty as possible.

    Raises:
        PlanError: the model can't be cut into so many stages.
    """
    return plan_split(_weights_only(flow, weight_bytes), [Machine("", 1 << 62)] * num_ranks).counts


def call_on_all_ranks(stage: Stage, peer: Peer) -> None:
    """Let calls of the stage's model go through all ranks."""
    model, kind = stage.model, type(stage.model)
    signature = inspect.signature(kind.__call__)

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> mx.array:
        given = signature.bind(self, *args, **kwargs).arguments
        _, tokens, *others = given.items()
        options = dict(others)
        for parameter in signature.parameters.values():
            if parameter.kind == inspect.Parameter.VAR_KEYWORD:
                options |= options.pop(parameter.name, {})
        return peer.call(tokens[1], options.pop("cache", None), options)

    methods = {"__call__": call, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    model.__class__ = type(kind.__name__, (kind,), methods)
