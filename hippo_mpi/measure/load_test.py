"""Measures an engine under a given load, as in a benchmark of one configuration."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.generate import BatchGenerator

from hippo_mpi.checkpoint.checkpoint import Checkpoint, open_lazily
from hippo_mpi.engine.engine import Engine
from hippo_mpi.engine.request import Request, SamplingParams


@dataclass(frozen=True)
class Load:
    """Requests that arrive at once and differ only in their tokens.

    From the moment when the last request has its first token, all are answered until they have generated
    `generation_tokens` on average. So every rate is one of all requests at once, however long their prompts took.
    """

    num_requests: int
    prompt_tokens: int
    generation_tokens: int
    max_context: int

    def prompt(self, number: int) -> list[int]:
        """Return the tokens of a request's prompt."""
        return [(7 * number + 3 * i + i * i) % 50 + 1 for i in range(self.prompt_tokens)]


@dataclass(frozen=True)
class Measured:
    """Rates under a load."""

    prompt_tps: float  # prompt tokens per second, until every request has its first token
    decode_tps: float  # tokens per second of all requests together, from then on
    first_token_s: float  # median over the requests


def measure(engine: Engine, load: Load) -> Measured:
    """Run a load on an engine, which must be idle, and return its rates."""
    clock = _Clock(load)
    sampling = SamplingParams(max_tokens=load.max_context, ignore_eos=True)
    for number in range(load.num_requests):
        engine.add(Request(number, load.prompt(number), sampling))
    while not engine.is_idle:
        clock.note([output.request_id for output in engine.step()])
        if clock.has_enough:
            for number in range(load.num_requests):
                engine.abort(number)
    return clock.result()


def mlx_lm_splitter(model: Any, is_tensor: bool) -> Callable[[Any], None] | None:
    """Return mlx-lm's own method that splits a model of this type over a group; None if it has none.

    Args:
        model: a lazily loaded model.
        is_tensor: whether each layer is to be split; otherwise each rank gets some layers.
    """
    return getattr(model, "shard", None) if is_tensor else getattr(getattr(model, "model", None), "pipeline", None)


def load_mlx_lm_part(checkpoint: Checkpoint, group: Any, is_tensor: bool, progress: Callable[[], None]) -> Any:
    """Load this rank's part of a model, split by mlx-lm itself; None if mlx-lm can't.

    Args:
        checkpoint: the model.
        group: of `mx.distributed`.
        is_tensor: whether each layer is split; otherwise each rank gets some layers.
        progress: called after every weight.
    """
    model, _ = open_lazily(checkpoint.source)
    split = mlx_lm_splitter(model, is_tensor)
    if split is None:
        return None
    split(group)
    for _, array in tree_flatten(model.parameters()):
        mx.eval(array)
        progress()
    return model


def measure_mlx_lm(model: Any, load: Load, progress: Callable[[], None]) -> Measured:
    """Run a load with mlx-lm's own continuous batching, and return its rates.

    Args:
        model: a whole model, or this rank's part of one.
        load: the requests.
        progress: called after every step.
    """
    clock = _Clock(load)
    max_tokens = load.max_context - load.prompt_tokens
    generator = BatchGenerator(model, max_tokens=max_tokens, completion_batch_size=load.num_requests)
    try:
        generator.insert([load.prompt(number) for number in range(load.num_requests)])
        while not clock.has_enough and (responses := generator.next_generated()):
            progress()
            clock.note([response.uid for response in responses])
    finally:
        generator.close()
    return clock.result()


class _Clock:
    """Times the tokens of a load; decoding counts from the moment when every request has its first token."""

    def __init__(self, load: Load) -> None:
        self._load, self._began_s = load, time.perf_counter()
        self._first_s: dict[int, float] = {}
        self._num_decoded, self._all_began_s, self._ended_s = 0, 0.0, 0.0

    @property
    def has_enough(self) -> bool:
        return self._num_decoded >= self._load.num_requests * self._load.generation_tokens

    def note(self, request_ids: list[int]) -> None:
        """Count one more token for each of these requests."""
        if not request_ids or self.has_enough:
            return
        self._ended_s = time.perf_counter()
        if self._all_began_s:
            self._num_decoded += len(request_ids)
            return
        for number in request_ids:
            self._first_s.setdefault(number, self._ended_s)
        if len(self._first_s) == self._load.num_requests:
            self._all_began_s = self._ended_s

    def result(self) -> Measured:
        if not self._first_s:
            return Measured(0.0, 0.0, 0.0)
        return Measured(
            self._load.num_requests * self._load.prompt_tokens / (self._all_began_s - self._began_s),
            self._num_decoded / (self._ended_s - self._all_began_s) if self._num_decoded else 0.0,
            statistics.median(first - self._began_s for first in self._first_s.values()),
        )
