"""Times a model's layers on this machine, whole and split by width, without its weights.

A layer's time depends on shapes only, so that a few copies of one layer of each kind, filled with noise, say how long all
of them take. There are as many copies as it takes for their weights to come from memory, as in a model of many layers.

Ranks that are there time their parts together, sums included: a sum costs more than its message, as it waits for the
slower rank (here, two ranks of one machine: 75 us by itself, 300 to 430 between matrix products).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.cache import make_prompt_cache

from hippo_mpi.planning.timed_tries import Effort, Run, by_size
from hippo_mpi.sharding.dependence import Call, ProbedModel
from hippo_mpi.sharding.linear_layers import num_inputs
from hippo_mpi.sharding.sharded_head import shard_head
from hippo_mpi.sharding.sharded_layers import shard_layer
from hippo_mpi.sharding.tensor import ShardPlan, fuse_adapters, structure_of
from hippo_mpi.sharding.width_split import LayerShards
from hippo_mpi.tracing import nested_arrays
from hippo_mpi.tracing.nested_arrays import Opaque
from hippo_mpi.tracing.twin import blank_twin
from hippo_mpi.transport.collective import Collective
from hippo_mpi.transport.local_collective import CountingRanks

SHAPES = ((1, 1), (2, 1), (4, 1), (8, 1), (16, 1), (1, 256))
"""Rows and tokens of the steps that are timed: answers of 1 to 16 requests, and a piece of a prompt.

A step of two rows may take as long as one of four: a BLAS has other code for one row than for several.
"""

_ROWS = [rows for rows, _ in SHAPES]
_TOKENS = [rows * tokens for rows, tokens in SHAPES]

_PAST_TOKENS = 5  # in the caches; as many as `tracing.trace` reads before it
_COPIED_BYTES = 512 << 20  # of all forms of a layer, more than caches hold; larger ones are timed one by one
_STEP_S = 0.25  # copies beyond what takes as long would only take longer
_NOISE_BYTES = 16 << 20  # larger weights are zeros, which take as long


_USUAL, _PRECISE = Effort(2.0, 6), Effort(5.0, 25)  # on a busy machine, 4 tries are off by 6 %, 14 by 2


@dataclass(frozen=True)
class KindTimes:
    """Seconds that a layer takes, by place in SHAPES.

    Args:
        layers: numbers of the layers of this kind.
        whole: if it is whole.
        split: if all is split that can be.
        parts: by path of a linear layer that can be split by its columns: if that one, and what feeds it, is split.
        exchanges: how many values per token a rank gives to each sum or gather that this takes, by path.
    """

    layers: tuple[int, ...]
    whole: tuple[float, ...]
    split: tuple[float, ...]
    parts: dict[str, tuple[float, ...]] = field(default_factory=dict)
    exchanges: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def at_speed(self, speed: float) -> KindTimes:
        """Scale the times to a machine that is `speed` times as fast."""
        parts = {path: _scaled(times, speed) for path, times in self.parts.items()}
        return KindTimes(self.layers, _scaled(self.whole, speed), _scaled(self.split, speed), parts, self.exchanges)


@dataclass(frozen=True)
class RankTimes:
    """What a rank has timed.

    Args:
        kinds: of layers.
        head: seconds to make all logits, and on rank 0 to choose the likeliest tokens, by place in SHAPES.
        head_part: the same, where this rank makes a part of the logits.
    """

    kinds: tuple[KindTimes, ...]
    head: tuple[float, ...]
    head_part: tuple[float, ...]

    def at_speed(self, speed: float) -> RankTimes:
        """Scale the times to a machine that is `speed` times as fast."""
        kinds = tuple(kind.at_speed(speed) for kind in self.kinds)
        return RankTimes(kinds, _scaled(self.head, speed), _scaled(self.head_part, speed))


def time_layers(
    model: nn.Module,
    dtype: mx.Dtype,
    plan: ShardPlan,
    rank: int,
    collective: Collective,
    on_progress: Callable[[], None],
    precise: Collection[int] = (),
    only_precise: bool = False,
) -> RankTimes:
    """Time the layers of a model; every rank of the collective must do so.

    Args:
        model: whose structure counts; its weights are never read.
        dtype: of hidden states.
        plan: how layers would be split.
        rank: whose part is timed.
        collective: what the parts add up with, or `AbsentRanks`.
        on_progress: called after each try.
        precise: places in SHAPES of what is timed more often; the same on each rank.
        only_precise: whether the others aren't timed, but concluded from these.
    """
    twin = blank_twin(model)
    fuse_adapters(twin)
    probe, layers = ProbedModel(blank_twin(twin)), list(twin.layers)
    by_kind: dict[str, list[int]] = {}  # layers of the same structure that would be split alike, in the order of calls
    places_of: dict[str, int] = {}  # of the first of them, among all calls
    for number, call in enumerate(probe.calls(make_prompt_cache(probe.model), 1, 1)):
        kind = structure_of(layers[call.layer], call) + repr(plan.layers[call.layer])
        by_kind.setdefault(kind, []).append(call.layer)
        places_of.setdefault(kind, number)
    places = sorted(precise) if only_precise else range(len(SHAPES))
    # Many kinds of layers shouldn't take longer than one.
    efforts = {
        place: replace(effort, seconds=effort.seconds / len(by_kind))
        for place, effort in ((place, _PRECISE if place in precise else _USUAL) for place in places)
    }
    timing = _Timing(rank, efforts, collective, on_progress)
    kinds = [
        _kind_times(layers[here[0]], plan.layers[here[0]], here, steps, timing)
        for here, steps in zip(by_kind.values(), _steps(probe, list(places_of.values()), dtype), strict=True)
    ]
    return RankTimes(tuple(kinds), *_head_times(twin, dtype, plan, timing))


@dataclass(frozen=True)
class _Timing:
    """How this rank times things.

    Args:
        rank: whose parts are timed.
        efforts: how long, by place in SHAPES.
        collective: what the parts add up with.
        on_progress: called after each try.
    """

    rank: int
    efforts: Mapping[int, Effort]
    collective: Collective
    on_progress: Callable[[], None]

    def by_size(self, runs: Sequence[Callable[[float], list[Run]]], sizes: Sequence[int]) -> list[tuple[float, ...]]:
        """Return the seconds of each run, by place in SHAPES; `runs` and `sizes` are in that order, too."""
        return list(zip(*by_size(runs, sizes, self.efforts, self.collective, self.on_progress), strict=True))


def _kind_times(
    layer: nn.Module, shards: LayerShards, numbers: Sequence[int], steps: Sequence[_Step], timing: _Timing
) -> KindTimes:
    """Time a layer in all forms that it may have.

    Args:
        layer: one of its kind.
        shards: how it would be split.
        numbers: of all layers of this kind.
        steps: to be timed, by place in SHAPES.
        timing: how.
    """
    paths = list(shards.columns)
    forms = [LayerShards(), shards, *(shards.only({path}) for path in paths)]
    size = sum(array.nbytes for _, array in tree_flatten(layer.parameters()))  # the same on each rank
    turns = [forms] if size * len(forms) <= _COPIED_BYTES else [[form] for form in forms]
    num_copies = min(len(numbers), max(1, _COPIED_BYTES // max(1, size * len(turns[0]))))

    def in_turns(some: Sequence[LayerShards]) -> list[tuple[float, ...]]:
        copies = [_copies(layer, num_copies, form, timing) for form in some]  # not held longer than it takes
        return timing.by_size([partial(_layer_runs, copies, step, timing.collective) for step in steps], _TOKENS)

    whole, split, *parts = (times for some in turns for times in in_turns(some))
    exchanges = {path: _exchanged(layer, shards.only({path}), timing.rank, steps[-1]) for path in paths}
    return KindTimes(tuple(numbers), whole, split, dict(zip(paths, parts, strict=True)), exchanges)


@dataclass(frozen=True)
class _Step:
    """A call of a layer that is timed, and the one before it, which leaves something in the cache."""

    call: Call
    before: Call | None


def _steps(probe: ProbedModel, numbers: Sequence[int], dtype: mx.Dtype) -> list[list[_Step]]:
    """Return, for each of these calls of layers, the steps to be timed: one of each shape."""
    found: list[list[_Step]] = []
    for rows, tokens in SHAPES:
        cache = make_prompt_cache(probe.model)
        before = probe.calls(cache, rows, _PAST_TOKENS, numbers) if tokens == 1 else None
        calls = probe.calls(cache, rows, tokens, numbers)
        for call in [*calls, *(before or [])]:
            _cast(call, dtype)
        found.append([_Step(call, before[number] if before else None) for number, call in enumerate(calls)])
    return [list(steps) for steps in zip(*found, strict=True)]


def _cast(call: Call, dtype: mx.Dtype) -> None:
    """Give a call what a run would: the probe computes in float32, in which a 4-bit layer takes a ninth of the time here."""

    def cast(path: nested_arrays.Path, array: mx.array) -> mx.array:
        return array.astype(dtype) if mx.issubdtype(array.dtype, mx.floating) else array

    nested_arrays.replace(call.inputs, Opaque(call.caches), cast)
    mx.eval([array for _, array in nested_arrays.find(call.inputs, Opaque(call.caches))])


def _copies(layer: nn.Module, count: int, shards: LayerShards, timing: _Timing) -> list[nn.Module]:
    """Return copies of a part of a layer, filled with noise."""
    part = _filled(layer)
    shard_layer(part, shards, timing.rank, timing.collective)
    mx.eval(part.parameters())
    return [part] + [_copied(part) for _ in range(count - 1)]


def _exchanged(layer: nn.Module, shards: LayerShards, rank: int, step: _Step) -> tuple[int, ...]:
    """Return how many values per token a rank gives to each sum or gather."""
    counting = CountingRanks(rank)
    part = copy.deepcopy(layer, {id(array): array for _, array in tree_flatten(layer.parameters())})
    shard_layer(part, shards, rank, counting)
    _made(part, *step.call.again([]))  # nothing is computed
    rows, tokens = SHAPES[-1]
    return tuple(size // (rows * tokens) for size in counting.sizes)


def _layer_runs(
    forms: Sequence[Sequence[nn.Module]], step: _Step, collective: Collective, expected_s: float
) -> list[Run]:
    """Return what times a step of each form of a layer.

    Args:
        forms: copies of the layer, by form.
        step: what they are called with.
        collective: what the parts add up with.
        expected_s: seconds that a copy may take.
    """
    runs: list[Run] = []
    for copies in forms:
        past: list[Any] = []
        if step.before is not None:
            inputs, past = step.before.again()
            mx.eval(_made(copies[0], inputs, past))
        # What reads a prompt isn't slowed down by memory.
        some = copies[: 1 + int(_STEP_S / expected_s) if step.before else 1]
        runs.append(partial(_step_s, some, step.call, past, collective))
    return runs


def _step_s(copies: Sequence[nn.Module], call: Call, caches: list[Any], collective: Collective) -> float:
    """Return the seconds of a step of one of the copies; graphs are built while others are computed."""
    half = len(copies) // 2
    rounds = [[(layer, *call.again(_fresh(caches))) for layer in some] for some in (copies[:half], copies[half:])]
    collective.begin(notes=False)
    mx.eval(collective.sum(mx.zeros((1,))))  # ranks begin at the same time
    began = time.perf_counter()
    before: list[mx.array] = []
    for given in rounds:
        made: list[mx.array] = []
        for layer, inputs, own in given:
            # One layer after the other, as in a model: ranks wait for each other at each sum.
            after = _after(inputs, own, made[:1] or before[:1])
            made = _made(layer, after, own) + made
        mx.async_eval(made)  # type: ignore[no-untyped-call]
        mx.eval(before)
        before = made
    mx.eval(before)
    return (time.perf_counter() - began) / len(copies)


def _after(inputs: dict[str, Any], caches: list[Any], made: list[mx.array]) -> Any:
    """Return inputs that are there only once what another layer has made is."""
    return nested_arrays.replace(inputs, Opaque(caches), lambda path, array: mx.depends([array], made)[0])


def _fresh(caches: list[Any]) -> list[Any]:
    """Return copies of caches in memory of their own, so that they are updated in place, as in a run."""
    copied = copy.deepcopy(caches)
    nested_arrays.replace(copied, Opaque([]), lambda path, array: mx.array(array))
    mx.eval([array for _, array in nested_arrays.find(copied, Opaque([]))])
    return copied


def _made(layer: Any, inputs: dict[str, Any], caches: list[Any]) -> list[mx.array]:
    """Return what a call makes and keeps, unevaluated."""
    result = layer(*inputs["args"], **inputs["kwargs"])
    return [array for _, array in nested_arrays.find((result, [vars(cache) for cache in caches]), Opaque(caches))]


def _head_times(
    model: nn.Module, dtype: mx.Dtype, plan: ShardPlan, timing: _Timing
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the seconds to make all logits, and this rank's part of them, by place in SHAPES; rank 0 chooses tokens, too."""
    none = (0.0,) * len(SHAPES)
    if plan.head is None:
        return none, none
    whole = _filled(dict(model.named_modules())[plan.head.path])
    part = copy.deepcopy(whole, {id(array): array for _, array in tree_flatten(whole.parameters())})
    shard_head(part, plan.head, timing.rank, timing.collective)  # rows of its own, or the same matrix
    mx.eval(part.parameters(), whole.parameters())
    method = plan.head.method

    def runs(num_rows: int, _: float) -> list[Run]:
        return [partial(_head_s, getattr(head, method), head, dtype, num_rows, timing) for head in (whole, part)]

    of_whole, of_part = timing.by_size([partial(runs, num_rows) for num_rows in _ROWS], _ROWS)
    return of_whole, of_part


def _head_s(
    call: Callable[[mx.array], mx.array], head: nn.Module, dtype: mx.Dtype, num_rows: int, timing: _Timing
) -> float:
    x = mx.random.normal((num_rows, 1, num_inputs(head))).astype(dtype)
    mx.eval(x, head.parameters())
    timing.collective.begin(notes=False)
    mx.eval(timing.collective.sum(mx.zeros((1,))))
    began = time.perf_counter()
    logits = call(x)
    # As rank 0 does in a run: on a CPU, the probabilities of 32,000 tokens take 0.4 ms a row.
    mx.eval(mx.argmax(logits - mx.logsumexp(logits, axis=-1, keepdims=True), axis=-1) if timing.rank == 0 else logits)
    return time.perf_counter() - began


def _scaled(times: Sequence[float], speed: float) -> tuple[float, ...]:
    return tuple(seconds / speed for seconds in times)


def _filled(module: nn.Module) -> nn.Module:
    """Return a copy of a module, with noise instead of its weights."""
    copied = copy.deepcopy(module, {id(array): array for _, array in tree_flatten(module.parameters())})
    filled = []
    for number, (name, array) in enumerate(tree_flatten(copied.parameters())):
        if mx.issubdtype(array.dtype, mx.floating) and array.nbytes <= _NOISE_BYTES:
            noise = 0.02 * mx.random.normal(array.shape, key=mx.random.key(number))
            filled.append((name, noise.astype(array.dtype)))
        else:
            filled.append((name, mx.zeros(array.shape, array.dtype)))
    copied.update(tree_unflatten(filled))
    return copied


def _copied(module: nn.Module) -> nn.Module:
    """Return a copy of a module with weights in memory of its own."""
    copied = copy.deepcopy(module)
    copied.update(tree_unflatten([(name, mx.array(array)) for name, array in tree_flatten(copied.parameters())]))
    mx.eval(copied.parameters())
    return copied
