"""Predicts a pipeline's rates over a link that isn't there yet: times stages one by one, then simulates the schedule.

In two calls:

    measured = [measure_stage(stage, ...) for each rank]    # on the machines themselves, or on one of them in turn
    predict([stage.typical for stage in measured], link, workload)     # without MLX: arithmetic
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from hippo_mpi.config.links import Link
from hippo_mpi.errors import UserError
from hippo_mpi.parallel.schedule import Action, actions, simulate
from hippo_mpi.sharding.slot_caches import KVSettings, SlotCaches
from hippo_mpi.sharding.stage import Stage
from hippo_mpi.tracing.dataflow import Dataflow

_TRIALS, _PROMPT_TRIALS = 5, 3
_ROUNDS = 20  # of micro-batches: enough that filling the pipeline doesn't matter


@dataclass(frozen=True)
class Workload:
    """The load to predict for: a prompt read in chunks (sizes in tokens), and numbers of concurrent requests."""

    prompt_tokens: int
    chunk_tokens: int
    concurrent: tuple[int, ...]
    can_batch: bool

    def micro_batches(self, num_requests: int, num_stages: int) -> list[int]:
        """Return the number of rows of each micro-batch."""
        if not self.can_batch:
            return [1] * num_requests
        count = min(num_requests, num_stages)
        return [num_requests // count + (index < num_requests % count) for index in range(count)]

    def batch_sizes(self, num_stages: int) -> list[int]:
        """Return all numbers of rows to time: those of micro-batches, and of all rows at once on one machine."""
        sizes = {rows for n in self.concurrent for rows in self.micro_batches(n, num_stages)}
        return sorted(sizes | ({*self.concurrent} if self.can_batch else {1}))


@dataclass(frozen=True)
class StepTime:
    """One step on one stage: seconds until its result can be sent, the result's bytes, and seconds of rank 0's head."""

    forward_s: float
    num_bytes: int
    head_s: float = 0.0

    def at_speed(self, speed: float) -> StepTime:
        """Scale the times to a machine that is `speed` times as fast."""
        return StepTime(self.forward_s / speed, self.num_bytes, self.head_s / speed)


@dataclass(frozen=True)
class StageTimes:
    """Times of one stage: for each chunk of the prompt, and for steps of one token after it, by number of rows."""

    chunks: list[StepTime]
    steps: dict[int, StepTime]

    def at_speed(self, speed: float) -> StageTimes:
        """Scale all times to a machine that is `speed` times as fast."""
        steps = {rows: step.at_speed(speed) for rows, step in self.steps.items()}
        return StageTimes([chunk.at_speed(speed) for chunk in self.chunks], steps)


@dataclass(frozen=True)
class MeasuredStage:
    """A stage that was timed repeatedly: the medians of all repetitions, the shortest times, and the longest."""

    typical: StageTimes
    fastest: StageTimes
    slowest: StageTimes

    def at_speed(self, speed: float) -> MeasuredStage:
        """Scale all repetitions' times to a machine that is `speed` times as fast."""
        return MeasuredStage(*(times.at_speed(speed) for times in (self.typical, self.fastest, self.slowest)))


@dataclass(frozen=True)
class Prediction:
    """Seconds until the prompt's first token, and tokens per second of all requests, by how many run at once."""

    first_token_s: float
    decode_tps: dict[int, float]


def measure_stage(
    stage: Stage, settings: KVSettings, workload: Workload, num_stages: int, progress: Callable[[str], None]
) -> MeasuredStage:
    """Time a stage by itself, with made-up input instead of what other stages would send.

    Args:
        stage: this rank's layers.
        settings: of the KV caches.
        workload: sizes of chunks and micro-batches.
        num_stages: of the pipeline that is predicted.
        progress: told what is being timed.
    """
    caches = SlotCaches(stage.model, settings)
    prompts = []
    for _ in range(_PROMPT_TRIALS + 1):
        prompts.append(_time_prompt(stage, caches, workload, progress))
    chunks = list(zip(*prompts[1:], strict=True))  # the first one was a warm-up
    steps = {}
    for rows in workload.batch_sizes(num_stages):
        slots = list(range(1, rows + 1))
        for slot in slots:
            caches.fork(0, slot)
        trials = []
        for trial in range(_TRIALS + 1):
            progress(f"timing steps of {rows} rows")
            trials.append(_time_step(stage, caches, slots, workload.prompt_tokens + trial, 1, wants_logits=True))
        steps[rows] = trials[1:]
        for slot in slots:
            caches.drop([slot])

    def reduced(of: Callable[[list[float]], float]) -> StageTimes:
        return StageTimes(
            [_reduced(trials, of) for trials in chunks], {rows: _reduced(trials, of) for rows, trials in steps.items()}
        )

    return MeasuredStage(reduced(statistics.median), reduced(min), reduced(max))


def _time_prompt(
    stage: Stage, caches: SlotCaches, workload: Workload, progress: Callable[[str], None]
) -> list[StepTime]:
    """Read a prompt into slot 0; return the times of its chunks."""
    times = []
    for start in range(0, workload.prompt_tokens, workload.chunk_tokens):
        progress(f"timing the prompt at {start:,}")
        count = min(workload.chunk_tokens, workload.prompt_tokens - start)
        times.append(_time_step(stage, caches, [0], start, count, wants_logits=False))
    return times


def _reduced(trials: Sequence[StepTime], of: Callable[[list[float]], float]) -> StepTime:
    return StepTime(
        of([trial.forward_s for trial in trials]), trials[0].num_bytes, of([trial.head_s for trial in trials])
    )


def _time_step(
    stage: Stage, caches: SlotCaches, slots: Sequence[int], position: int, count: int, wants_logits: bool
) -> StepTime:
    shape = len(slots), count
    tokens, flow = mx.ones(shape, mx.int32), stage.flow
    arriving = [] if stage.holds_embedding else _made_up(stage, stage.start, shape)
    coming_back = _made_up(stage, len(flow.calls), shape) if stage.leads and not stage.is_whole else []
    mx.eval(tokens, arriving, coming_back)
    began = time.perf_counter()
    cache = caches.at(slots, [position] * len(slots), [count] * len(slots))
    forward = stage.forward(tokens, cache, wants_logits)
    forward.run(None if stage.holds_embedding else arriving)
    sent = forward.outgoing or []
    mx.async_eval(sent)  # type: ignore[no-untyped-call]
    if not stage.leads:
        forward.run(None)
    mx.eval(sent)
    mx.eval(caches.advance(slots, [position + count] * len(slots)))
    forwarded = time.perf_counter()
    if stage.holds_head and wants_logits:
        if not forward.is_done:
            forward.run(coming_back)
        assert forward.logits is not None
        mx.eval(mx.argmax(forward.logits[:, -1, :], axis=-1))
    ended = time.perf_counter()
    return StepTime(forwarded - began, sum(array.nbytes for array in sent), ended - forwarded)


def _made_up(stage: Stage, cut: int, rows_tokens: tuple[int, int]) -> list[mx.array]:
    """Return random arrays of the shapes that cross a cut."""
    shapes = [stage.flow.calls[call].outputs[path] for call, path in stage.crossing[cut]]
    return [mx.random.normal(shape(*rows_tokens)).astype(shape.dtype) for shape in shapes]


def check_can_time(flow: Dataflow) -> None:
    """Check that a model's stages can be run one by one.

    Raises:
        UserError: layers need more than what the previous one makes, or are looped over.
    """
    if flow.num_rounds > 1 or any(call.prepared for call in flow.calls[1:]):
        raise UserError(
            "--simulate can't time the stages of this model one by one: its layers also need arrays that rank 0 computes"
        )


def one_machine(times: Sequence[StageTimes]) -> StageTimes:
    """Return the times of one machine that holds all stages."""

    def together(steps: Sequence[StepTime]) -> StepTime:
        return StepTime(sum(step.forward_s for step in steps), 0, sum(step.head_s for step in steps))

    chunks = [together(steps) for steps in zip(*(stage.chunks for stage in times), strict=True)]
    return StageTimes(chunks, {rows: together([stage.steps[rows] for stage in times]) for rows in times[0].steps})


def predict(times: Sequence[StageTimes], link: Link, workload: Workload) -> Prediction:
    """Simulate a pipeline over a link, and return its rates.

    Args:
        times: of each stage.
        link: between any two of them.
        workload: the load; the same one that the stages were timed for.
    """
    num_stages, num_chunks = len(times), len(times[0].chunks)

    def took_s(num_steps: int, max_in_flight: int, num_silent: int, step_of: Callable[[int, int], StepTime]) -> float:
        def compute_s(rank: int, action: Action) -> float:
            step = step_of(rank, action.step)
            return step.forward_s if action.kind == "forward" else step.head_s

        return simulate(
            [actions(rank, num_stages, num_steps, max_in_flight, num_silent) for rank in range(num_stages)],
            compute_s,
            link.latency_s,
            lambda rank, step: step_of(rank, step).num_bytes / link.bytes_per_s,
            blocking_sends=False,
        ).total_s

    def reading(rank: int, step: int) -> StepTime:
        return times[rank].chunks[step] if step < num_chunks else times[rank].steps[1]

    decode_tps = {}
    for count in workload.concurrent:
        sizes = workload.micro_batches(count, num_stages)

        def decoding(rank: int, step: int, sizes: list[int] = sizes) -> StepTime:
            return times[rank].steps[sizes[step % len(sizes)]]

        num_steps = _ROUNDS * max(len(sizes), num_stages)
        num_tokens = sum(sizes[step % len(sizes)] for step in range(num_steps))
        decode_tps[count] = num_tokens / took_s(num_steps, len(sizes), 0, decoding)
    return Prediction(took_s(num_chunks + 1, 1, num_chunks, reading), decode_tps)
