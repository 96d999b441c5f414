"""From a launched process to a stage that is ready: the ranks agree on a plan, and each loads its part.

    join the world -> open the checkpoint (no weights) -> agree -> load -> Leader on rank 0, Follower elsewhere

Every rank takes part in every exchange, also one that has found an error: so all of them learn of it, rank 0
says it in one line, and all end with the same status.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import mlx.core as mx

from hippo_mpi.config import RunOptions
from hippo_mpi.errors import HippoError, LaunchError, UserError
from hippo_mpi.parallel.source_digest import source_digest
from hippo_mpi.parallel.timeline import Timeline
from hippo_mpi.parallel.worker import Follower, Leader
from hippo_mpi.shard import Checkpoint, ModelSource, open_checkpoint, pipeline
from hippo_mpi.shard.kv_cache import KVSettings
from hippo_mpi.shard.layer_split import LayerSplit, Machine, plan_split
from hippo_mpi.shard.model_info import ModelInfo, model_info
from hippo_mpi.transport.channel import RingChannel
from hippo_mpi.transport.control import Control
from hippo_mpi.transport.memory import available_bytes, measured_speed, peak_resident_bytes
from hippo_mpi.transport.world import World

_END = b""  # the header after which nothing comes
_COUNT_S = 0.5  # between two looks at how large the caches are
_EQUAL_SPEED = 1.2  # speeds closer than this are taken for the same: a short measurement isn't better


@dataclass
class DraftModel:
    """A small model that lies whole on rank 0."""

    checkpoint: Checkpoint
    info: ModelInfo


@dataclass
class Agreement:
    """What all ranks have agreed on before a weight is loaded. `split` and `draft` are on rank 0 only."""

    checkpoint: Checkpoint
    counts: list[int]
    max_context: int
    can_batch: bool | None  # False: mlx-lm can't run rows together; None: the model must be asked
    vocab_size: int
    split: LayerSplit | None
    draft: DraftModel | None = None


def meet(world: World, control: Control, arguments: dict[str, str]) -> list[Machine]:
    """Compare the ranks' versions and arguments; their budgets, on rank 0 (elsewhere none).

    Raises:
        HippoError: they differ; for ranks other than 0 the process ends instead.
    """
    hellos = control.gather(_hello(world, arguments) | {"digest": ""})
    if hellos is None:
        return []
    try:
        _compare(hellos)
    except HippoError as error:
        control.fail(error)
    return _machines(hellos)


def agree(
    world: World,
    control: Control,
    find_source: Callable[[], ModelSource],
    options: RunOptions,
    settings: KVSettings,
    arguments: dict[str, str],
    machines: list[Machine] | None = None,
    find_draft: Callable[[], ModelSource | None] = lambda: None,
) -> Agreement:
    """Open the checkpoint on every rank, compare, and plan the split on rank 0: for the ranks, or for `machines` instead.

    Raises:
        HippoError: on every rank, if any rank found one; for ranks other than 0 the process ends instead.
    """
    control.progress("opening the checkpoint")
    checkpoint, hello = None, _hello(world, arguments)
    try:
        checkpoint = open_checkpoint(find_source())
        hello["digest"] = checkpoint.digest()
    except HippoError as error:
        hello |= {"error": str(error), "code": error.exit_code}
    hellos = control.gather(hello)
    split = draft = None
    if hellos is not None:
        try:
            _compare(hellos)
            assert checkpoint is not None
            info, draft = model_info(checkpoint, settings), _open_draft(find_draft())
            info = info.with_draft(draft.info) if draft else info
            split = plan_split(info, machines or _machines(hellos), options.max_context, options.layer_split)
        except HippoError as error:
            control.fail(error)
    plan = None
    if split is not None:
        plan = {
            "counts": split.counts,
            "max_context": split.max_context,
            "can_batch": None if split.info.can_batch else False,
            "vocab_size": split.info.vocab_size,
        }
    verdict = control.share(plan)
    assert checkpoint is not None
    return Agreement(checkpoint, split=split, draft=draft, **verdict)


def _open_draft(source: ModelSource | None) -> DraftModel | None:
    if source is None:
        return None
    checkpoint = open_checkpoint(source)
    return DraftModel(checkpoint, model_info(checkpoint, KVSettings()))


def _hello(world: World, arguments: dict[str, str]) -> dict[str, Any]:
    return {
        "host": world.host,
        "versions": {
            **{name: version(name) for name in ("mlx", "mlx-lm", "hippo-mpi")},
            "hippo-mpi's files": source_digest(),
        },
        "arguments": arguments,
        "memory": available_bytes(),
        "speed": measured_speed(),
    }


def _compare(hellos: list[dict[str, Any]]) -> None:
    """Raise what the ranks found, or what they differ in."""
    for rank, hello in enumerate(hellos):
        if "error" in hello:
            everywhere = all(other.get("error") == hello["error"] for other in hellos)
            where = "" if everywhere else f"rank {rank} ({hello['host']}): "
            error = UserError(f"{where}{hello['error']}")
            error.exit_code = hello["code"]
            raise error
    for key, what in (("versions", "versions"), ("arguments", "command-line arguments"), ("digest", "models")):
        for rank, hello in enumerate(hellos):
            if hello[key] != hellos[0][key]:
                raise LaunchError(
                    f"rank 0 ({hellos[0]['host']}) and rank {rank} ({hello['host']}) have different {what}:"
                    f" {_differences(hellos[0][key], hello[key])}"
                )


def _differences(first: Any, second: Any) -> str:
    if isinstance(first, dict):
        keys = [key for key in {**first, **second} if first.get(key) != second.get(key)]
        return ", ".join(f"{key} {first.get(key)} and {second.get(key)}" for key in keys)
    return f"{first} and {second}"


def _machines(hellos: list[dict[str, Any]]) -> list[Machine]:
    """Budgets by rank: ranks on one host share its memory, and count as equally fast."""
    hosts = [hello["host"] for hello in hellos]
    by_host: dict[str, float] = {}
    for hello in hellos:
        by_host[hello["host"]] = max(by_host.get(hello["host"], 0.0), hello["speed"])
    fastest = max(by_host.values())
    speeds = {host: 1.0 if speed * _EQUAL_SPEED >= fastest else speed / fastest for host, speed in by_host.items()}
    memory = {host: min(h["memory"] for h in hellos if h["host"] == host) // hosts.count(host) for host in hosts}
    return [Machine(host, memory[host], speeds[host]) for host in hosts]


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
        start = sum(agreement.counts[: world.rank])
        stop = start + agreement.counts[world.rank]
        self._start, self._stop = start, stop
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
            self.stage = pipeline(checkpoint, agreement.counts, world.rank, loaded)
        except HippoError as caught:
            error = caught
        self._agree_that_loaded(error)
        self.channel = RingChannel(world, control)
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
        self._worker = Leader(self.stage, self.channel, self._settings, self.world.size, self.timeline)
        return self._worker

    def follow(self) -> None:
        """Obey until rank 0 calls `release`."""
        is_last = self.world.rank == self.world.size - 1
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
            "layers": [self._start, self._stop],
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
