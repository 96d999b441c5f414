"""The costs of a model's layers as plain numbers: bytes of weights, bytes of cache, work per token."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil


@dataclass(frozen=True)
class CacheCost:
    """Bytes of one layer's cache: `fixed` plus `per_token` for each token, up to `max_tokens` of them."""

    fixed: int = 0
    per_token: int = 0
    max_tokens: int | None = None

    def bytes_at(self, context: int) -> int:
        """Return the cache's bytes for a context of this many tokens."""
        tokens = context if self.max_tokens is None else min(context, self.max_tokens)
        return self.fixed + self.per_token * tokens

    def scaled(self, share: float) -> CacheCost:
        """Return the cost of a part of the cache."""
        return CacheCost(ceil(self.fixed * share), ceil(self.per_token * share), self.max_tokens)


@dataclass(frozen=True)
class ModelInfo:
    """Sizes, work and limits of a model, as the planner needs them; lists are by layer, sizes in bytes."""

    num_layers: int
    layer_bytes: list[int]
    layer_work: list[float]  # bytes of weights that one token reads
    layer_flops: list[float]  # operations for a token of a prompt
    head_bytes: int  # embedding, norm and head
    head_work: float
    caches: list[CacheCost]
    forbidden_cuts: dict[int, str]
    max_positions: int | None  # longest context that the model was trained for, in tokens
    can_batch: bool  # whether mlx-lm can run rows of different lengths together
    vocab_size: int  # width of the logits
    assumptions: tuple[str, ...] = ()  # sentences that say what had to be assumed of a model without weights
    shared_bytes: int = 0  # held by each rank other than the first, besides its layers

    def with_draft(self, draft: ModelInfo, num_draft_tokens: int) -> ModelInfo:
        """Return the costs with a whole draft model on rank 0 that proposes `num_draft_tokens` per step.

        Its weights and work are added to the head's, its caches to those of layer 0.
        """
        first = total_cost([self.caches[0], *draft.caches])
        head_bytes = self.head_bytes + draft.head_bytes + sum(draft.layer_bytes)
        head_work = self.head_work + num_draft_tokens * (draft.head_work + sum(draft.layer_work))
        assumptions = tuple(dict.fromkeys((*self.assumptions, *draft.assumptions)))
        caches = [first, *self.caches[1:]]
        return replace(self, head_bytes=head_bytes, head_work=head_work, caches=caches, assumptions=assumptions)


def total_cost(costs: list[CacheCost]) -> CacheCost:
    """Return the cost of several caches together."""
    limits = [cost.max_tokens for cost in costs if cost.per_token]
    return CacheCost(
        sum(cost.fixed for cost in costs),
        sum(cost.per_token for cost in costs),
        None if None in limits else max((limit for limit in limits if limit is not None), default=None),
    )
