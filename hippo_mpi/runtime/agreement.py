"""What all ranks agree on before a weight is loaded: versions, arguments, the model, and who holds which layers.

Every rank takes part in every exchange, also one that has found an error: so all of them learn of it, rank 0
says it in one line, and all end with the same status.
"""

from __future__ import annotations

import os
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

from hippo_mpi.checkpoint.checkpoint import Checkpoint, ModelSource, open_checkpoint, open_lazily
from hippo_mpi.config.checks import above_0
from hippo_mpi.environment import SPEED
from hippo_mpi.errors import HippoError, LaunchError, UserError, error_with_status
from hippo_mpi.planning.costs import ModelInfo
from hippo_mpi.planning.layer_split import LayerSplit, Machine, plan_split
from hippo_mpi.planning.machine import available_bytes, measured_speeds, usual_flops_per_byte
from hippo_mpi.planning.model_costs import model_info
from hippo_mpi.planning.width_plan import plan_widths, width_shares
from hippo_mpi.runtime.source_digest import source_digest
from hippo_mpi.sharding.slot_caches import KVSettings
from hippo_mpi.sharding.tensor import ShardPlan, plan_shards
from hippo_mpi.tracing.twin import blank_twin
from hippo_mpi.transport.control import Control
from hippo_mpi.transport.layout import Layout
from hippo_mpi.transport.pulse import Activity
from hippo_mpi.transport.world import World

_EQUAL_SPEED = 1.1  # speeds closer than this are taken for the same: a measurement isn't better


@dataclass
class Introduction:
    """What a rank says of itself before anything is agreed on.

    Attributes:
        speed: relative to other machines: bytes per second, or what somebody has said.
        is_measured: whether the speed is.
        flops_per_byte: as in `Machine`.
        digest: of the checkpoint's tensors; empty without one.
        error, exit_code: what it found wrong with its options or its checkpoint.
    """

    host: str
    versions: dict[str, str]
    arguments: dict[str, str]
    memory_bytes: int
    speed: float
    is_measured: bool
    flops_per_byte: float
    digest: str = ""
    error: str = ""
    exit_code: int = 0


@dataclass(frozen=True)
class PlanConstraints:
    """What people have fixed of the plan; the same on every rank."""

    layer_split: tuple[int, ...] | None
    max_context: int | None
    num_draft_tokens: int = 0
    is_tensor: bool = False  # whether each rank holds a part of every layer
    width_split: tuple[int, ...] | None = None
    collectives: str | None = None  # "graph" or "stepwise"


@dataclass(frozen=True)
class _Plan:
    """What rank 0 has planned, as in `Agreement`."""

    counts: list[int]
    max_context: int
    can_batch: bool | None
    vocab_size: int
    shards: ShardPlan | None = None


@dataclass
class DraftModel:
    """A small model that lies whole on rank 0."""

    checkpoint: Checkpoint
    info: ModelInfo


@dataclass
class Agreement:
    """What all ranks have agreed on before a weight is loaded. `split` and `draft` are on rank 0 only."""

    checkpoint: Checkpoint
    counts: list[int]  # layers of each stage
    max_context: int
    can_batch: bool | None  # False: mlx-lm can't run rows together; None: the model must be asked
    vocab_size: int
    split: LayerSplit | None
    draft: DraftModel | None = None
    shards: ShardPlan | None = None  # how each layer is split, if it is
    collectives: str | None = None  # as in `PlanConstraints`

    @property
    def layout(self) -> Layout:
        """Return how the ranks share the model."""
        return Layout(len(self.counts)) if self.shards is None else Layout(1, shards=self.shards.num_ranks)

    def layers_of(self, rank: int) -> tuple[int, int]:
        """Return the layers [start, stop) of a rank."""
        stage = self.layout.place(rank).stage
        start = sum(self.counts[:stage])
        return start, start + self.counts[stage]


def compare_ranks(world: World, control: Control, arguments: dict[str, str]) -> list[Machine]:
    """Compare the ranks' versions and arguments; their budgets, on rank 0 (elsewhere none).

    Raises:
        HippoError: they differ; for ranks other than 0 the process ends instead.
    """
    introductions = control.gather(_introduce(world, control, arguments))
    if introductions is None:
        return []
    try:
        _compare(introductions)
    except HippoError as error:
        control.fail(error)
    return machines_of(introductions)


def negotiate(
    world: World,
    control: Control,
    find_source: Callable[[], ModelSource],
    constraints: PlanConstraints,
    settings: KVSettings,
    arguments: dict[str, str],
    machines: list[Machine] | None = None,
    find_draft: Callable[[], ModelSource | None] = lambda: None,
    shares_head: bool = False,
) -> Agreement:
    """Open the checkpoint on every rank, compare, and plan the split on rank 0: for the ranks, or for `machines` instead.

    Raises:
        HippoError: on every rank, if any rank found one; for ranks other than 0 the process ends instead.
    """
    control.progress("opening the checkpoint")
    checkpoint, introduction = None, _introduce(world, control, arguments)
    try:
        checkpoint = open_checkpoint(find_source())
        introduction.digest = checkpoint.digest()
    except HippoError as error:
        introduction.error, introduction.exit_code = str(error), error.exit_code
    introductions = control.gather(introduction)
    split = draft = shards = None
    if introductions is not None:
        try:
            _compare(introductions)
            assert checkpoint is not None
            info, draft = model_info(checkpoint, settings, shares_head), _open_draft(find_draft())
            info = info.with_draft(draft.info, constraints.num_draft_tokens) if draft else info
            split, shards = _planned(checkpoint, info, machines or machines_of(introductions), constraints, control)
        except HippoError as error:
            control.fail(error)
    plan = None
    if split is not None:
        can_batch = None if split.info.can_batch else False
        counts = split.counts if shards is None else [split.info.num_layers]
        plan = _Plan(counts, split.max_context, can_batch, split.info.vocab_size, shards)
    plan = control.share(plan, _Plan)
    assert checkpoint is not None
    return Agreement(checkpoint, **vars(plan), split=split, draft=draft, collectives=constraints.collectives)


def _planned(
    checkpoint: Checkpoint, info: ModelInfo, machines: list[Machine], constraints: PlanConstraints, control: Control
) -> tuple[LayerSplit, ShardPlan | None]:
    """Return which rank holds what; if each holds a part of every layer, also how layers are split."""
    layer_split, width_split = constraints.layer_split, constraints.width_split
    if constraints.is_tensor and layer_split is not None:
        raise UserError(
            "--layer-split is for --parallel pipeline; with tensor, --width-split 5,3 gives parts of each layer"
        )
    if width_split is not None and not constraints.is_tensor:
        raise UserError("--width-split is for --parallel tensor; in a pipeline, --layer-split gives layers per rank")
    if constraints.is_tensor and len(machines) > 1:
        shares = width_shares(machines, width_split)
        model, _ = open_lazily(checkpoint.source)
        doing = "trying how the layers can be split"
        shards = plan_shards(blank_twin(model), shares, lambda: control.progress(doing, Activity.COMPUTING))
        for layer, why in shards.refused.items():
            sys.stderr.write(f"layer {layer} stays whole on every rank: {why}\n")
        if not shards.is_whole:
            return plan_widths(info, machines, shards.held_bytes, constraints.max_context), shards
        sys.stderr.write("no layer of this model can be split over ranks: each rank gets some layers instead\n")
    return plan_split(info, machines, constraints.max_context, layer_split), None


def _open_draft(source: ModelSource | None) -> DraftModel | None:
    if source is None:
        return None
    checkpoint = open_checkpoint(source)
    return DraftModel(checkpoint, model_info(checkpoint, KVSettings()))


def _introduce(world: World, control: Control, arguments: dict[str, str]) -> Introduction:
    versions = {name: version(name) for name in ("mlx", "mlx-lm", "hippo-mpi")}
    versions["hippo-mpi's files"] = source_digest()
    introduction = partial(Introduction, world.host, versions, arguments, available_bytes())
    given = given_speed()
    if len(set(control.hosts)) == 1:  # ranks of one machine are equally fast
        return introduction(given or 1.0, given is None, usual_flops_per_byte())
    control.progress("measuring this machine's speed")
    speeds = measured_speeds()
    return introduction(given or speeds.bytes_per_s, given is None, speeds.flops_per_s / speeds.bytes_per_s)


def given_speed() -> float | None:
    """Return the speed that the hostfile has for this rank's host, if it has one.

    Raises:
        LaunchError: it is no number above 0.
    """
    if SPEED not in os.environ:
        return None
    try:
        return above_0(os.environ[SPEED])
    except ArgumentTypeError as error:
        raise LaunchError(f"{SPEED}: {error}") from None


def _compare(introductions: list[Introduction]) -> None:
    """Raise what the ranks found, or what they differ in."""
    for rank, introduction in enumerate(introductions):
        if introduction.error:
            everywhere = all(other.error == introduction.error for other in introductions)
            where = "" if everywhere else f"rank {rank} ({introduction.host}): "
            raise error_with_status(introduction.exit_code, f"{where}{introduction.error}")
    first = introductions[0]
    for rank, other in enumerate(introductions):
        for what, ours, theirs in (
            ("versions", first.versions, other.versions),
            ("command-line arguments", first.arguments, other.arguments),
            ("models", first.digest, other.digest),
        ):
            if ours != theirs:
                raise LaunchError(
                    f"rank 0 ({first.host}) and rank {rank} ({other.host}) have different {what}:"
                    f" {_differences(ours, theirs)}"
                )


def _differences(first: Any, second: Any) -> str:
    if isinstance(first, dict):
        keys = [key for key in {**first, **second} if first.get(key) != second.get(key)]
        return ", ".join(f"{key} {first.get(key)} and {second.get(key)}" for key in keys)
    return f"{first} and {second}"


def machines_of(introductions: list[Introduction]) -> list[Machine]:
    """Return budgets by rank: ranks on one host share its memory, and count as equally fast.

    Where somebody has said how fast hosts are, those of which nothing was said have the speed 1.
    """
    hosts = [one.host for one in introductions]
    by_host: dict[str, float] = {}
    is_measured = all(one.is_measured for one in introductions)
    for one in introductions:
        speed = one.speed if is_measured or not one.is_measured else 1.0
        by_host[one.host] = max(by_host.get(one.host, 0.0), speed)
    fastest = max(by_host.values())
    equal = _EQUAL_SPEED if is_measured else 1.0
    speeds = {host: 1.0 if speed * equal >= fastest else speed / fastest for host, speed in by_host.items()}
    memory = {host: min(one.memory_bytes for one in introductions if one.host == host) for host in hosts}
    memory = {host: shared_bytes // hosts.count(host) for host, shared_bytes in memory.items()}
    return [Machine(one.host, memory[one.host], speeds[one.host], one.flops_per_byte) for one in introductions]
