"""Layers are timed by kind, without weights, and by themselves where the other ranks aren't there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from hippo_mpi.checkpoint.checkpoint import ModelSource, open_lazily
from hippo_mpi.planning import layer_times
from hippo_mpi.planning.layer_times import SHAPES, time_layers
from hippo_mpi.sharding.dependence import Call
from hippo_mpi.sharding.tensor import plan_shards
from hippo_mpi.tracing.twin import blank_twin
from hippo_mpi.transport.collective import Collective
from hippo_mpi.transport.local_collective import AbsentRanks
from tests.parity import tiny_models


@pytest.mark.parametrize(("name", "blocks"), [("llama", 2), ("gemma3_text", 2), ("deepseek_v3", 3)])
@pytest.mark.slow
def test_each_kind_is_timed_whole_and_in_parts(name: str, blocks: int, tmp_path: Path) -> None:
    model, _ = open_lazily(ModelSource(tiny_models.make_checkpoint(name, tmp_path)))
    plan = plan_shards(blank_twin(model), (0.5, 0.5))
    steps: list[None] = []
    times = time_layers(model, mx.float32, plan, 1, AbsentRanks(1), lambda: steps.append(None))
    assert sorted(layer for kind in times.kinds for layer in kind.layers) == list(range(len(model.layers)))
    assert max(len(kind.parts) for kind in times.kinds) == blocks
    assert len(steps) >= len(times.kinds) * len(SHAPES)
    every = [times.head, times.head_part]
    for kind in times.kinds:
        every += [kind.whole, kind.split, *kind.parts.values()]
        assert kind.parts.keys() == kind.exchanges.keys()
    assert all(len(found) == len(SHAPES) and min(found) > 0 for found in every)
    assert times.at_speed(2.0).head[0] == times.head[0] / 2


@pytest.mark.parametrize(
    ("is_exact", "given"),
    [
        (False, {"self_attn.o_proj": (64,), "mlp.down_proj": (64,)}),
        (True, {"self_attn.o_proj": (32, 32), "mlp.down_proj": (64, 32)}),
    ],
)
def test_what_a_rank_gives_is_counted(is_exact: bool, given: dict[str, tuple[int, ...]], tmp_path: Path) -> None:
    """Sums are as wide as hidden states; to be exact, half of what a matrix takes and half of what it makes goes round."""
    model, _ = open_lazily(ModelSource(tiny_models.make_checkpoint("llama", tmp_path)))
    plan = plan_shards(blank_twin(model), (0.5, 0.5), is_exact=is_exact)
    kinds = time_layers(model, mx.float32, plan, 1, AbsentRanks(1), lambda: None).kinds
    assert all(kind.exchanges == given for kind in kinds)


def test_scales_need_not_be_of_the_type_that_is_computed_in(tmp_path: Path) -> None:
    """Those of mxfp4, as in gpt-oss, are bytes."""
    model, _ = open_lazily(ModelSource(tiny_models.make_checkpoint("llama", tmp_path)))
    nn.quantize(model, group_size=32, bits=4, mode="mxfp4")
    plan = plan_shards(blank_twin(model), (0.5, 0.5))
    times = time_layers(model, mx.bfloat16, plan, 1, AbsentRanks(1), lambda: None)
    assert min(*times.head, *times.head_part) > 0


def test_layers_compute_in_the_type_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe that records their calls computes in float32, in which a processor may be faster, or slower."""
    model, _ = open_lazily(ModelSource(tiny_models.make_checkpoint("llama", tmp_path)))
    plan = plan_shards(blank_twin(model), (0.5, 0.5))
    made: set[mx.Dtype] = set()
    step_s = layer_times._step_s

    def noting(copies: Sequence[nn.Module], call: Call, caches: list[Any], collective: Collective) -> float:
        made.update(array.dtype for array in layer_times._made(copies[0], *call.again(layer_times._fresh(caches))))
        return step_s(copies, call, caches, collective)

    monkeypatch.setattr(layer_times, "_step_s", noting)
    model.set_dtype(mx.bfloat16)
    time_layers(model, mx.bfloat16, plan, 1, AbsentRanks(1), lambda: None)
    assert made == {mx.bfloat16}
