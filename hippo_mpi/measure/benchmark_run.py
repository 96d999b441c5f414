"""The ranks of a benchmark: rank 0 decides what is measured next, and the others do their part of it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from mlx.nn.layers.distributed import sum_gradients
from mlx_lm.tokenizer_utils import TokenizerWrapper

from hippo_mpi.engine.engine import Engine
from hippo_mpi.engine.prefill import Limits
from hippo_mpi.measure.load_test import Load, Measured, load_mlx_lm_part, measure, measure_mlx_lm
from hippo_mpi.parallel.timeline import Mark
from hippo_mpi.parallel.worker import Leader
from hippo_mpi.planning.layout_choice import ALONE, PIPELINE, TENSOR
from hippo_mpi.planning.machine import available_bytes
from hippo_mpi.runtime.pipeline import Pipeline
from hippo_mpi.sharding.slot_caches import KVSettings
from hippo_mpi.sharding.stage import Stage, load_stage
from hippo_mpi.transport.hop_times import Hop, echo, time_ring
from hippo_mpi.transport.rank_status import RankStatistics

_MARGIN = 1.2  # free memory that a whole model needs besides a rank's part, as a multiple of its weights


class _Mode(Enum):
    RING = "ring"
    TOGETHER = "together"
    REPLICAS = "replicas"
    MLX_LM_TOGETHER = "mlx-lm together"
    END = "end"


@dataclass(frozen=True)
class _Order:
    """What all ranks do next. With replicas each rank has a load of its own."""

    mode: _Mode
    loads: list[Load]


@dataclass(frozen=True)
class _Marks:
    """What a rank did."""

    marks: list[Mark]


class Bench:
    """One rank's part in the measurements; every rank makes one, then rank 0 calls the modes and the others `follow`.

    Args:
        part: this rank's part of the pipeline.
        settings: of the KV caches.
        tokenizer: the model's.
        prefill_chunk: prompt tokens per step; None: chosen by the number of stages.
        has_whole: whether to load the whole model on every rank too, if there is room for it.
        has_mlx_lm: whether to measure mlx-lm too: on rank 0, and its own pipeline, or tensor parallelism, if the model type has it.
    """

    def __init__(
        self,
        part: Pipeline,
        settings: KVSettings,
        tokenizer: TokenizerWrapper,
        prefill_chunk: int | None,
        has_whole: bool,
        has_mlx_lm: bool,
    ) -> None:
        self._part, self._settings, self._tokenizer, self._has_mlx_lm = part, settings, tokenizer, has_mlx_lm
        self._control, self._world, self._agreement = part.control, part.world, part.agreement
        self._limits = Limits(prefill_chunk=prefill_chunk, can_batch=part.agreement.can_batch)
        self.marks: list[list[Mark]] = []
        self.whole: Stage | None = None
        self._mlx_lm_part: Any = None
        checkpoint = part.agreement.checkpoint
        is_tensor = part.agreement.shards is not None
        is_alone = not is_tensor and part.agreement.num_busy_stages < part.world.size
        self._mode = TENSOR if is_tensor else ALONE if is_alone else PIPELINE
        self._mlx_lm_mode = f"mlx-lm {TENSOR if is_tensor else PIPELINE}"
        if has_mlx_lm and part.world.size > 1:
            self._mlx_lm_part = load_mlx_lm_part(checkpoint, part.world.group, is_tensor, self._loading)
        if self._has_room(has_whole):
            self.whole = load_stage(checkpoint, 0, checkpoint.flow.num_layers, lambda done_bytes: self._loading())

    def _loading(self) -> None:
        self._control.progress("loading models to compare with")

    def _has_room(self, is_wanted: bool) -> bool:
        """True if a whole model fits besides its part on every rank; all ranks get the same result."""
        needed = sum(self._agreement.checkpoint.weight_bytes.values()) * _MARGIN
        gathered = self._control.gather((self._world.host, available_bytes()))
        verdict = None
        if gathered is not None:
            hosts = [host for host, _ in gathered]
            verdict = is_wanted and all(free_bytes > needed * hosts.count(host) for host, free_bytes in gathered)
        return self._control.share(verdict, bool)

    def follow(self) -> None:
        """Carry out rank 0's orders until it calls `end`; for the other ranks."""
        while (order := self._control.next_report(_Order)).mode is not _Mode.END:
            if order.mode is _Mode.RING:
                echo(self._part.channel)
            elif order.mode is _Mode.TOGETHER:
                self._part.timeline.start()
                self._part.follow()
                self._control.gather(_Marks(self._part.timeline.stop()))
            elif order.mode is _Mode.MLX_LM_TOGETHER:
                self._run_mlx_lm_part(order.loads[0])
            else:
                self._control.gather(self._alone(order.loads[self._world.rank]))
        self._forget_mlx_lm_part()
        self._part.end()

    def _forget_mlx_lm_part(self) -> None:
        """Drop what refers to the group: MPI is finalised when nothing does."""
        self._mlx_lm_part = None
        sum_gradients.cache_clear()

    def _order(self, mode: _Mode, loads: Sequence[Load] = ()) -> None:
        self._control.share(_Order(mode, list(loads)), _Order)

    # ---- what rank 0 does

    def modes(self) -> dict[str, Callable[[Load], Measured]]:
        """Return the possible measurements by name; each takes a load and returns its rates."""
        modes: dict[str, Callable[[Load], Measured]] = {self._mode: self._together}
        if self.whole is not None:
            modes = {"standalone": self._alone, **modes}
            modes |= {"replicas": self._replicas} if self._world.size > 1 else {}
            modes |= {"mlx-lm": self._mlx_lm} if self._has_mlx_lm else {}
        return modes | ({self._mlx_lm_mode: self._mlx_lm_together} if self._mlx_lm_part is not None else {})

    def ring(self) -> list[Hop]:
        """Time messages around the ring."""
        self._order(_Mode.RING)
        return time_ring(self._part.channel, self._world.size, self._control.progress)

    def end(self) -> list[RankStatistics] | None:
        """Release the other ranks; return every rank's statistics."""
        self._order(_Mode.END)
        self._forget_mlx_lm_part()
        return self._part.end()

    def _alone(self, load: Load) -> Measured:
        assert self.whole is not None
        leader = Leader(self.whole, self._part.channel, self._settings, 1, self._control.progress)
        return self._measure(leader, load)

    def _replicas(self, load: Load) -> Measured:
        size = self._world.size
        shares = [load.num_requests // size + (rank < load.num_requests % size) for rank in range(size)]
        loads = [replace(load, num_requests=share) for share in shares]
        self._order(_Mode.REPLICAS, loads)
        gathered = self._control.gather(self._alone(loads[0]))
        assert gathered is not None
        replicas = [one for one in gathered if one.first_token_s]
        first_s = statistics.median(one.first_token_s for one in replicas)
        return Measured(sum(one.prompt_tps for one in replicas), sum(one.decode_tps for one in replicas), first_s)

    def _together(self, load: Load) -> Measured:
        self._order(_Mode.TOGETHER)
        self._part.timeline.start()
        measured = self._measure(self._part.leader(), load)
        self._part.release()
        gathered = self._control.gather(_Marks(self._part.timeline.stop()))
        assert gathered is not None
        self.marks = [rank.marks for rank in gathered]
        return measured

    def _mlx_lm(self, load: Load) -> Measured:
        """Measure mlx-lm's own continuous batching over the same weights."""
        assert self.whole is not None
        return measure_mlx_lm(self.whole.model, load, self._measuring_mlx_lm)

    def _mlx_lm_together(self, load: Load) -> Measured:
        """Measure mlx-lm's continuous batching split over all ranks by mlx-lm itself."""
        self._order(_Mode.MLX_LM_TOGETHER, [load])
        return self._run_mlx_lm_part(load)

    def _run_mlx_lm_part(self, load: Load) -> Measured:
        return measure_mlx_lm(self._mlx_lm_part, load, self._measuring_mlx_lm)

    def _measuring_mlx_lm(self) -> None:
        self._control.progress("measuring mlx-lm")

    def _measure(self, leader: Leader, load: Load) -> Measured:
        limits = replace(self._limits, max_batch_size=max(load.num_requests, 1))
        engine = Engine(leader, self._tokenizer, limits, self._agreement.max_context, self._agreement.vocab_size)
        self._limits = engine.limits  # so that the model is probed for batching only once
        return measure(engine, load)
