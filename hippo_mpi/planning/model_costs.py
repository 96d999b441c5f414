"""Finds the costs of a model's layers without loading a weight."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx.utils import tree_unflatten
from mlx_lm.models.cache import make_prompt_cache

from hippo_mpi.checkpoint.checkpoint import Checkpoint, open_lazily
from hippo_mpi.checkpoint.model_errors import running_errors
from hippo_mpi.planning.costs import CacheCost, ModelInfo, total_cost
from hippo_mpi.sharding.slot_caches import KVSettings, cache_bytes, merged
from hippo_mpi.tracing.dataflow import Dataflow
from hippo_mpi.tracing.graph import leaves_of
from hippo_mpi.tracing.observer import all_caches

_PROBE_TOKENS = 512
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length", "n_ctx")


def model_info(checkpoint: Checkpoint, settings: KVSettings, shares_head: bool = False) -> ModelInfo:
    """Return the costs of a model, found by running its own code on arrays without data.

    Args:
        checkpoint: the model.
        settings: of the KV caches.
        shares_head: whether every rank holds norm and head.

    Raises:
        ForeignError: the model's code raises something.
    """
    flow = checkpoint.flow
    sizes, shares, counts = checkpoint.weight_bytes, checkpoint.expert_share, checkpoint.matrix_sizes
    names: list[set[str]] = [set() for _ in range(flow.num_layers)]
    for call in flow.calls:
        names[call.layer] |= call.weights
    head = flow.head_weights

    def work(of: set[str]) -> float:
        return sum(sizes[name] * shares.get(name, 1.0) for name in of)

    # Looking up a row of an embedding costs nothing, but used as an output matrix it is read whole.
    embedding = {n for n in head if "embed" in n or "wte" in n or "wpe" in n}
    reads_embedding = embedding == head or not any("head" in n or n.endswith("output.weight") for n in head - embedding)
    text = {**checkpoint.config, **checkpoint.config.get("text_config", {})}
    positions = next((int(text[key]) for key in _CONTEXT_KEYS if isinstance(text.get(key), int)), None)
    with running_errors(checkpoint.source.path):
        model = _lazy_model(checkpoint)
        costs, can_batch = _cache_costs(model, settings), _can_batch(model, settings)
        vocab_size = model(mx.zeros((1, 1), mx.int32)).shape[-1]
    return ModelInfo(
        num_layers=flow.num_layers,
        layer_bytes=[sum(sizes[n] for n in layer) for layer in names],
        layer_work=[work(layer) for layer in names],
        layer_flops=[2 * sum(counts.get(n, 0) * shares.get(n, 1.0) for n in layer) for layer in names],
        head_bytes=sum(sizes[n] for n in head),
        head_work=work(head if reads_embedding else head - embedding),
        caches=_by_layer(costs, flow),
        forbidden_cuts=flow.forbidden_cuts(),
        max_positions=positions,
        can_batch=can_batch,
        vocab_size=vocab_size,
        assumptions=checkpoint.assumptions,
        shared_bytes=sum(sizes[name] for name in flow.output_weights) if shares_head else 0,
    )


def _lazy_model(checkpoint: Checkpoint) -> Any:
    model, _ = open_lazily(checkpoint.source)
    model.update(tree_unflatten(list(leaves_of(model).items())))
    return model


def _can_batch(model: Any, settings: KVSettings) -> bool:
    """Try a batch on arrays without data: some caches can't be merged, and some models assume a single position."""
    if settings.kv_bits is not None:
        return False
    caches: list[list[Any]] = []
    if any(getattr(cache, "keep", 0) for cache in all_caches(make_prompt_cache(model, settings.max_kv_size))):
        return False  # a rotating cache that keeps its first tokens: its batched form doesn't
    for num_tokens in (2, 3, 4):
        caches.append(make_prompt_cache(model, settings.max_kv_size))
        model(mx.zeros((1, num_tokens), mx.int32), cache=caches[-1])
    try:
        model(mx.zeros((3, 1), mx.int32), cache=merged(caches))
    except Exception:  # a model's own code may raise anything: its rows take turns then
        return False
    return True


def _cache_costs(model: Any, settings: KVSettings) -> list[CacheCost]:
    """Return each cache's cost, from how it grows when the model runs lazily over two chunks; nothing is computed."""
    cache = make_prompt_cache(model, settings.max_kv_size)
    sizes = []
    for _ in range(2):
        model(mx.zeros((1, _PROBE_TOKENS), mx.int32), cache=cache)
        sizes.append([cache_bytes(entry) for entry in cache])
    scale = 1.0 if settings.kv_bits is None else (settings.kv_bits + 64 / settings.kv_group_size) / 16
    costs = []
    for index, entry in enumerate(cache):
        per_token = (sizes[1][index] - sizes[0][index]) // _PROBE_TOKENS
        window = max((getattr(c, "max_size", 0) or 0 for c in all_caches([entry])), default=0)
        if window:
            per_token = max(per_token, sizes[0][index] // _PROBE_TOKENS if window >= _PROBE_TOKENS else 0)
        fixed = max(0, sizes[1][index] - per_token * 2 * _PROBE_TOKENS)
        costs.append(CacheCost(fixed, int(per_token * scale), window or None))
    return costs


def _by_layer(costs: list[CacheCost], flow: Dataflow) -> list[CacheCost]:
    """Return the cost of each layer's caches together; a cache that several layers read counts for the first one."""
    layer_of: dict[int, int] = {}
    for call in flow.calls:
        for index in call.caches:
            layer_of.setdefault(index, call.layer)
    merged = []
    for layer in range(flow.num_layers):
        # A cache that is passed to no layer belongs to the embedding, on rank 0.
        own = [cost for index, cost in enumerate(costs) if layer_of.get(index, 0) == layer]
        merged.append(total_cost(own))
    return merged
