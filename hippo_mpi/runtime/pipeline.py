"""One rank of the pipeline: its stage, loaded, and what it does until the run ends."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from hippo_mpi.errors import HippoError, error_with_status
from hippo_mpi.parallel.sharded_follower import ShardedFollower
from hippo_mpi.parallel.timeline import Timeline
from hippo_mpi.parallel.worker import Follower, Leader
from hippo_mpi.planning.machine import peak_resident_bytes
from hippo_mpi.runtime.agreement import Agreement
from hippo_mpi.sharding.sharded_stage import ShardedStage, load_sharded_stage
from hippo_mpi.sharding.slot_caches import KVSettings
from hippo_mpi.sharding.stage import Stage, load_stage
from hippo_mpi.transport.channel import RingChannel
from hippo_mpi.transport.collective import collective_of, is_in_graph
from hippo_mpi.transport.control import Control
from hippo_mpi.transport.layout import Layout
from hippo_mpi.transport.pulse import Activity
from hippo_mpi.transport.rank_status import RankStatistics, RankStatus
from hippo_mpi.transport.world import World

_END = b""  # the header after which nothing comes
_COUNT_S = 0.5  # between two looks at how large the caches are


@dataclass(frozen=True)
class _Loaded:
    """Whether a rank has loaded its stage; if not, why."""

    host: str
    error: str = ""
    exit_code: int = 0


class Pipeline:
    """A rank with its stage loaded."""

    def __init__(
        self,
        world: World,
        control: Control,
        agreement: Agreement,
        settings: KVSettings,
        on_load: Callable[[int, int], None] | None = None,
    ) -> None:
        self.world, self.control, self.agreement = world, control, agreement
        agreement.layout.check(world.size)
        start, stop = self._layers = agreement.layers_of(world.rank)
        checkpoint = agreement.checkpoint
        sizes, shards, head = checkpoint.weight_bytes, agreement.shards, checkpoint.flow.head_weights
        self.weight_bytes = sum(sizes[name] for name in checkpoint.stage_weights(start, stop))
        if shards is not None:
            place = agreement.layout.place(world.rank).shard
            self.weight_bytes = shards.held_bytes(place, self._layers) + shards.moved_head_bytes(place)
            self.weight_bytes += sum(sizes[name] for name in head) if world.rank == 0 else 0

        def loaded(done: int) -> None:
            control.progress(f"loading weights, {done:,} of {self.weight_bytes:,} bytes")
            if on_load:
                on_load(done, self.weight_bytes)

        control.progress("loading weights")
        error: HippoError | None = None
        try:
            if mx.metal.is_available():
                mx.set_wired_limit(int(mx.device_info()["max_recommended_working_set_size"]))
            self.stage = self._load(loaded)
        except HippoError as caught:
            error = caught
        self._agree_that_loaded(error)
        self.channel = RingChannel(world, control, Layout(world.size))  # also where ranks share layers
        self.timeline = Timeline(self._progress)
        self._settings = settings
        self._worker: Leader | Follower | ShardedFollower | None = None
        self._cache_bytes, self._counted_at = 0, 0.0
        control.own_status = self._status

    def _load(self, on_progress: Callable[[int], None]) -> Stage:
        checkpoint, shards = self.agreement.checkpoint, self.agreement.shards
        if shards is None:
            return load_stage(checkpoint, *self._layers, on_progress)
        layout, rank = self.agreement.layout, self.world.rank
        self.control.gather(True)
        self.control.meet()  # from here on, all ranks are at the same sum
        collective = collective_of(self.world, layout, is_in_graph(self.agreement.collectives), self.control.names)
        collective.choose()
        return load_sharded_stage(checkpoint, shards, self._layers, layout.place(rank).shard, collective, on_progress)

    def _agree_that_loaded(self, error: HippoError | None) -> None:
        gathered = self.control.gather(
            _Loaded(self.world.host, str(error), error.exit_code) if error else _Loaded(self.world.host)
        )
        for rank, loaded in enumerate(gathered or ()):
            if loaded.error:
                failure = error_with_status(loaded.exit_code, f"rank {rank} ({loaded.host}): {loaded.error}")
                self.control.fail(failure if self.world.size > 1 else error or failure)
        self.control.meet()

    def leader(self) -> Leader:
        """Return rank 0's side of the steps."""
        self._worker = Leader(self.stage, self.channel, self._settings, self.agreement.num_busy_stages, self.timeline)
        return self._worker

    def follow(self) -> None:
        """Run rank 0's steps until it calls `release`."""
        is_last = self.world.rank == self.world.size - 1  # there is one replica
        follower: Follower | ShardedFollower
        if isinstance(self.stage, ShardedStage) and self.stage.is_whole:
            follower = ShardedFollower(self.stage, self.channel, self._settings, is_last, self.timeline)
        else:
            follower = Follower(self.stage, self.channel, self._settings, is_last, self.timeline)
        self._worker = follower
        self._progress("waiting for the first step", Activity.WAITING)
        while follower.follow() is not None:
            pass

    def release(self) -> None:
        """Let the others' `follow` return; rank 0 takes no further steps with its leader."""
        if self.world.size > 1:
            self.channel.send(_END, [])

    def _progress(self, doing: str, activity: Activity = Activity.OTHER) -> None:
        """Pass on what this rank's main thread does next; caches are counted here, where nobody changes them meanwhile."""
        self.control.progress(doing, activity)
        now = time.monotonic()
        if self._worker is not None and now - self._counted_at > _COUNT_S:
            self._cache_bytes, self._counted_at = self._worker.caches.num_bytes, now

    def _status(self) -> RankStatus:
        """Return what this rank says of itself in its beats."""
        in_flight = self._worker.num_in_flight if isinstance(self._worker, Leader) else None
        hops = self.channel.num_hops, self.channel.hop_s
        return RankStatus(self.timeline.busy_s, self._cache_bytes, *hops, peak_resident_bytes(), in_flight)

    def statistics(self) -> RankStatistics:
        """Return this rank's layers and memory."""
        memory = int(mx.get_peak_memory()), peak_resident_bytes()
        return RankStatistics(self.world.host, self._layers, self.weight_bytes, *memory)

    def end(self) -> list[RankStatistics] | None:
        """Finish the run, which releases the others; statistics of every rank on rank 0."""
        if self.world.rank == 0:
            self.release()
        gathered = self.control.gather(self.statistics())
        self.control.meet()
        self.control.close()
        return gathered
