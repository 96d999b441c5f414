"""The package as a library: what its import loads, and the method that every model class is given."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import hippo_mpi


def run(code: str, **env: str) -> str:
    """Return what a Python of its own prints."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env={**os.environ, **env}, check=True, capture_output=True, text=True).stdout.strip()


def test_the_import_loads_no_mlx() -> None:
    code = "import sys, hippo_mpi; dir(hippo_mpi); hippo_mpi.__version__; hippo_mpi.SamplingParams(); print('mlx.core' in sys.modules)"
    assert run(code) == "False"


def test_every_name_is_there() -> None:
    assert set(hippo_mpi.__all__) <= set(dir(hippo_mpi))
    for name in hippo_mpi.__all__:
        assert getattr(hippo_mpi, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'tokenise'"):
        _ = hippo_mpi.tokenise


def test_under_mpirun_the_import_points_mlx_at_its_library() -> None:
    code = "import os, hippo_mpi; print(os.environ['MLX_MPI_LIBNAME'])"
    assert "libmpi" in run(code, OMPI_COMM_WORLD_SIZE="2", OMPI_LIBDIR_LOC="")


def test_enable_gives_model_classes_the_method_whenever_they_are_defined() -> None:
    code = (
        "import mlx_lm.models.llama, hippo_mpi, mlx.nn; hippo_mpi.enable();"
        "import mlx_lm.models.mamba as later;"
        "print([hasattr(kind, 'pipeline') for kind in"
        " (mlx_lm.models.llama.Model, later.Model, later.MambaBlock, mlx.nn.Linear)])"
    )
    assert run(code) == "[True, True, False, False]"


def test_alone_a_model_stays_whole() -> None:
    code = (
        "import hippo_mpi, mlx_lm; model, tokenizer = mlx_lm.load('models/story-3m'); kind = type(model);"
        "hippo_mpi.pipeline(model); hippo_mpi.pipeline(model); print(type(model) is kind)"
    )
    assert run(code) == "True"
