"""Plain-op versions of the Metal-only kernels, so that bitnet and muse_spark run on a CPU.

mlx-lm has no other path for these two families. The stand-ins round where the kernels round, but add
up in another order, so they are for comparing two CPU runs, not for comparing with a GPU.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import mlx.core as mx

BITLINEAR = "mlx_lm.models.bitlinear_layers"
MUSE = "mlx_lm.models.muse_spark"


def _rms(x: mx.array, eps: float) -> mx.array:
    """Divides by the root mean square, in float32 and without a weight."""
    x = x.astype(mx.float32)
    return x * mx.rsqrt(mx.mean(x * x, axis=-1, keepdims=True) + eps)


def bitlinear_matmul(self: Any, x: mx.array, packed: mx.array) -> mx.array:
    """Stands in for BitLinear.execute_matmul_kernel.

    Args:
        self: The BitLinear layer.
        x: Input, (..., in_features).
        packed: Ternary weights, four to a byte; each two-bit place holds a quarter of the rows.

    Returns:
        The scaled product, (..., out_features).
    """
    quarters = [((packed >> shift) & 3).astype(mx.float32) - 1 for shift in (0, 2, 4, 6)]
    out = x.astype(mx.float32) @ mx.concatenate(quarters, axis=0).T
    scale = self.weight_scale.astype(mx.float32)
    scaled: mx.array = out / scale if self.invert_weight_scales else out * scale
    return scaled.astype(x.dtype)


def expert_routing(
    logits: mx.array,
    expert_bias: mx.array,
    *,
    top_k: int,
    multiplier: float,
    score_eps: float,
    route_scale: float,
) -> list[mx.array]:
    """Stands in for mlx_lm.kernels.expert_routing."""
    scores = mx.sigmoid(logits.astype(mx.float32) * multiplier)
    chosen = mx.argsort(-(scores + expert_bias), axis=-1)[..., :top_k]
    weights = mx.take_along_axis(scores, chosen, axis=-1)
    weights = weights / (mx.sum(weights, axis=-1, keepdims=True) + score_eps) * route_scale
    return [chosen.astype(mx.uint32), weights]


def pre_norm(stream: mx.array, norm: Any, *, dtype: mx.Dtype) -> mx.array:
    """Stands in for mlx_lm.kernels.pre_norm."""
    weight: mx.array = norm.weight
    return (_rms(stream, norm.eps) * weight.astype(mx.float32)).astype(dtype)


def norm_add_norm(
    branch: mx.array,
    stream: mx.array,
    *,
    alpha: mx.array,
    beta: mx.array,
    post_weight: mx.array | None,
    post_eps: float,
    next_norm: Any | None,
) -> tuple[mx.array, mx.array | None]:
    """Stands in for mlx_lm.kernels.norm_add_norm."""
    dtype = branch.dtype
    if post_weight is not None:
        branch = post_weight.astype(dtype) * branch
    normed = _rms(branch, post_eps).astype(dtype).astype(mx.float32)
    new_stream = alpha * stream.astype(mx.float32) + beta * normed
    return new_stream, None if next_norm is None else pre_norm(new_stream, next_norm, dtype=dtype)


def post_expert_norm_combine(experts: mx.array, weights: mx.array, *, norm_weight: mx.array, eps: float) -> mx.array:
    """Stands in for mlx_lm.kernels.post_expert_norm_combine."""
    scaled = _rms(experts.astype(mx.float32) * norm_weight.astype(mx.float32), eps)
    scaled = scaled * weights.astype(experts.dtype).astype(mx.float32)[..., None]
    total = mx.zeros_like(experts[..., 0, :])
    # The kernel rounds after each expert.
    for k in range(experts.shape[-2]):
        total = (total.astype(mx.float32) + scaled[..., k, :]).astype(experts.dtype)
    return total


def qk_norm(
    qkvg: mx.array, *, n_heads: int, n_kv_heads: int, head_dim: int, eps: float, query_scale: float
) -> list[mx.array]:
    """Stands in for mlx_lm.kernels.qk_norm."""
    both = qkvg[..., : (n_heads + n_kv_heads) * head_dim]
    both = both.reshape(*qkvg.shape[:-1], n_heads + n_kv_heads, head_dim)
    both = _rms(both, eps).astype(qkvg.dtype)
    queries, keys = both[..., :n_heads, :], both[..., n_heads:, :]
    return [(queries.astype(mx.float32) * query_scale).astype(qkvg.dtype), keys]


def qk_norm_rope(
    qkvg: mx.array, *, rope_base: float, offset: int | mx.array, head_dim: int, **norm_args: Any
) -> list[mx.array]:
    """Stands in for mlx_lm.kernels.qk_norm_rope."""

    def rotate(x: mx.array) -> mx.array:
        heads_first = x.swapaxes(1, 2)
        turned = mx.fast.rope(heads_first, head_dim, traditional=True, base=rope_base, scale=1.0, offset=offset)
        return turned.swapaxes(1, 2)

    return [rotate(part) for part in qk_norm(qkvg, head_dim=head_dim, **norm_args)]


def rms_norm_sigmoid_gate(x: mx.array, gate: mx.array, *, eps: float) -> mx.array:
    """Stands in for mlx_lm.kernels.rms_norm_sigmoid_gate."""
    batch, heads, length, dim = x.shape
    normed = _rms(x, eps).swapaxes(1, 2).reshape(batch, length, heads * dim)
    return (normed * mx.sigmoid(gate.astype(mx.float32))).astype(x.dtype)


MUSE_STAND_INS: tuple[Callable[..., Any], ...] = (
    expert_routing,
    norm_add_norm,
    post_expert_norm_combine,
    pre_norm,
    qk_norm,
    qk_norm_rope,
    rms_norm_sigmoid_gate,
)


@contextlib.contextmanager
def metal_stand_ins() -> Iterator[None]:
    """Swaps the Metal-only kernels of bitnet and muse_spark for plain ops while the block runs."""
    bitlinear = importlib.import_module(BITLINEAR).BitLinear
    muse = importlib.import_module(MUSE)
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(bitlinear, "execute_matmul_kernel", bitlinear_matmul))
        for stand_in in MUSE_STAND_INS:
            # The model module imported the kernels by name, so they are replaced there.
            patches.enter_context(mock.patch.object(muse, stand_in.__name__, stand_in))
        yield
