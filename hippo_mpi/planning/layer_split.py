"""Plans which rank holds which layers: from budgets and costs to a LayerSplit and its explanation. Pure arithmetic."""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hippo_mpi.config.checks import above_0
from hippo_mpi.errors import PlanError
from hippo_mpi.planning.costs import CacheCost, ModelInfo
from hippo_mpi.transport.layout import Layout
from hippo_mpi.units import count_of, layer_range, show_bytes

# What a rank needs besides weights and cache: activations, the interpreter, the libraries.
_WORKING_BYTES = 256 << 20
_CACHE_STEP_TOKENS = 256  # mlx-lm's caches grow by this many tokens at a time
# Prompt tokens for each token of an answer: what is asked is longer than what is said, above all by agents and of documents.
_PROMPT_SHARE = 4
# Operations of a GPU in the time in which it reads a byte; Apple's M1 to M4 have 30 to 40 by their nominal figures.
_GPU_FLOPS_PER_BYTE = 30.0
_PREFIX_SHARE = 8  # kept prefixes may take one part in this many of the room for caches


@dataclass(frozen=True)
class Machine:
    """A rank's budget: bytes it may fill, and how fast it is.

    Args:
        name: of the host.
        memory_bytes: that it may fill.
        speed: at which it reads weights, relative to the other machines.
        flops_per_byte: operations of a long prompt in the time in which it reads a byte of weights.
    """

    name: str
    memory_bytes: int
    speed: float = 1.0
    flops_per_byte: float = _GPU_FLOPS_PER_BYTE

    @classmethod
    def from_option(cls, text: str) -> Machine:
        """Parse NAME:GIBIBYTES[:SPEED].

        Raises:
            argparse.ArgumentTypeError: the text has another form.
        """
        parts = text.split(":")
        if len(parts) not in (2, 3):
            raise ArgumentTypeError(f"{text!r} is not NAME:GIBIBYTES[:SPEED]")
        speed = above_0(parts[2]) if len(parts) == 3 else 1.0
        return cls(parts[0], int(above_0(parts[1]) * 2**30), speed)


@dataclass(frozen=True)
class StagePlan:
    """One rank's part of a split: layers [start, stop), and what they cost there."""

    machine: Machine
    start: int
    stop: int
    weight_bytes: int  # embedding and head included on rank 0
    cache_bytes: int
    work: float  # for a token of an answer and the prompt tokens that go with it: bytes read, divided by the machine's speed
    share: float  # of all work
    # If it holds parts of its layers only: the bytes of these, and the costs of their caches.
    layer_bytes: int | None = None
    caches: tuple[CacheCost, ...] | None = None

    @property
    def margin_bytes(self) -> int:
        """Bytes of the machine's memory that stay free; negative if the stage doesn't fit."""
        return self.machine.memory_bytes - self.weight_bytes - self.cache_bytes - _WORKING_BYTES


@dataclass(frozen=True)
class LayerSplit:
    """Layers [start, stop) per rank, for a context of `max_context` tokens; `num_shards` ranks in turn share theirs."""

    stages: list[StagePlan]
    max_context: int
    info: ModelInfo
    num_shards: int = 1

    @property
    def counts(self) -> list[int]:
        """Layers per stage."""
        return [stage.stop - stage.start for stage in self.stages[:: self.num_shards]]

    @property
    def fits(self) -> bool:
        """True if every stage fits into its machine's memory."""
        return all(stage.margin_bytes >= 0 for stage in self.stages)

    def cache_room(self, max_rows: int) -> tuple[int, int | None]:
        """Return how many sequences may run at once, and how many tokens they may have together (None: any number).

        Only half of the room for caches is given out, because regrouping copies caches.

        Args:
            max_rows: most sequences wanted at once.
        """
        rows, tokens = max_rows, []
        for stage in self.stages:
            room = (stage.margin_bytes + stage.cache_bytes) // 2
            fixed = sum(cache.fixed for cache in self._caches_of(stage))
            rows = max(1, min(rows, room // fixed if fixed else rows))
        for stage in self.stages:
            caches = self._caches_of(stage)
            room = (stage.margin_bytes + stage.cache_bytes) // 2 - rows * sum(cache.fixed for cache in caches)
            if per_token := sum(cache.per_token for cache in caches):
                tokens.append(max(0, room // per_token))
        return rows, min(tokens, default=None)

    def prefix_room_bytes(self) -> int:
        """Return the bytes that every rank can spare for kept prefixes."""
        busy = [stage for stage in self.stages if stage.stop > stage.start]
        return max(0, min((stage.margin_bytes + stage.cache_bytes) // _PREFIX_SHARE for stage in busy))

    def sequence_bytes(self, num_tokens: int) -> int:
        """Return the bytes of a sequence's caches on the rank where they take most; they grow in steps."""
        held = -(-num_tokens // _CACHE_STEP_TOKENS) * _CACHE_STEP_TOKENS
        return max(sum(cache.bytes_at(held) for cache in self._caches_of(stage)) for stage in self.stages)

    def _caches_of(self, stage: StagePlan) -> list[CacheCost]:
        return self.info.caches[stage.start : stage.stop] if stage.caches is None else list(stage.caches)

    def table(self) -> str:
        """Return the plan as a text table with a line per rank."""
        head = f"{'rank':>4}  {'host':<16} {'layers':<9} {'weights':>9} {'KV cache':>9} {'memory':>9} {'margin':>9} {'work':>5}"
        how = f", each split over {self.num_shards} ranks" if self.num_shards > 1 else ""
        lines = [f"{count_of(self.info.num_layers, 'layer')}{how}, context of {self.max_context:,} tokens", head]
        for rank, stage in enumerate(self.stages):
            layers = layer_range(stage.start, stage.stop) + ("+head" if rank == 0 and len(self.stages) > 1 else "")
            lines.append(
                f"{rank:>4}  {stage.machine.name:<16.16} {layers:<9} {show_bytes(stage.weight_bytes):>9}"
                f" {show_bytes(stage.cache_bytes):>9} {show_bytes(stage.machine.memory_bytes):>9}"
                f" {show_bytes(stage.margin_bytes):>9} {stage.share:>4.0%}"
            )
        if self.info.forbidden_cuts:
            cuts = ", ".join(map(str, sorted(self.info.forbidden_cuts)))
            lines.append(f"this model can't be cut before layers {cuts}")
        return "\n".join([*lines, *(f"assumed: {assumption}" for assumption in self.info.assumptions)])

    def as_object(self) -> dict[str, Any]:
        """Return the plan for JSON, sizes in bytes."""
        return {
            "num_layers": self.info.num_layers,
            "max_context": self.max_context,
            "forbidden_cuts": sorted(self.info.forbidden_cuts),
            "assumptions": list(self.info.assumptions),
            "ranks_per_layer": self.num_shards,
            "ranks": [
                {
                    "machine": asdict(stage.machine),
                    "layers": [stage.start, stage.stop],
                    "layer_bytes": self._layer_bytes(stage),
                    "head_bytes": stage.weight_bytes - self._layer_bytes(stage),
                    "cache_bytes": stage.cache_bytes,
                    "working_bytes": _WORKING_BYTES,
                    "margin_bytes": stage.margin_bytes,
                    "work_share": stage.share,
                }
                for stage in self.stages
            ],
        }

    def _layer_bytes(self, stage: StagePlan) -> int:
        return sum(self.info.layer_bytes[stage.start : stage.stop]) if stage.layer_bytes is None else stage.layer_bytes


def plan_split(
    info: ModelInfo,
    machines: Sequence[Machine],
    max_context: int | None = None,
    layer_split: Sequence[int] | None = None,
) -> LayerSplit:
    """Return the split that minimises the slowest stage's time per token within every machine's memory.

    A token's time is that of reading the weights once for it, and of the operations for the prompt tokens that go with it.

    Args:
        info: costs of the model.
        machines: by rank.
        max_context: tokens of cache to plan for; None: the model's own limit, or the largest half, quarter ... of it
            that fits.
        layer_split: layers per rank to check instead of finding the best ones.

    Raises:
        PlanError: no allowed split fits, or `layer_split` is impossible.
    """
    context = max_context or info.max_positions or 4096
    if layer_split is not None:
        check_layer_split(info, len(machines), layer_split)
    elif len(machines) > 1 + sum(1 for cut in range(1, info.num_layers) if cut not in info.forbidden_cuts):
        raise PlanError(_too_many_ranks(info, len(machines)))
    while True:
        bounds = _bounds(layer_split) if layer_split is not None else _best_bounds(info, machines, context)
        split = _explain(info, machines, bounds or _even_bounds(info, len(machines)), context)
        if bounds is not None and split.fits:
            return split
        if max_context is not None or context <= 2048:
            raise PlanError(does_not_fit(split))
        context = max(2048, context // 2)


def plan_alone(info: ModelInfo, machines: Sequence[Machine], max_context: int) -> LayerSplit:
    """Return the split in which rank 0 holds every layer, and the other ranks none.

    Args:
        info: costs of the model.
        machines: by rank.
        max_context: tokens of cache to plan for.

    Raises:
        PlanError: rank 0's memory is too small.
    """
    split = _explain(info, machines, [0, *(info.num_layers for _ in machines)], max_context)
    if split.stages[0].margin_bytes < 0:
        missing = show_bytes(-split.stages[0].margin_bytes)
        raise PlanError(f"rank 0 has {missing} too little memory for it and a context of {max_context:,} tokens")
    return split


def _bounds(counts: Sequence[int]) -> list[int]:
    bounds = [0]
    for count in counts:
        bounds.append(bounds[-1] + count)
    return bounds


def _best_bounds(info: ModelInfo, machines: Sequence[Machine], context: int) -> list[int] | None:
    """Return the bounds whose slowest stage is fastest, by dynamic programming over ranks and layers; None if none."""
    num = info.num_layers
    allowed = [cut == num or cut not in info.forbidden_cuts for cut in range(num + 1)]
    best: list[tuple[float, float, list[int]] | None] = [None] * (num + 1)
    best[0] = (0.0, 0.0, [0])
    for rank, machine in enumerate(machines):
        first = rank == 0
        nxt: list[tuple[float, float, list[int]] | None] = [None] * (num + 1)
        for start, before in enumerate(best):
            if before is None or (first and start > 0):
                continue
            for stop in range(start + 1, num + 1):
                if not allowed[stop]:
                    continue
                stage = _stage(info, machine, start, stop, context, first)
                if stage.margin_bytes < 0:
                    break  # more layers need only more memory
                slowest = max(before[0], stage.work)
                # Among equals prefer the smaller sum of squares, so that no rank is left almost empty.
                candidate = (slowest, before[1] + stage.work**2, [*before[2], stop])
                held = nxt[stop]
                if held is None or candidate[:2] < held[:2]:
                    nxt[stop] = candidate
        best = nxt
    whole = best[num]
    return whole[2] if whole else None


def _stage(info: ModelInfo, machine: Machine, start: int, stop: int, context: int, first: bool) -> StagePlan:
    weights = sum(info.layer_bytes[start:stop]) + (info.head_bytes if first else info.shared_bytes)
    caches = sum(cache.bytes_at(context) for cache in info.caches[start:stop])
    decoding = sum(info.layer_work[start:stop]) + (info.head_work if first else 0.0)
    reading = _PROMPT_SHARE * sum(info.layer_flops[start:stop]) / machine.flops_per_byte  # which needs no head
    work = (decoding + reading) / machine.speed
    return StagePlan(machine, start, stop, weights, caches, work, 0.0)


def _explain(info: ModelInfo, machines: Sequence[Machine], bounds: list[int], context: int) -> LayerSplit:
    stages = [_stage(info, machine, bounds[i], bounds[i + 1], context, i == 0) for i, machine in enumerate(machines)]
    total = sum(stage.work for stage in stages) or 1.0
    shared = [StagePlan(**{**vars(stage), "share": stage.work / total}) for stage in stages]
    return LayerSplit(shared, context, info)


def _even_bounds(info: ModelInfo, num_ranks: int) -> list[int]:
    """Return an allowed, roughly even split, to show how far the model is from fitting."""
    cuts = [cut for cut in range(1, info.num_layers) if cut not in info.forbidden_cuts]
    step = (len(cuts) + 1) / num_ranks
    return [0, *(cuts[min(len(cuts) - 1, round(step * i) - 1)] for i in range(1, num_ranks)), info.num_layers]


def check_layer_split(info: ModelInfo, num_ranks: int, counts: Sequence[int]) -> None:
    """Check that a model can be split like this, whatever the ranks' memory.

    Args:
        info: the model's layers and forbidden cuts.
        num_ranks: ranks that there are.
        counts: layers per rank.

    Raises:
        PlanError: it can't; the message suggests another split.
    """
    text = ",".join(map(str, counts))
    even = ",".join(str(info.num_layers // num_ranks + (i < info.num_layers % num_ranks)) for i in range(num_ranks))
    if len(counts) != num_ranks:
        raise PlanError(
            f"layer split {text} is for {count_of(len(counts), 'rank')}, but there {'is' if num_ranks == 1 else 'are'}"
            f" {num_ranks} ({Layout(len(counts))}); try --layer-split {even}"
        )
    if min(counts) < 1:
        raise PlanError(f"layer split {text} leaves a rank without layers; try --layer-split {even}")
    if sum(counts) != info.num_layers:
        raise PlanError(
            f"layer split {text} covers {count_of(sum(counts), 'layer')} but the model has {info.num_layers};"
            f" try --layer-split {even}"
        )
    for cut in _bounds(counts)[1:-1]:
        if cut in info.forbidden_cuts:
            allowed = [c for c in range(1, info.num_layers) if c not in info.forbidden_cuts]
            raise PlanError(
                f"layer split {text} cuts before layer {cut}, where this model can't be cut ({info.forbidden_cuts[cut]});"
                f" it can be cut before {', '.join(map(str, allowed)) or 'none'}"
            )


def _too_many_ranks(info: ModelInfo, num_ranks: int) -> str:
    max_stages = 1 + sum(1 for cut in range(1, info.num_layers) if cut not in info.forbidden_cuts)
    if info.forbidden_cuts:
        why = next(iter(info.forbidden_cuts.values()))
        stages = count_of(max_stages, "stage")
        return f"{num_ranks} ranks, but this model can be cut into {stages} at most ({why}); use -n {max_stages}"
    return (
        f"{num_ranks} ranks, but the model has {count_of(info.num_layers, 'layer')}; use at most -n {info.num_layers}"
    )


def does_not_fit(split: LayerSplit) -> str:
    """Return the error for a plan that needs more memory than there is."""
    missing = sum(max(0, -stage.margin_bytes) for stage in split.stages)
    return (
        f"the model doesn't fit: {show_bytes(missing)} more memory needed; more ranks, a quantised model or a shorter"
        f" --max-context (now {split.max_context:,} tokens) would help\n{split.table()}"
    )
