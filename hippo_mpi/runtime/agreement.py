"""What all ranks agree on before a weight is loaded: versions, arguments, the model, and who holds which layers.

Every rank takes part in every exchange, also one that has found an error: so all of them learn of it, rank 0
says it in one line, and all end with the same status.
"""

from __future__ import annotations

import os
from argparse import ArgumentTypeError
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

from hippo_mpi.checkpoint.checkpoint import Checkpoint, ModelSource, open_checkpoint
from hippo_mpi.config.checks import above_0
from hippo_mpi.environment import SPEED
from hippo_mpi.errors import HippoError, LaunchError, PlanError, UserError, error_with_status
from hippo_mpi.planning.costs import ModelInfo
from hippo_mpi.planning.layer_split import LayerSplit, Machine
from hippo_mpi.planning.machine import available_bytes, measured_speeds, usual_flops_per_byte
from hippo_mpi.planning.model_costs import model_info
from hippo_mpi.runtime.layout_planner import LayoutPlanner, PlanConstraints, PlannedLayout
from hippo_mpi.runtime.rank_timing import time_rank
from hippo_mpi.runtime.source_digest import source_digest
from hippo_mpi.sharding.slot_caches import KVSettings
from hippo_mpi.sharding.tensor import ShardPlan
from hippo_mpi.transport.collective import is_in_graph
from hippo_mpi.transport.control import Control
from hippo_mpi.transport.layout import Layout
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
    """What all ranks have agreed on before a weight is loaded. `planned` and `draft` are on rank 0 only."""

    checkpoint: Checkpoint
    counts: list[int]  # layers of each stage
    max_context: int
    can_batch: bool | None  # False: mlx-lm can't run rows together; None: the model must be asked
    vocab_size: int
    planned: PlannedLayout | None
    draft: DraftModel | None = None
    shards: ShardPlan | None = None  # how each layer is split, if it is
    collectives: str | None = None  # as in `PlanConstraints`

    @property
    def split(self) -> LayerSplit | None:
        """Return what each rank holds; on rank 0 only."""
        return None if self.planned is None else self.planned.split

    @property
    def layout(self) -> Layout:
        """Return how the ranks share the model."""
        return Layout(len(self.counts), shards=1 if self.shards is None else self.shards.num_ranks)

    @property
    def num_busy_stages(self) -> int:
        """Return how many stages have layers: all, or only the first, if rank 0 alone is faster."""
        return sum(count > 0 for count in self.counts)

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
    say: Callable[[str], None] = lambda _: None,
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
    draft = planner = None
    if introductions is not None:
        try:
            _compare(introductions)
            assert checkpoint is not None
            info, draft = model_info(checkpoint, settings, shares_head), _open_draft(find_draft())
            info = info.with_draft(draft.info, constraints.num_draft_tokens) if draft else info
            planner = LayoutPlanner(checkpoint, info, machines or machines_of(introductions), constraints, control)
        except HippoError as error:
            control.fail(error)
    layout = plan = None
    try:
        if constraints.compares and (len(machines) if machines else world.size) > 1:
            if checkpoint is not None:  # otherwise rank 0 knows by now, and ends all of them
                layout = _compared(planner, checkpoint, constraints, world, control, machines is None, say)
        elif planner is not None:
            layout = planner.plan()
    except HippoError as error:
        control.fail(error)
    if layout is not None:
        info, shards = layout.split.info, layout.shards
        can_batch = None if info.can_batch else False
        plan = _Plan(layout.split.counts, layout.split.max_context, can_batch, info.vocab_size, shards)
    plan = control.share(plan, _Plan)
    assert checkpoint is not None
    return Agreement(checkpoint, **vars(plan), planned=layout, draft=draft, collectives=constraints.collectives)


@dataclass(frozen=True)
class _Offer:
    """How layers could be split, for every rank to time; None: they can't be, for the reason `why_not`."""

    shards: ShardPlan | None
    why_not: str = ""


def _compared(
    planner: LayoutPlanner | None,
    checkpoint: Checkpoint,
    constraints: PlanConstraints,
    world: World,
    control: Control,
    is_here: bool,
    say: Callable[[str], None],
) -> PlannedLayout | None:
    """Time what the ways to share a model take, on every rank; return rank 0's plan.

    Args:
        planner: rank 0's.
        checkpoint: the model.
        constraints: the same on every rank.
        world: the ranks.
        control: to the others.
        is_here: whether the ranks are those that are planned for.
        say: tells people on rank 0 that this takes a while.
    """
    offer = None
    if planner is not None:
        if constraints.parallel == "auto" and constraints.layout is None:
            say(
                "timing layers to choose a layout, for 10 s or more; --layout with the name of what is chosen starts without"
            )
        try:
            offer = _Offer(planner.widths())
        except UserError as error:  # such as adapters that can't be fused
            if constraints.parallel != "auto" or isinstance(error, PlanError):
                raise
            offer = _Offer(None, str(error))
    if is_here:
        offer = control.share(offer, _Offer)
    if offer is None or offer.shards is None:
        return planner.pipeline(offer.why_not) if planner is not None and offer is not None else None
    if not is_here:
        assert planner is not None
        return planner.planned(offer.shards, planner.time_elsewhere(offer.shards), include_sums=False)
    is_lazy, include_sums = is_in_graph(constraints.collectives), constraints.link is None
    only_load = not constraints.has_comparison
    own = time_rank(checkpoint, offer.shards, world, control, is_lazy, include_sums, constraints.load, only_load)
    timed = control.gather(own)
    return None if planner is None or timed is None else planner.planned(offer.shards, timed, include_sums)


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
