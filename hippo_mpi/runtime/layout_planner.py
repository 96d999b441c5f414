"""Plans how ranks share a model: as they were asked to, or the way that measurement says is fastest."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import mlx.nn as nn

from hippo_mpi.checkpoint.checkpoint import Checkpoint, open_lazily
from hippo_mpi.config.links import LINKS, Link
from hippo_mpi.errors import PlanError, UserError
from hippo_mpi.planning.costs import ModelInfo
from hippo_mpi.planning.layer_split import LayerSplit, Machine, plan_alone, plan_split
from hippo_mpi.planning.layer_times import time_layers
from hippo_mpi.planning.layout_choice import (
    ALONE,
    PIPELINE,
    TENSOR,
    Comparison,
    ModelSizes,
    Way,
    best,
    link_times,
    reason,
    ways_to_share,
)
from hippo_mpi.planning.width_plan import WidthPart, plan_widths, width_shares
from hippo_mpi.runtime.rank_timing import Timed
from hippo_mpi.sharding.tensor import ShardPlan, plan_shards, restrict
from hippo_mpi.tracing.dataflow import Dataflow
from hippo_mpi.tracing.twin import blank_twin
from hippo_mpi.transport.control import Control
from hippo_mpi.transport.local_collective import AbsentRanks
from hippo_mpi.transport.pulse import Activity
from hippo_mpi.units import count_of


@dataclass(frozen=True)
class PlanConstraints:
    """What people have fixed of the plan; the same on every rank."""

    layer_split: tuple[int, ...] | None
    max_context: int | None
    num_draft_tokens: int = 0
    parallel: str = PIPELINE  # or "tensor": each rank holds a part of every layer; or "auto": what is faster
    width_split: tuple[int, ...] | None = None
    num_stages: int = 1  # of ranks that share each layer
    is_exact: bool = False  # whether nothing is added up over the ranks
    collectives: str | None = None  # "graph" or "stepwise"
    layout: str | None = None  # what "auto" would take, by name: nothing is timed
    load: str = "one"  # for which "auto" chooses
    is_load_given: bool = False  # by people, rather than by the command
    link: Link | None = None  # between machines that aren't here
    has_comparison: bool = False  # whether what each way gives is shown, at every load, also if none is to be chosen

    @property
    def compares(self) -> bool:
        """Whether the ways to share the model are timed."""
        return (self.parallel == "auto" and self.layout is None) or self.has_comparison


@dataclass(frozen=True)
class PlannedLayout:
    """How ranks share a model.

    Args:
        split: what each rank holds.
        shards: how each layer is split, if it is.
        name: of the way, if it is one of those that are compared.
        comparison: by what it was chosen, if it was.
        problems: why ways of the comparison can't be taken, by name.
        notes: sentences for people, about what was found on the way.
    """

    split: LayerSplit
    shards: ShardPlan | None = None
    name: str | None = None
    comparison: Comparison | None = None
    problems: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class LayoutPlanner:
    """Rank 0's plans of how ranks share a model.

    Args:
        checkpoint: the model.
        info: its costs.
        machines: by rank.
        constraints: what people have fixed.
        control: told of progress.

    Raises:
        UserError: the constraints don't go together.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        info: ModelInfo,
        machines: Sequence[Machine],
        constraints: PlanConstraints,
        control: Control,
    ) -> None:
        self._checkpoint, self._info, self._machines = checkpoint, info, machines
        self._asked, self._control = constraints, control
        self._check()

    def _check(self) -> None:
        asked, num_ranks = self._asked, len(self._machines)
        if asked.parallel == PIPELINE:
            for option, is_given, instead in (
                ("--width-split", asked.width_split is not None, ", and --layer-split gives their numbers"),
                ("--tensor exact", asked.is_exact, ": it is always exact"),
                ("--stages", asked.num_stages > 1, ": it has as many stages as ranks"),
                ("--collectives", asked.collectives is not None, ": it has no sums"),
            ):
                if is_given:
                    raise UserError(
                        f"{option} is for --parallel tensor; in a pipeline, each rank holds whole layers{instead}"
                    )
        elif asked.layer_split is not None and asked.num_stages == 1:
            raise UserError(
                f"--layer-split is for --parallel pipeline; with {asked.parallel}, --width-split 5,3 gives parts of each"
                " layer"
            )
        if asked.layout is not None and asked.parallel != "auto":
            raise UserError(
                f"--layout {asked.layout} is for --parallel auto, of whose table it takes one without timing"
            )
        if asked.is_load_given and asked.parallel != "auto":
            raise UserError("--plan-for is for --parallel auto, which chooses by it")
        if asked.num_stages > 1 and asked.parallel == "auto":
            raise UserError("--stages is for --parallel tensor; auto compares numbers of stages itself")
        if asked.num_stages > 1 and asked.compares:
            raise UserError("--stages is for --parallel tensor, without --simulate: what is compared are other ways")
        if asked.num_stages > 1 and (num_ranks % asked.num_stages or num_ranks == asked.num_stages):
            raise UserError(
                f"--stages {asked.num_stages} needs {2 * asked.num_stages}, {3 * asked.num_stages} ... ranks: as many in"
                f" each stage, at least 2; there {'is' if num_ranks == 1 else 'are'} {num_ranks}"
            )
        if asked.num_stages > 1 and asked.layer_split is not None and len(asked.layer_split) != asked.num_stages:
            text = ",".join(map(str, asked.layer_split))
            raise UserError(
                f"--layer-split {text} is for {len(asked.layer_split)} stages, but --stages is {asked.num_stages}"
            )
        if asked.width_split is not None:
            width_shares(self._teams(), asked.width_split)
        if asked.num_stages > 1 and self._checkpoint.flow.num_rounds > 1:
            raise UserError("--stages can't be used with this model, which goes through its layers several times")

    def plan(self) -> PlannedLayout:
        """Plan what was asked for.

        Raises:
            PlanError: it doesn't fit.
        """
        if self._asked.parallel == PIPELINE or len(self._machines) == 1:
            return self.pipeline()
        if self._asked.layout is not None:
            return self._named(self._asked.layout)
        shards = self.widths()
        notes = self._held_whole(shards)
        if not shards.is_whole:
            return PlannedLayout(self._fitted(shards), shards, notes=notes)
        none = "no layer of this model can be split over ranks: each rank gets some layers instead"
        return self.pipeline(*notes, none)

    def pipeline(self, *notes: str) -> PlannedLayout:
        """Plan a pipeline of whole layers.

        Raises:
            PlanError: it doesn't fit.
        """
        split = plan_split(self._info, self._machines, self._asked.max_context, self._asked.layer_split)
        return PlannedLayout(split, notes=notes)

    def alone(self) -> PlannedLayout:
        """Plan the whole model on rank 0, for as long a context as a pipeline has room for.

        Raises:
            PlanError: rank 0 hasn't room for it.
        """
        try:
            context = self.pipeline().split.max_context
        except PlanError:  # then for what rank 0 has room for
            context = plan_split(self._info, self._machines[:1], self._asked.max_context).max_context
        return PlannedLayout(plan_alone(self._info, self._machines, context))

    def widths(self) -> ShardPlan:
        """Find how the layers can be split over the ranks of a stage, by speed or as it was asked for."""
        asked = self._asked
        shares = width_shares(self._teams(), asked.width_split)
        self._trying()  # opening the model, and trying its first layer, may take longer than a silence may
        # In a pipeline of stages, the last hidden states come back to rank 0 alone.
        return plan_shards(self._twin(), shares, self._trying, asked.is_exact, has_whole_head=asked.num_stages > 1)

    def planned(self, shards: ShardPlan, timed: Sequence[Timed], include_sums: bool) -> PlannedLayout:
        """Plan what was asked for, or choose, beside what the ways to share the model would give.

        Raises:
            PlanError: it doesn't fit.
        """
        comparison = self.compare(shards, timed, include_sums)
        if self._asked.parallel == "auto" and self._asked.layout is None:
            return self.choose(shards, comparison)
        return replace(self.plan(), comparison=comparison, problems=self._problems())

    def compare(self, shards: ShardPlan, timed: Sequence[Timed], include_sums: bool) -> Comparison:
        """Return what ways to share the model are compared by, from what the ranks have timed."""
        counts = {}
        for num_stages in self._numbers_of_stages():
            with contextlib.suppress(PlanError):
                counts[num_stages] = self._layers_of_stages(num_stages)
        sizes = _sizes(self._checkpoint.flow, self._info)
        times, can_split_head = [one.layers for one in timed], shards.head is not None
        found = Comparison(times, counts, can_split_head, sizes, timed[0].link, include_sums)
        return found if self._asked.link is None else found.over(self._asked.link)

    def choose(self, shards: ShardPlan, comparison: Comparison) -> PlannedLayout:
        """Take the fastest way that fits.

        Raises:
            PlanError: none fits.
        """
        load, problems = self._asked.load, self._problems()
        predictions = comparison.predictions(problems)
        while not all(one.problem for one in predictions):
            chosen = best(predictions, load)
            try:
                found = self._shared(shards, chosen.way)
            except PlanError as error:
                problems[chosen.name] = _first_line(error)
                predictions = comparison.predictions(problems)
                continue
            notes = (*found.notes, reason(chosen, predictions, load))
            return replace(found, comparison=comparison, problems=problems, notes=notes)
        return self.pipeline()  # which says what doesn't fit

    def _problems(self) -> dict[str, str]:
        """Return why one rank alone can't be taken, if so, by its name: what no link changes."""
        try:
            self.alone()
        except PlanError as error:
            return {ALONE: _first_line(error)}
        return {}

    def time_elsewhere(self, shards: ShardPlan) -> list[Timed]:
        """Time every rank's part here, for machines that aren't, and a link that isn't either."""
        model, _ = open_lazily(self._checkpoint.source)
        dtype = self._checkpoint.flow.hidden_dtype
        link = link_times(self._asked.link or LINKS[0], len(self._machines), dtype.size)
        return [
            Timed(
                time_layers(model, dtype, shards, rank, AbsentRanks(rank), self._trying).at_speed(machine.speed), link
            )
            for rank, machine in enumerate(self._machines)
        ]

    def _named(self, name: str) -> PlannedLayout:
        """Plan one of the ways that would be compared.

        Raises:
            UserError: there is none of this name.
        """
        if name in (PIPELINE, ALONE):  # also of a model whose layers can't be split
            return self._shared(None, Way(name))
        shards = self.widths()
        paths = dict.fromkeys(path for layer in shards.layers for path in layer.columns)
        ways = ways_to_share(paths, shards.head is not None, self._numbers_of_stages(), len(self._machines))
        for way in ways:
            if way.name == name:
                return self._shared(shards, way)
        known = ", ".join(f"'{way.name}'" for way in ways)
        ranks = count_of(len(self._machines), "rank")
        raise UserError(f"--layout '{name}' isn't among the layouts of this model on {ranks}: {known}")

    def _shared(self, shards: ShardPlan | None, way: Way) -> PlannedLayout:
        """Plan one of the ways that are compared.

        Raises:
            PlanError: it doesn't fit.
        """
        if way.num_stages > 1:
            asked = replace(
                self._asked,
                parallel=TENSOR,
                num_stages=way.num_stages,
                has_comparison=False,
                is_load_given=False,
                layout=None,
            )
            found = LayoutPlanner(self._checkpoint, self._info, self._machines, asked, self._control).plan()
        elif way.name == ALONE:
            found = self.alone()
        else:
            found = self._by_width(shards, way) if shards is not None and way.blocks else self.pipeline()
        return replace(found, name=way.name)

    def _by_width(self, shards: ShardPlan, way: Way) -> PlannedLayout:
        """Return the plan in which only some blocks of each layer are split."""
        notes = self._held_whole(shards)
        if way.name != TENSOR:
            shards = restrict(self._twin(), shards, way.blocks, way.has_split_head, self._trying)
        return PlannedLayout(self._fitted(shards), shards, notes=notes)

    def _held_whole(self, shards: ShardPlan) -> tuple[str, ...]:
        """Return sentences about what every rank holds whole, which takes memory."""
        notes = [f"layer {layer} stays whole on every rank: {why}" for layer, why in shards.refused.items()]
        ranks = range(shards.num_ranks)
        count = sum(
            cache.bytes_at(1) > 0 and all(layer.cache_share(rank) == 1 for rank in ranks)
            for layer, cache in zip(shards.layers, self._info.caches, strict=True)
        )
        if count:
            notes.append(f"the caches of {count_of(count, 'layer')} are whole on every rank, which needs all of them")
        return tuple(notes)

    def _fitted(self, shards: ShardPlan) -> LayerSplit:
        """Return what each rank holds: of all layers, or of those of its stage."""
        num_shards, asked = shards.num_ranks, self._asked
        counts = [self._info.num_layers] if asked.num_stages == 1 else self._layers_of_stages(asked.num_stages)
        parts = []
        for rank in range(len(self._machines)):
            stage, place = divmod(rank, num_shards)
            layers = (sum(counts[:stage]), sum(counts[: stage + 1]))
            moved = shards.moved_head_bytes(place) if stage == 0 else 0
            head = shards.head_share(place) if stage == 0 else 0.0
            # The first layer's counts whole: a draft model's caches, which stay so, are counted with it.
            caches = tuple(shards.layers[layer].cache_share(place) if layer > 0 else 1.0 for layer in range(*layers))
            parts.append(WidthPart(layers, shards.held_bytes(place, layers), moved, head, caches))
        return plan_widths(self._info, self._machines, parts, num_shards, asked.max_context)

    def _numbers_of_stages(self) -> list[int]:
        """Return how many stages there can be: as many as ranks, or fewer, of several ranks each."""
        num_ranks = len(self._machines)
        is_looped = self._checkpoint.flow.num_rounds > 1
        fewer = [] if is_looped else [number for number in range(2, num_ranks // 2 + 1) if num_ranks % number == 0]
        return [num_ranks, *fewer]

    def _layers_of_stages(self, num_stages: int) -> list[int]:
        """Return how many layers each stage gets.

        Raises:
            PlanError: they don't fit.
        """
        size = len(self._machines) // num_stages
        stages = [_together(self._machines[first : first + size]) for first in range(0, len(self._machines), size)]
        return plan_split(self._info, stages, self._asked.max_context, self._asked.layer_split).counts

    def _teams(self) -> list[Machine]:
        """Return, for each place in a stage, a machine as fast as those that have it in all stages together."""
        num_shards = len(self._machines) // self._asked.num_stages
        return [_together(self._machines[place::num_shards]) for place in range(num_shards)]

    def _twin(self) -> nn.Module:
        model, _ = open_lazily(self._checkpoint.source)
        return blank_twin(model)

    def _trying(self) -> None:
        self._control.progress("trying how the layers can be split", Activity.COMPUTING)


def _together(machines: Sequence[Machine]) -> Machine:
    """Return a machine with the memory and the speed of several, each of which gets an equal part."""
    memory = len(machines) * min(machine.memory_bytes for machine in machines)
    return replace(machines[0], memory_bytes=memory, speed=sum(machine.speed for machine in machines))


def _sizes(flow: Dataflow, info: ModelInfo) -> ModelSizes:
    shapes = [shape for call in flow.calls for shape in call.outputs.values()]
    hidden = max((dim.constant for shape in shapes[:1] for dim in shape.dims), default=1)
    return ModelSizes(hidden, info.vocab_size, flow.hidden_dtype.size, sum(len(call.prepared) for call in flow.calls))


def _first_line(error: PlanError) -> str:
    return str(error).partition("\n")[0]
