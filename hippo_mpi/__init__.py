"""Hippo MPI: any mlx-lm model, split by layers over the ranks that a launcher starts; as a library for scripts.

    model, tokenizer = hippo_mpi.load("mlx-community/Qwen3-4B-4bit")  # this rank's layers only
    mlx_lm.generate(model, tokenizer, "Why is the sky blue?")         # on every rank, with the same tokens on each

Importing this loads no MLX; its names are imported when they are used.
"""

from __future__ import annotations

import os
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hippo_mpi.engine.request import Request as Request
    from hippo_mpi.engine.request import RequestOutput as RequestOutput
    from hippo_mpi.engine.request import SamplingParams as SamplingParams
    from hippo_mpi.library.llm import LLM as LLM
    from hippo_mpi.library.loading import load as load
    from hippo_mpi.library.pipelined import enable as enable
    from hippo_mpi.library.pipelined import pipeline as pipeline
    from hippo_mpi.library.sharded import shard as shard

_HOMES = {
    "LLM": "library.llm",
    "Request": "engine.request",
    "RequestOutput": "engine.request",
    "SamplingParams": "engine.request",
    "enable": "library.pipelined",
    "load": "library.loading",
    "pipeline": "library.pipelined",
    "shard": "library.sharded",
}
__all__ = [*_HOMES, "__version__"]

if "OMPI_COMM_WORLD_SIZE" in os.environ or "PMIX_RANK" in os.environ:  # before a script's mx.distributed.init()
    import_module("hippo_mpi.transport.mpi_library").find_mpi_library()


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("hippo-mpi")
    if name in _HOMES:
        return getattr(import_module(f"hippo_mpi.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'hippo_mpi' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
