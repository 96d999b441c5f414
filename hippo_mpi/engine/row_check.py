"""Probes, before requests come, whether rows that share a step get the same results from the model as alone.

mlx-lm runs some models in ragged batches without an error but with other answers (gemma2's mask meets the wrong
axis, phi3small adds a boolean mask ...), and reads padding into the state of others (mamba, rwkv7, ...). A row's tokens
must not depend on the rows beside it: so with the former, rows take turns, and with the latter, only prompts of equal
length are read together.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx

from hippo_mpi.errors import UserError
from hippo_mpi.parallel.step import Step, StepRunner, run_step
from hippo_mpi.parallel.step_plan import Returns, StepPlan

_SHORT, _LONG = 5, 150  # tokens: far apart, so that effects of padding show
_SHORTEST_LONG = 2 * _SHORT  # of a model that takes long for a token
_SHARE_OF_DEADLINE = 0.5
_TOLERANCE = 0.1  # of the logits' standard deviation: rounding stays below it, also in bfloat16; mistakes don't


@dataclass(frozen=True)
class RowCheck:
    """Which steps rows of different lengths may share."""

    can_batch: bool  # a step with equally many tokens of each row
    can_pad: bool  # a step in which shorter rows are padded on the right


def check_rows(runner: StepRunner, serials: Iterator[int], deadline_s: float | None = None) -> RowCheck:
    """Read and decode two rows alone and together, and compare their logits; uses slots 0 to 3 and frees them.

    Args:
        runner: runs the steps.
        serials: of the steps.
        deadline_s: seconds after which a rank that is in a step counts as stuck; None: never.
    """
    short, beginning = _prompt(0, _SHORT), _prompt(1, _SHORT)
    run_step(runner, Step(StepPlan(next(serials), (0,), (0,), (_SHORT,)), [short]))
    took_s = []  # of the same step, twice: one may be slow by chance
    for drops in ((), (1,)):
        began_s = time.monotonic()
        step = StepPlan(next(serials), (1,), (0,), (_SHORT,), Returns.LOGITS, drops=drops)
        mx.eval(_logits(runner, step, [beginning]))
        took_s.append(time.monotonic() - began_s)
    length = _long_enough(min(took_s) / _SHORT, deadline_s)
    prompts, lengths = [short, _prompt(1, length)], (_SHORT, length)
    rest = prompts[1][_SHORT:]
    run_step(runner, Step(StepPlan(next(serials), (1,), (_SHORT,), (len(rest),)), [rest]))
    alone = []
    for slot, end in enumerate(lengths):
        fork = ((slot, slot + 2),)
        alone.append(_last_logits(runner, StepPlan(next(serials), (slot + 2,), (end,), (1,), Returns.LOGITS, fork)))
    wanted = mx.concatenate(alone)
    together = StepPlan(next(serials), (0, 1), lengths, (1, 1), Returns.LOGITS)
    can_batch = can_pad = _are_close(_last_logits(runner, together), wanted)
    if can_batch:
        run_step(runner, Step(StepPlan(next(serials), (2, 3), (0, 0), lengths), prompts))
        padded = StepPlan(next(serials), (2, 3), lengths, (1, 1), Returns.LOGITS)
        can_pad = _are_close(_last_logits(runner, padded), wanted)
    run_step(runner, Step(StepPlan(next(serials), drops=(0, 1, 2, 3)), []))
    return RowCheck(can_batch, can_pad)


def _prompt(row: int, length: int) -> list[int]:
    return [(7 * i + row) % 50 + 1 for i in range(length)]


def _long_enough(token_s: float, deadline_s: float | None) -> int:
    """Return the length of the long row: so that a step of two such rows ends well before the deadline."""
    if deadline_s is None:
        return _LONG
    return max(_SHORTEST_LONG, min(_LONG, int(_SHARE_OF_DEADLINE * deadline_s / (2 * token_s))))


def check_drafting(runner: StepRunner, serials: Iterator[int]) -> None:
    """Decode tokens one by one and several in one step, and compare; uses slots 0 and 1 and frees them.

    Raises:
        UserError: the logits differ, or the model's caches can't drop draft tokens that weren't accepted.
    """
    prompt, draft = _prompt(0, _SHORT), [9] * 3
    start, fork = len(prompt), ((0, 1),)
    run_step(runner, Step(StepPlan(next(serials), (0,), (0,), (start,)), [prompt]))
    if runner.slot_limits(0).num_revocable < len(draft):
        problem = "its caches can't be trimmed"
    else:
        together = _logits(
            runner, StepPlan(next(serials), (1,), (start,), (len(draft),), Returns.LOGITS, fork), [draft]
        )
        steps = [StepPlan(next(serials), (0,), (start + i,), (1,), Returns.LOGITS) for i in range(len(draft))]
        one_by_one = mx.concatenate([_logits(runner, plan, [draft[:1]]) for plan in steps], axis=1)
        problem = "" if _are_close(together[0], one_by_one[0]) else "its logits change when a step has several tokens"
    run_step(runner, Step(StepPlan(next(serials), drops=(0, 1)), []))
    if problem:
        raise UserError(f"--draft-model doesn't work with this model: {problem}")


def _are_close(logits: mx.array, wanted: mx.array) -> bool:
    distance = mx.abs(logits - wanted).max(axis=-1)
    return bool((distance <= _TOLERANCE * mx.std(wanted, axis=-1)).all().item())


def _last_logits(runner: StepRunner, plan: StepPlan) -> mx.array:
    """Run a step with one token per row; return its logits (B, V) in float32."""
    return _logits(runner, plan, [[9]] * len(plan.slots))[:, -1, :]


def _logits(runner: StepRunner, plan: StepPlan, tokens: list[list[int]]) -> mx.array:
    """Run a step; return its logits (B, L, V) in float32."""
    result = run_step(runner, Step(plan, tokens)) or run_step(runner, None)
    assert result is not None
    return result.logits.astype(mx.float32)
