"""Whether rows that share a step get what they get alone: asked of the model itself, once, before requests come.

mlx-lm runs some models in ragged batches without an error but with other answers (gemma2's mask meets the wrong
axis, phi3small adds a boolean mask ...). Tokens must not depend on company, so their rows take turns instead.
"""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx

from hippo_mpi.parallel.step_plan import StepPlan
from hippo_mpi.parallel.worker import Leader

_LENGTHS = (5, 150)  # tokens: far apart, so that what depends on padding shows
_TOLERANCE = 0.1  # of the logits' standard deviation: rounding stays below it in bfloat16 too, mistakes don't


def rows_keep_apart(leader: Leader, serials: Iterator[int]) -> bool:
    """Decode two rows alone and together, and compare their logits. Takes `serials` and uses slots 0 to 3."""
    for slot, length in enumerate(_LENGTHS):
        tokens = [(7 * i + slot) % 50 + 1 for i in range(length)]
        leader.step(StepPlan(next(serials), (slot,), (0,), length), [tokens])
    alone = [
        _logits(leader, StepPlan(next(serials), (slot + 2,), (length,), 1, True, forks=((slot, slot + 2),)))
        for slot, length in enumerate(_LENGTHS)
    ]
    together = _logits(leader, StepPlan(next(serials), (0, 1), _LENGTHS, 1, True))
    leader.step(StepPlan(next(serials), drops=(0, 1, 2, 3)), [])
    distance = mx.abs(mx.concatenate(alone) - together).max(axis=-1)
    return bool((distance <= _TOLERANCE * mx.std(together, axis=-1)).all().item())


def _logits(leader: Leader, plan: StepPlan) -> mx.array:
    """The logits (B, V) of one token of each row, in float32."""
    finished = leader.step(plan, [[9]] * len(plan.slots)) or leader.step(None, [])
    assert finished is not None
    return finished[1][:, -1, :].astype(mx.float32)
