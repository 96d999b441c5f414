"""Tells MLX where to find the library of the MPI that started us. Must not load MLX, which reads this at its start."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path


def find_mpi_library() -> None:
    """Set the environment variables with which MLX finds libmpi.

    The `libmpi.so` of the PyPI wheel is a text stub, with which every rank would silently be a world of one.
    """
    os.environ.setdefault("OMPI_MPI_THREAD_LEVEL", "3")  # two streams talk to MPI at once
    if "MLX_MPI_LIBNAME" in os.environ:
        return
    if sys.platform == "darwin":
        mpirun = shutil.which("mpirun")
        beside = sorted((Path(mpirun).resolve().parent.parent / "lib").glob("libmpi.*dylib")) if mpirun else []
        if beside:
            os.environ["MLX_MPI_LIBNAME"] = str(beside[0])
        return
    folder = os.environ.get("OMPI_LIBDIR_LOC", "")
    if "OMPI_COMM_WORLD_SIZE" not in os.environ:  # srun started us and names no library: take the wheel's, beside us
        folder = f"{sys.prefix}/lib"
        os.environ.setdefault("OPAL_PREFIX", sys.prefix)
    library = Path(folder) / "libmpi.so.40"
    os.environ["MLX_MPI_LIBNAME"] = str(library) if folder and library.exists() else "libmpi.so.40"
