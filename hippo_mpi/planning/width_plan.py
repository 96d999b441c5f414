"""Plans for ranks of which each holds a part of every layer: what each holds, and whether it fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hippo_mpi.errors import PlanError
from hippo_mpi.planning.costs import ModelInfo
from hippo_mpi.planning.layer_split import LayerSplit, Machine, StagePlan, does_not_fit
from hippo_mpi.units import count_of


def width_shares(machines: Sequence[Machine], width_split: Sequence[int] | None) -> list[float]:
    """Return each rank's share of every layer: as it was asked for, or by speed.

    Raises:
        PlanError: it was asked for another number of ranks, or for nothing of a layer.
    """
    parts = [machine.speed for machine in machines] if width_split is None else list(width_split)
    text = ",".join(map(str, parts))
    if len(parts) != len(machines):
        raise PlanError(
            f"width split {text} is for {count_of(len(parts), 'rank')}, but there {'is' if len(machines) == 1 else 'are'}"
            f" {len(machines)}; try"
            f" --width-split {','.join('1' for _ in machines)}"
        )
    if min(parts) <= 0:
        raise PlanError(f"width split {text} leaves a rank nothing of each layer; each needs a number above 0")
    return [part / sum(parts) for part in parts]


@dataclass(frozen=True)
class WidthPart:
    """What a rank holds if every layer is split.

    Args:
        layers: [start, stop).
        layer_bytes: weights of its parts of layers.
        moved_head_bytes: how much more it holds than if embedding, norm and head lay on rank 0.
        head_share: which part of the logits it makes.
        cache_shares: which part of each layer's cache it holds.
    """

    layers: tuple[int, int]
    layer_bytes: int
    moved_head_bytes: int
    head_share: float
    cache_shares: tuple[float, ...]


def plan_widths(
    info: ModelInfo,
    machines: Sequence[Machine],
    parts: Sequence[WidthPart],
    num_shards: int,
    max_context: int | None = None,
) -> LayerSplit:
    """Return what each rank holds if every layer is split.

    Args:
        info: costs of the model.
        machines: by rank.
        parts: what each rank holds.
        num_shards: ranks that hold a stage together.
        max_context: tokens of cache to plan for; None: the model's own limit, or the largest half, quarter ... of it
            that fits.

    Raises:
        PlanError: a rank's part doesn't fit.
    """
    context = max_context or info.max_positions or 4096
    while True:
        split = _split(info, machines, parts, num_shards, context)
        if split.fits:
            return split
        if max_context is not None or context <= 2048:
            raise PlanError(does_not_fit(split))
        context = max(2048, context // 2)


def _split(
    info: ModelInfo, machines: Sequence[Machine], parts: Sequence[WidthPart], num_shards: int, context: int
) -> LayerSplit:
    total = sum(part.layer_bytes + part.head_share * info.head_work for part in parts)
    stages = []
    for rank, (machine, part) in enumerate(zip(machines, parts, strict=True)):
        weights = part.layer_bytes + part.moved_head_bytes + (info.head_bytes if rank == 0 else 0)
        whole = info.caches[slice(*part.layers)]
        caches = tuple(cache.scaled(share) for cache, share in zip(whole, part.cache_shares, strict=True))
        held = sum(cache.bytes_at(context) for cache in caches)
        read = part.layer_bytes + part.head_share * info.head_work
        work = read / machine.speed
        stages.append(StagePlan(machine, *part.layers, weights, held, work, read / total, part.layer_bytes, caches))
    return LayerSplit(stages, context, info, num_shards)
