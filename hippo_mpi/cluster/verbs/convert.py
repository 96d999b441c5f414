"""hippo_mpi.cluster convert: print a list of hosts in another format."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hippo_mpi.cluster.host_formats import FORMATS, read_any, written
from hippo_mpi.config.parser import option


@dataclass(frozen=True, kw_only=True)
class Options:
    """All options of the verb."""

    file: Path = option(
        Path(), "list of hosts: of mlx.launch, Open MPI, MPICH, Slurm, PBS, or a host a line", "file", check=Path
    )
    to: str = option(
        "mlx", "format to convert to: openmpi, mpich, lines (a host a line, as of PBS), or mlx", choices=FORMATS
    )


def run(options: Options) -> int:
    """Print the list; return the exit status.

    Raises:
        UserError: the file can't be read, or names no hosts.
    """
    print(written(read_any(options.file), options.to), end="")
    return 0
