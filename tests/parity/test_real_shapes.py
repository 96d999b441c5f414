"""Checkpoints of the shapes that people run: opened, traced and planned without reading a weight, right to the byte."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hippo_mpi.planning.layer_split import Machine, plan_split
from hippo_mpi.planning.model_costs import model_info
from hippo_mpi.sharding.slot_caches import KVSettings
from tests import real_shapes
from tests.local_ring import open_folder


def layer_of(tensor: str) -> int | None:
    """Return the number of the layer that a tensor belongs to by its name, None for embedding, norm and head."""
    found = re.search(r"\.layers\.(\d+)\.", tensor)
    return int(found[1]) if found else None


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "Qwen3-32B" else pytest.mark.slow) for n in real_shapes.CONFIGS]
)
def test_plan_is_right_to_the_byte(name: str, tmp_path: Path) -> None:
    sizes = real_shapes.make_sparse_checkpoint(real_shapes.CONFIGS[name], tmp_path)
    on_disk = sum(file.stat().st_blocks * 512 for file in tmp_path.iterdir())
    assert on_disk < 16 << 20 < sum(sizes.values()), "the file system keeps no holes"
    checkpoint = open_folder(tmp_path)
    info = model_info(checkpoint, KVSettings())
    for num_machines in range(1, 9):
        split = plan_split(info, [Machine(f"m{i}", 2 << 40) for i in range(num_machines)], max_context=4096)
        for rank, stage in enumerate(split.stages):
            held = [size for tensor, size in sizes.items() if (layer_of(tensor) in range(stage.start, stage.stop))]
            head = [size for tensor, size in sizes.items() if layer_of(tensor) is None and rank == 0]
            assert stage.weight_bytes == sum(held) + sum(head)
        assert sum(stage.weight_bytes for stage in split.stages) == sum(sizes.values())
    for rank, stage in enumerate(split.stages):
        stored = set().union(*checkpoint.stage_arrays(stage.start, stage.stop).values())
        layers = [*range(stage.start, stage.stop), *([None] if rank == 0 else [])]
        assert stored == {tensor for tensor in sizes if layer_of(tensor) in layers}
