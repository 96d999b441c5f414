"""Times on every rank what the ways to share a model are compared by: layers, sums and messages."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from hippo_mpi.checkpoint.checkpoint import Checkpoint, open_lazily
from hippo_mpi.planning.layer_times import RankTimes, time_layers
from hippo_mpi.planning.layout_choice import LinkTimes, shapes_of
from hippo_mpi.sharding.tensor import ShardPlan
from hippo_mpi.transport.channel import RingChannel
from hippo_mpi.transport.collective import RankCollective
from hippo_mpi.transport.control import Control
from hippo_mpi.transport.hop_times import echo, time_ring
from hippo_mpi.transport.layout import Layout
from hippo_mpi.transport.local_collective import AbsentRanks
from hippo_mpi.transport.pulse import Activity
from hippo_mpi.transport.world import World

_HOP_BYTES = (4 << 10, 64 << 10, 1 << 20)
_HOP_TRIES = 20


@dataclass(frozen=True)
class Timed:
    """What a rank has timed."""

    layers: RankTimes
    link: LinkTimes


def time_rank(
    checkpoint: Checkpoint,
    shards: ShardPlan,
    world: World,
    control: Control,
    is_lazy: bool,
    include_sums: bool,
    load: str,
    only_load: bool,
) -> Timed:
    """Time layers, sums and hops on this rank; every rank must call it.

    Args:
        checkpoint: the model.
        shards: how layers would be split.
        world: the ranks.
        control: to the others.
        is_lazy: whether sums are part of the graph.
        include_sums: whether layers are timed together with their sums; not for a link that isn't there.
        load: for which a choice will be made, whose steps are timed more often.
        only_load: whether other loads don't matter.
    """

    def going_on() -> None:
        control.progress("timing layers", Activity.TOGETHER)

    model, _ = open_lazily(checkpoint.source)
    own = RankCollective(world, is_lazy, control.names)
    control.gather(True)
    control.meet()
    going_on()
    sums = own.choose()
    collective = own if include_sums else AbsentRanks(world.rank)
    dtype, precise = checkpoint.flow.hidden_dtype, shapes_of(load, world.size)
    layers = time_layers(model, dtype, shards, world.rank, collective, going_on, precise, only_load)
    mx.clear_cache()
    channel, hops = RingChannel(world, control, Layout(world.size)), []
    if world.rank == 0:
        hops = time_ring(channel, world.size, control.progress, _HOP_BYTES, _HOP_TRIES)
    else:
        echo(channel)
    return Timed(layers, LinkTimes(tuple(sums), tuple((hop.size_bytes, hop.median_s) for hop in hops)))
