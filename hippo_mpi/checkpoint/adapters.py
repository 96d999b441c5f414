"""Adapts models that don't call their layers as layers; the only place where model types are named.

`iquestloopcoder` goes through its layers twice, and its own `__call__` uses the internals of its layers (queries,
keys, gates) instead of calling them. The adapter moves that code into the layers, operation by operation, so
that they can be traced and cut like those of any other model.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import create_attention_mask


def adapt(model: nn.Module, model_type: str) -> None:
    """Give a model layers that can be called, if its type needs that; other models stay as they are."""
    if model_type == "iquestloopcoder":
        _adapt_iquestloopcoder(model)


def _adapt_iquestloopcoder(model: Any) -> None:
    from mlx_lm.models import iquestloopcoder as module

    class Block(module.TransformerBlock):  # type: ignore[misc]
        """A layer whose call is one round: global attention first, then gated with a window of its own."""

        def __call__(
            self,
            h: mx.array,
            mask: Any,
            window_mask: Any,
            cache: Any,
            gate_proj: Any,
            first: tuple[mx.array, mx.array] | None,
        ) -> tuple[mx.array, tuple[mx.array, mx.array]]:
            B, L = h.shape[:2]
            offset = cache.offset if cache is not None else 0
            q, k, v = self.self_attn.get_qkv(self.input_layernorm(h), offset)
            if first is None:
                if cache is not None:
                    k, v = cache.update_and_fetch(k, v)
                out = self.self_attn.attention(q, k, v, mask, cache=cache)
            else:
                gate = gate_proj(q)
                everywhere = self.self_attn.attention(q, *first, mask, cache=cache)
                if cache is not None:
                    k, v = cache.update_and_fetch(k, v)
                nearby = self.self_attn.attention(q, k, v, window_mask, cache=cache)
                out = module._mix_attention(gate, everywhere, nearby)
            h = h + self.self_attn.o_proj(out.transpose(0, 2, 1, 3).reshape(B, L, -1))
            return h + self.mlp(self.post_attention_layernorm(h)), (k, v)

    class Body(module.IQuestLoopCoderModel):  # type: ignore[misc]
        def __call__(self, inputs: mx.array, cache: list[Any] | None = None) -> mx.array:
            h, num = self.embed_tokens(inputs), len(self.layers)
            cache = cache if cache is not None else [None] * (2 * num)
            mask = create_attention_mask(h, cache[0])
            window_mask = create_attention_mask(h, cache[num], window_size=self.loop_window_size)
            first: list[Any] = [None] * num
            for round_caches in (cache[:num], cache[num:]):
                for i, (layer, gate, c) in enumerate(
                    zip(self.layers, self.gate_projections, round_caches, strict=True)
                ):
                    h, kv = layer(h, mask, window_mask, c, gate, first[i])
                    first[i] = kv
            normed: mx.array = self.norm(h)
            return normed

    model.model.__class__ = Body
    for layer in model.model.layers:
        layer.__class__ = Block
