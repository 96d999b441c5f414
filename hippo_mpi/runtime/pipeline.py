"""One rank of the pipeline: its stage, loaded, and what it does until the run ends."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from hippo_mpi.errors import HippoError, UserError
from hippo_mpi.parallel.timeline import Timeline
from hippo_mpi.parallel.worker import Follower, Leader
from hippo_mpi.planning.machine import peak_resident_bytes
from hippo_mpi.runtime.agreement import Agreement
from hippo_mpi.shard.slot_caches import KVSettings
from hippo_mpi.shard.stage import load_stage
from hippo_mpi.transport.channel import RingChannel
from hippo_mpi.transport.control import Control
from hippo_mpi.transport.world import World

_END = b""  # the header after which nothing comes
_COUNT_S = 0.5  # between two looks at how large the caches are


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
        self.weight_bytes = sum(checkpoint.weight_bytes[name] for name in checkpoint.stage_weights(start, stop))

        def loaded(done: int) -> None:
            control.progress(f"loading weights, {done:,} of {self.weight_bytes:,} bytes")
            if on_load:
                on_load(done, self.weight_bytes)

        control.progress("loading weights")
        error: HippoError | None = None
        try:
            if mx.metal.is_available():
                mx.set_wired_limit(int(mx.device_info()["max_recommended_working_set_size"]))
            self.stage = load_stage(checkpoint, start, stop, loaded)
        except HippoError as caught:
            error = caught
        self._agree_that_loaded(error)
        self.channel = RingChannel(world, control, agreement.layout)
        self.timeline = Timeline(self._progress)
        self._settings = settings
        self._worker: Leader | Follower | None = None
        self._cache_bytes, self._counted_at = 0, 0.0
        control.own_status = self._status

    def _agree_that_loaded(self, error: HippoError | None) -> None:
        mine = {"error": str(error), "code": error.exit_code, "host": self.world.host} if error else {}
        found = self.control.gather(mine)
        if found is not None:
            for rank, message in enumerate(found):
                if "error" in message:
                    failure = UserError(f"rank {rank} ({message['host']}): {message['error']}")
                    self.control.fail(failure if self.world.size > 1 else error or failure)
        self.control.share({"go": True} if found is not None else None)

    def leader(self) -> Leader:
        self._worker = Leader(self.stage, self.channel, self._settings, self.agreement.layout.stages, self.timeline)
        return self._worker

    def follow(self) -> None:
        """Obey until rank 0 calls `release`."""
        layout = self.agreement.layout
        is_last = layout.place(self.world.rank).stage == layout.stages - 1
        self._worker = follower = Follower(self.stage, self.channel, self._settings, is_last, self.timeline)
        while follower.follow() is not None:
            pass

    def release(self) -> None:
        """Rank 0 takes no further steps with its leader: the others' `follow` returns."""
        if self.world.size > 1:
            self.channel.send(_END, [])

    def _progress(self, doing: str) -> None:
        """What this rank's main thread does next; caches are counted here, where nobody changes them meanwhile."""
        self.control.progress(doing)
        now = time.monotonic()
        if self._worker is not None and now - self._counted_at > _COUNT_S:
            self._cache_bytes, self._counted_at = self._worker.caches.num_bytes, now

    def _status(self) -> dict[str, Any]:
        """What changes while this rank works; sums since it was started."""
        status = {
            "busy_s": self.timeline.busy_s,
            "cache_bytes": self._cache_bytes,
            "num_hops": self.channel.num_hops,
            "hop_s": self.channel.hop_s,
            "peak_resident_bytes": peak_resident_bytes(),
        }
        return status | ({"num_in_flight": self._worker.num_in_flight} if isinstance(self._worker, Leader) else {})

    def statistics(self) -> dict[str, Any]:
        """This rank's layers and memory."""
        return {
            "host": self.world.host,
            "layers": list(self._layers),
            "weight_bytes": self.weight_bytes,
            "peak_memory_bytes": int(mx.get_peak_memory()),
            "peak_resident_bytes": peak_resident_bytes(),
        }

    def end(self) -> list[dict[str, Any]] | None:
        """Finish the run, which releases the others; statistics of every rank on rank 0."""
        if self.world.rank == 0:
            self.release()
        gathered = self.control.gather(self.statistics())
        self.control.share({"end": True} if gathered is not None else None)
        self.control.close()
        return gathered
