"""What one rank holds: any mlx-lm model, cut into stages by layers.

checkpoint = open_checkpoint(ModelSource(path))         # its structure; no weights
stage = pipeline(checkpoint, [14, 10], rank=1)          # layers 14..23, the only weights that are read
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hippo_mpi.shard.checkpoint import Checkpoint, ModelSource, load_stage_weights, open_checkpoint
from hippo_mpi.shard.stage import Stage

__all__ = ["Checkpoint", "ModelSource", "Stage", "open_checkpoint", "pipeline"]


def pipeline(
    checkpoint: Checkpoint,
    layer_split: Sequence[int],
    rank: int,
    on_progress: Callable[[int], None] = lambda done_bytes: None,
) -> Stage:
    """Load one rank's layers of a model, whatever its type.

    Args:
        checkpoint: the model's structure, from `open_checkpoint`.
        layer_split: layers per rank; it must not cut where `checkpoint.flow.forbidden_cuts()` says.
        rank: whose layers to load. Rank 0 also gets embedding, norm and head.
        on_progress: told the bytes read so far.

    Raises:
        ModelError: a file can't be read or downloaded.
    """
    start = sum(layer_split[:rank])
    stop = start + layer_split[rank]
    model = load_stage_weights(checkpoint, start, stop, on_progress)
    return Stage(model, checkpoint.flow, start, stop)
