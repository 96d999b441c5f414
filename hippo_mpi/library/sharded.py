"""Turns an mlx-lm model into one of whose layers each rank holds a part, so that all ranks work on every token at once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import mlx.core as mx
import mlx.nn as nn

from hippo_mpi.checkpoint.adapters import adapt
from hippo_mpi.errors import HippoError, UserError
from hippo_mpi.library.pipelined import (
    START_TIMEOUT_S,
    TIMEOUT_S,
    check_same,
    route_calls,
    share_random_state,
    structure_of,
)
from hippo_mpi.parallel.sharded_peer import ShardedPeer
from hippo_mpi.sharding.tensor import ShardPlan, plan_shards, shard_model
from hippo_mpi.tracing.twin import blank_twin
from hippo_mpi.transport.collective import RankCollective
from hippo_mpi.transport.pulse import Activity
from hippo_mpi.transport.script_ring import Group, ScriptRing, join

_TRYING = "trying how the layers can be split"


def shard(
    model: nn.Module,
    group: Group | None = None,
    shares: Sequence[float] | None = None,
    *,
    exact: bool = False,
    timeout: float = TIMEOUT_S,
    start_timeout: float = START_TIMEOUT_S,
) -> ShardPlan:
    """Give each rank of a group a part of every layer of a model; every rank of it calls this with the same model.

    Afterwards the model is called as before (by `mlx_lm.generate`, `stream_generate`, `batch_generate`), on all ranks
    with the same tokens, and returns the same logits on each; they differ from the whole model's by rounding, as sums
    are made in another order. Unlike those of `pipeline`, ranks work at the same time on each token, and meet twice in
    every layer: this needs a fast link. What a split does to a layer is found by running the model's own code, and
    tried before it is used; a layer that doesn't pass stays whole on every rank. Weights of LoRA adapters are fused.

    Args:
        model: an mlx-lm model, loaded or lazily loaded.
        group: from `mx.distributed.init()`; None: the one that the launcher's environment describes.
        shares: of the work, by rank, in any unit; None: equal ones.
        exact: whether parts are only put side by side, twice as often as they would be added up, for the bits of the whole
            model.
        timeout: seconds that a rank may be silent, or a call without progress, before all ranks end with status 3.
        start_timeout: seconds that ranks wait for each other to start.

    Returns:
        How each layer is split.

    Raises:
        UserError: on a single rank, the arguments can't be used. Several ranks end with its line and status 2.
    """
    ring = join(group, start_timeout, timeout)
    size = ring.world.size
    if size == 1:
        return ShardPlan(1, (), {})
    ring.control.progress(_TRYING, Activity.COMPUTING)
    try:
        if getattr(model, "is_pipelined", False):
            raise UserError("this model is already split over the ranks")
        plan = _plan(ring, model, _checked(shares, size), exact)
        collective = RankCollective(ring.world, mx.default_device() == mx.cpu, ring.control.names)
        collective.choose()
        shard_model(model, plan, ring.world.rank, collective)
        for layer in model.layers:
            mx.eval(layer.parameters())
            ring.control.progress("cutting weights", Activity.COMPUTING)
        mx.eval(model.parameters())
    except HippoError as error:
        ring.control.fail(error)
    share_random_state(ring)
    name = f"{ring.next_number()} ({type(model).__module__.rpartition('.')[2]})"
    run_model = partial(type(model).__call__, model)
    route_calls(model, ShardedPeer(model, run_model, ring.channel, collective, ring.control.progress, name), ring)
    ring.control.idle()
    return plan


def _plan(ring: ScriptRing, model: nn.Module, shares: Sequence[float], is_exact: bool) -> ShardPlan:
    adapt(model, str(getattr(model, "model_type", "")))
    check_same(ring, {"model": structure_of(model), "shares": str(shares), "exact": str(is_exact)})
    plan = None
    if ring.world.rank == 0:

        def tried() -> None:
            ring.control.progress(_TRYING, Activity.COMPUTING)

        # mlx-lm builds the logits of whole prompts, which nobody looks at: other ranks' parts would travel for nothing.
        plan = plan_shards(blank_twin(model), shares, tried, is_exact, has_whole_head=True)
    return ring.control.share(plan, ShardPlan)


def _checked(shares: Sequence[float] | None, size: int) -> list[float]:
    """Return shares whose sum is 1.

    Raises:
        UserError: there is another number of them than of ranks, or one isn't above 0.
    """
    if shares is None:
        return [1 / size] * size
    if len(shares) != size or not all(0 < share < float("inf") for share in shares):
        raise UserError(f"shares {list(shares)} are not a number above 0 for each of the {size} ranks")
    return [share / sum(shares) for share in shares]
