"""Copies of a model whose weights hold nothing, to be tried and thrown away."""

from __future__ import annotations

import copy

import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from hippo_mpi.tracing.graph import leaves_of


def blank_twin(model: nn.Module) -> nn.Module:
    """Return a copy of a model whose weights hold nothing, and leave the model as it was."""
    weights = tree_flatten(model.parameters())
    leaves = leaves_of(model)
    model.update(tree_unflatten(list(leaves.items())))
    try:
        return copy.deepcopy(model, {id(array): array for array in leaves.values()})
    finally:
        model.update(tree_unflatten(weights))
