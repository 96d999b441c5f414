"""Where MLX finds the library of the MPI that started us. Loads no MLX: it must be told before its first start."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path


def find_mpi_library() -> None:
    """Point MLX at the PyPI wheel's library: its libmpi.so is a text stub, which gives silent worlds of one."""
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
    if "OMPI_COMM_WORLD_SIZE" not in os.environ:  # srun started us, which knows of no library: the wheel's is beside us
        folder = f"{sys.prefix}/lib"
        os.environ.setdefault("OPAL_PREFIX", sys.prefix)
    library = Path(folder) / "libmpi.so.40"
    os.environ["MLX_MPI_LIBNAME"] = str(library) if folder and library.exists() else "libmpi.so.40"
