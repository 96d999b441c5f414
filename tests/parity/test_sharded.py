"""Every model type of mlx-lm, each layer split over ranks, against the whole model: all ranks in one process.

Outputs of other ranks are NaN where the code sees zeros otherwise, so that a rank that used one would show it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from hippo_mpi.checkpoint.checkpoint import Checkpoint, open_lazily
from hippo_mpi.shard.tensor import ShardPlan, plan_shards, shard_model
from hippo_mpi.tracing.twin import blank_twin
from hippo_mpi.transport.collective import LocalCollective, run_ranks
from tests.parity.test_every_model import NAMES, UNCUT, every, opened, steps, tokens_for

# Sums are made in another order. Long recurrences, and stand-ins for kernels of a GPU, add up what comes of that.
BOUND = 1e-5
BOUNDS = {"falcon_mamba": 1e-4, "muse_spark": 1e-3}
SPREAD = ["llama", "mixtral", "gpt_oss", "deepseek_v3", "qwen3_next", "phi3", "story"]
PASSES = [(1, 5, True), (1, 1, False), (2, 3, True)]


def is_whole(name: str) -> bool:
    """Return whether a type can't be tried: mlx-lm itself can't run it, or makes NaN."""
    return name in UNCUT or name == "phi3small"


def plan_of(checkpoint: Checkpoint, shares: Sequence[float]) -> ShardPlan:
    model, _ = open_lazily(checkpoint.source)
    return plan_shards(blank_twin(model), shares)


def parts_of(checkpoint: Checkpoint, plan: ShardPlan, num_ranks: int) -> list[nn.Module]:
    """Load the model once for each rank, with its part of each layer."""
    parts = []
    for rank in range(num_ranks):
        model, _ = open_lazily(checkpoint.source)
        shard_model(model, plan, rank, LocalCollective(), absent=float("nan"))
        mx.eval(model.parameters())
        parts.append(model)
    return parts


def run(model: nn.Module, name: str) -> list[mx.array]:
    """Return the logits of a prompt, of a second part of it, and of single tokens."""
    tokens, cache, found = tokens_for(name), make_prompt_cache(model), []
    for position, count in steps(name):
        found.append(model(mx.array([tokens[position : position + count]]), cache=cache))
        mx.eval(found[-1])
    return found


def assert_close(checkpoint: Checkpoint, name: str, plan: ShardPlan, num_ranks: int) -> None:
    whole, _ = open_lazily(checkpoint.source)
    wanted = run(whole, name)
    parts = parts_of(checkpoint, plan, num_ranks)
    for rank, found in enumerate(run_ranks([partial(run, part, name) for part in parts])):
        for step, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
            off = float(mx.abs(ours - theirs).max() / mx.abs(theirs).max())
            assert off <= BOUNDS.get(name, BOUND), f"rank {rank}, step {step}: off by {off}"
            assert bool((ours.argmax(-1) == theirs.argmax(-1)).all()), f"rank {rank}, step {step}: another token"


@every([name for name in NAMES if not is_whole(name)])
def test_two_ranks(name: str) -> None:
    checkpoint = opened(name)
    plan = plan_of(checkpoint, (0.5, 0.5))
    assert not plan.refused
    assert_close(checkpoint, name, plan, 2)
