"""Chooses how ranks share a model, from measured times. Pure arithmetic.

Each rank gets some layers (a pipeline), or a part of every layer, or ranks form stages that share some layers.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise

from hippo_mpi.config.links import Link
from hippo_mpi.planning.layer_times import SHAPES, KindTimes, RankTimes
from hippo_mpi.units import show_rate

LOADS = ("one", "few", "many", "prompts")
"""What a layout is chosen for: answers of one request, of 4 or 16 at once, or long prompts."""

_SHAPE_OF = {load: SHAPES.index(shape) for load, shape in zip(LOADS, ((1, 1), (4, 1), (16, 1), (1, 256)), strict=True)}
_LOAD_WORDS = {"one": "for one request", "few": "for 4 at once", "many": "for 16 at once", "prompts": "of long prompts"}
_NEARLY = 0.95  # predictions are off by more
_LINK_BYTES = (4 << 10, 64 << 10, 1 << 20)
PIPELINE, TENSOR, ALONE = "pipeline", "tensor", "one rank alone"
_CHUNKS_IN_FLIGHT = 8  # pieces of a long prompt: filling a pipeline takes one for each of its other stages


def shapes_of(load: str, num_ranks: int) -> set[int]:
    """Return the places in SHAPES that a choice for a load hangs on: of its steps, and of pipelines', which are smaller.

    A stage of a pipeline is a rank, or a group of ranks.
    """
    place = _SHAPE_OF[load]
    rows, tokens = SHAPES[place]
    if tokens > 1:
        return {place - 1, place}  # a slow processor's times for it are concluded from those of many rows
    found = {place}
    for num_stages in (number for number in range(1, num_ranks + 1) if num_ranks % number == 0):
        smaller = _shape_of_rows(rows / min(rows, num_stages))
        found |= {math.floor(smaller), math.ceil(smaller)}
    return found


@dataclass(frozen=True)
class LinkTimes:
    """What messages between ranks cost.

    Args:
        sums: numbers of values, and the seconds that adding them up over all ranks takes.
        hops: bytes of a message, and the seconds until the next rank has it.
    """

    sums: tuple[tuple[int, float], ...]
    hops: tuple[tuple[int, float], ...]

    def sum_s(self, num_values: int) -> float:
        """Return the seconds to add up arrays of this size."""
        return _between(self.sums, num_values)

    def hop_s(self, num_bytes: int) -> float:
        """Return the seconds of a message of this size."""
        return _between(self.hops, num_bytes)


@dataclass(frozen=True)
class ModelSizes:
    """What travels.

    Args:
        hidden: values of a token's hidden state.
        vocab: values of its logits.
        value_bytes: of one of them.
        num_shared: arrays that rank 0 has prepared for layers, in each step.
    """

    hidden: int
    vocab: int
    value_bytes: int
    num_shared: int


@dataclass(frozen=True)
class Way:
    """A way to share the model.

    Args:
        name: as tables and --layout have it.
        blocks: of layers that are split by width, by path; empty if each rank gets some layers.
        has_split_head: whether the logits are made by all ranks, too.
        num_stages: groups of ranks that share some layers, if there is more than one.
    """

    name: str
    blocks: tuple[str, ...] = ()
    has_split_head: bool = False
    num_stages: int = 1


@dataclass(frozen=True)
class Prediction:
    """What a way to share the model would give.

    Args:
        way: to share it.
        tokens_per_s: by load.
        problem: why it can't be taken.
    """

    way: Way
    tokens_per_s: Mapping[str, float]
    problem: str = ""

    @property
    def name(self) -> str:
        """Name of the way."""
        return self.way.name


def ways_to_share(
    paths: Iterable[str], can_split_head: bool, numbers_of_stages: Collection[int], num_ranks: int
) -> list[Way]:
    """Return the ways to share a model: a pipeline, one rank, all of each layer split, only some of it, stages of ranks.

    Args:
        paths: of the linear layers whose results are added up if their block is split.
        can_split_head: whether logits can be made by all ranks.
        numbers_of_stages: that there can be: as many as ranks for a pipeline, fewer where ranks share each layer of a stage.
        num_ranks: that there are.
    """
    found = [Way(PIPELINE)] if num_ranks in numbers_of_stages else []
    found.append(Way(ALONE))
    names: dict[str, set[str]] = {}
    for path in paths:
        names.setdefault(path.partition(".")[0], set()).add(path)  # self_attn, mlp ...
    for count in range(len(names), 0, -1):
        for chosen in combinations(names, count):
            name = TENSOR if count == len(names) else f"{' and '.join(chosen)} only"
            blocks = tuple(sorted(path for one in chosen for path in names[one]))
            found.append(Way(name, blocks, can_split_head))
            if can_split_head:
                found.append(Way(f"{name}, head whole", blocks))
    fewer = [number for number in numbers_of_stages if names and number < num_ranks]
    return [*found, *(Way(f"{TENSOR}, {number} stages", num_stages=number) for number in fewer)]


def predict_pipeline(
    times: Sequence[RankTimes], counts: Sequence[int], link: LinkTimes, sizes: ModelSizes
) -> Mapping[str, float]:
    """Return the tokens per second of a pipeline, by load.

    Args:
        times: of each rank.
        counts: layers per rank.
        link: between two ranks.
        sizes: of what travels.
    """
    num_ranks = len(counts)
    bounds = [sum(counts[:rank]) for rank in range(num_ranks + 1)]

    def stage_s(rank: int, shape: float) -> float:
        layers = range(bounds[rank], bounds[rank + 1])
        return sum(
            _at(kind.whole, shape) * sum(1 for layer in kind.layers if layer in layers) for kind in times[rank].kinds
        )

    def rate(load: str) -> float:
        rows, tokens = SHAPES[_SHAPE_OF[load]]
        if load == "prompts":
            hop = link.hop_s(tokens * sizes.hidden * sizes.value_bytes) if num_ranks > 1 else 0.0
            stages = [stage_s(rank, _SHAPE_OF[load]) + (hop if num_ranks > 1 else 0.0) for rank in range(num_ranks)]
            return tokens * _CHUNKS_IN_FLIGHT / (sum(stages) + max(stages) * (_CHUNKS_IN_FLIGHT - 1))
        batches = min(rows, num_ranks)
        shape = _shape_of_rows(rows / batches)
        stages = [stage_s(rank, shape) for rank in range(num_ranks)]
        stages[0] += _at(times[0].head, shape)
        hop = link.hop_s(round(rows / batches) * sizes.hidden * sizes.value_bytes) if num_ranks > 1 else 0.0
        return rows / max(batches * max(stages), sum(stages) + num_ranks * hop)

    return {load: rate(load) for load in LOADS}


def stages_of_ranks(
    times: Sequence[RankTimes], num_stages: int, link: LinkTimes, sizes: ModelSizes, include_sums: bool
) -> tuple[list[RankTimes], LinkTimes]:
    """Return what a pipeline whose stages are groups of ranks is predicted from, as if each group was a rank.

    What a part of a layer takes in a group is concluded from what it takes among all ranks: what doesn't get less by
    splitting stays. Sums in a group are messages from one rank to the next, and back.

    Args:
        times: of each rank.
        num_stages: of as many ranks each.
        link: between the ranks.
        sizes: of what travels.
        include_sums: whether the times are those of layers together with their sums.
    """
    num_shards = len(times) // num_stages
    there_and_back = 2 * (num_shards - 1)
    gained = (1 - 1 / num_shards) / (1 - 1 / len(times))

    def part_s(kind: KindTimes, index: int) -> float:
        rows, tokens = SHAPES[index]
        given = [rows * tokens * values for path in kind.exchanges for values in kind.exchanges[path]]
        split_s = kind.split[index] - (sum(map(link.sum_s, given)) if include_sums else 0.0)
        saved_s = (kind.whole[index] - split_s) * gained
        messages_s = there_and_back * sum(link.hop_s(num_values * sizes.value_bytes) for num_values in given)
        return kind.whole[index] - saved_s + messages_s

    stages = []
    for first in range(0, len(times), num_shards):
        kinds = []
        for place, kind in enumerate(times[first].kinds):
            same = [rank.kinds[place] for rank in times[first : first + num_shards]]
            seconds = tuple(max(part_s(one, index) for one in same) for index in range(len(SHAPES)))
            kinds.append(KindTimes(kind.layers, seconds, seconds))
        stages.append(replace(times[first], kinds=tuple(kinds)))
    # What arrives at the first rank of a group is shared by a sum.
    hops = tuple((size, (1 + there_and_back) * seconds) for size, seconds in link.hops)
    return stages, replace(link, hops=hops)


def predict_widths(
    times: Sequence[RankTimes],
    blocks: Sequence[str],
    has_split_head: bool,
    link: LinkTimes,
    sizes: ModelSizes,
    include_sums: bool,
) -> Mapping[str, float]:
    """Return the tokens per second if some blocks of layers are split over all ranks, by load.

    Args:
        times: of each rank.
        blocks: that are split, by path of the linear layer whose results are added up.
        has_split_head: whether each rank makes a part of the logits.
        link: between the ranks.
        sizes: of what travels.
        include_sums: whether the times are those of layers together with their sums.
    """

    def rate(load: str) -> float:
        index = _SHAPE_OF[load]
        rows, tokens = SHAPES[index]
        total = sizes.num_shared * link.sum_s(rows * tokens * sizes.hidden)
        for place, kind in enumerate(times[0].kinds):
            here = [path for path in blocks if path in kind.parts]
            layer_s = max(_split_s(rank.kinds[place], here, index) for rank in times)
            given = [rows * tokens * values for path in here for values in kind.exchanges[path]]
            total += len(kind.layers) * (layer_s + (0.0 if include_sums else sum(map(link.sum_s, given))))
        if load != "prompts":
            if has_split_head:
                gather_s = 0.0 if include_sums else link.sum_s(rows * sizes.vocab // len(times))
                total += max(rank.head_part[index] for rank in times) + gather_s
            else:
                total += times[0].head[index]
        return rows * tokens / total

    return {load: rate(load) for load in LOADS}


@dataclass(frozen=True)
class Comparison:
    """What the ways to share a model are compared by.

    Args:
        times: of each rank.
        counts: layers per stage, by the number of stages that there can be: as many as ranks for a pipeline, fewer where
            ranks share each layer of a stage.
        can_split_head: whether logits can be made by all ranks.
        sizes: of what travels.
        link: between the ranks.
        include_sums: whether the times are those of layers together with their sums.
    """

    times: Sequence[RankTimes]
    counts: Mapping[int, Sequence[int]]
    can_split_head: bool
    sizes: ModelSizes
    link: LinkTimes
    include_sums: bool = False

    def over(self, link: Link) -> Comparison:
        """Return the comparison for another link; times that include sums are those of the link that there is."""
        return replace(self, link=link_times(link, len(self.times), self.sizes.value_bytes))

    def predictions(self, problems: Mapping[str, str] | None = None) -> list[Prediction]:
        """Return a prediction for each way.

        Args:
            problems: why ways can't be taken, by name.
        """
        paths = dict.fromkeys(path for kind in self.times[0].kinds for path in kind.parts)
        ways = ways_to_share(paths, self.can_split_head, self.counts, len(self.times))
        return [Prediction(way, self._rates(way), (problems or {}).get(way.name, "")) for way in ways]

    def _rates(self, way: Way) -> Mapping[str, float]:
        """Return the tokens per second that a way gives, by load."""
        if way.blocks:
            return predict_widths(self.times, way.blocks, way.has_split_head, self.link, self.sizes, self.include_sums)
        if way.num_stages > 1:
            stages, link = stages_of_ranks(self.times, way.num_stages, self.link, self.sizes, self.include_sums)
            return predict_pipeline(stages, self.counts[way.num_stages], link, self.sizes)
        if way.name == ALONE:
            num_layers = sum(len(kind.layers) for kind in self.times[0].kinds)
            return predict_pipeline(self.times[:1], [num_layers], self.link, self.sizes)
        return predict_pipeline(self.times, self.counts[len(self.times)], self.link, self.sizes)


def link_times(link: Link, num_ranks: int, value_bytes: int) -> LinkTimes:
    """Return what messages over a link cost; sums are made of what every rank has gathered, round a ring."""
    hops = tuple((size, link.latency_s + size / link.bytes_per_s) for size in _LINK_BYTES)
    return LinkTimes(tuple((size // value_bytes, (num_ranks - 1) * seconds) for size, seconds in hops), hops)


def best(predictions: Sequence[Prediction], load: str) -> Prediction:
    """Return the first of those that can be taken and are nearly as fast as the fastest.

    A pipeline comes first, then one rank alone, and all of each layer split before some of it.
    """
    usable = [one for one in predictions if not one.problem]
    fastest = max(one.tokens_per_s[load] for one in usable)
    return next(one for one in usable if one.tokens_per_s[load] >= _NEARLY * fastest)


def _split_s(kind: KindTimes, blocks: Sequence[str], index: int) -> float:
    """Return the seconds of a layer of which some blocks are split; of several, what each saves alone is added up."""
    if set(blocks) == set(kind.parts):
        return kind.split[index]
    whole = kind.whole[index]
    return max(0.0, whole - sum(whole - kind.parts[path][index] for path in blocks))


def _shape_of_rows(rows: float) -> float:
    """Return the place in SHAPES of a step of so many rows, which may lie between two."""
    known = [shape[0] for shape in SHAPES if shape[1] == 1]
    for place, (low, high) in enumerate(pairwise(known)):
        if rows <= high:
            return place + (rows - low) / (high - low)
    return float(len(known) - 1)


def _at(values: Sequence[float], place: float) -> float:
    low = int(place)
    part = place - low
    return values[low] if not part else values[low] * (1 - part) + values[low + 1] * part


def _between(points: Sequence[tuple[int, float]], size: int) -> float:
    """Return the time of a size, on lines through the measured ones."""
    if size <= points[0][0] or len(points) == 1:
        return points[0][1]
    for (a, a_s), (b, b_s) in pairwise(points):
        if size <= b:
            return a_s + (b_s - a_s) * (size - a) / (b - a)
    (a, a_s), (b, b_s) = points[-2:]
    return b_s + max(0.0, b_s - a_s) * (size - b) / (b - a)


def reason(chosen: Prediction, predictions: Sequence[Prediction], load: str) -> str:
    """Return a sentence that says what was chosen, and why."""

    def rate(one: Prediction) -> float:
        return one.tokens_per_s[load]

    text = f"chosen: {chosen.name}, {show_rate(rate(chosen))} tokens/s predicted {_LOAD_WORDS[load]}"
    others = [one for one in predictions if one is not chosen and not one.problem]
    if others:
        second = max(others, key=rate)
        text += f"; {second.name}: {show_rate(rate(second))}"
        if rate(second) > rate(chosen):
            text += ", too little more to matter"
    alone = next(one for one in predictions if one.name == ALONE)
    if chosen is alone:
        text += "; the other ranks stay idle"
    elif alone.problem and _NEARLY * rate(alone) > rate(chosen):
        text += f"; one rank alone would give {show_rate(rate(alone))}, but {alone.problem}"
    return text


def table(predictions: Sequence[Prediction], chosen: Prediction | None = None) -> str:
    """Return the predictions as a text table in tokens per second; the one that is chosen is marked."""
    titles = "".join(f" {title:>12}" for title in ("one request", "4 at once", "16 at once", "long prompts"))
    lines = [f"{'layout':<26}{titles}  predicted tokens/s"]
    for one in predictions:
        rates = "".join(f" {show_rate(one.tokens_per_s[name]):>12}" for name in LOADS)
        mark = "*" if one is chosen else ""
        lines.append(f"{one.name:<26}{rates}  {mark or one.problem}".rstrip())
    if any(one.way.blocks for one in predictions):
        lines.append(
            "tensor: each rank has a part of every layer; ... only: of that block; head whole: rank 0 makes all logits"
        )
    return "\n".join(lines)
