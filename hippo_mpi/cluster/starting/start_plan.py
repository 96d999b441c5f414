"""How the ranks of a run are started: what each is told of the others. Loads no MLX."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

from hippo_mpi.cluster.hostfile import Hostfile
from hippo_mpi.environment import SPEED, TRACEBACK
from hippo_mpi.transport.ports import THIS_MACHINE

START = (sys.executable, "-m", "hippo_mpi.cluster.starting.start")
"""The starter's command line; it reads a plan from standard input."""


@dataclass(frozen=True)
class RankStart:
    """Where a rank is started, and what is its own.

    Args:
        host: by ssh's name; 127.0.0.1 is this machine.
        python: path of the Python that has hippo_mpi on that host; ~/ is the home folder there.
        environment: variables of this rank.
    """

    host: str
    python: str
    environment: Mapping[str, str]


@dataclass(frozen=True)
class StartPlan:
    """All ranks of a run.

    Args:
        words: what every rank runs: the words behind Python's name.
        ranks: rank 0's first.
        environment: variables of all ranks; those on this machine also have this process's.
        files: contents of files, by the variables that name them.
        folder: where ranks work, if a host has it.
    """

    words: Sequence[str]
    ranks: Sequence[RankStart]
    environment: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    folder: str = field(default_factory=os.getcwd)

    def encode(self) -> bytes:
        """Return it as a line of JSON."""
        return json.dumps(asdict(self)).encode() + b"\n"

    @classmethod
    def decode(cls, line: bytes) -> StartPlan:
        """Return the plan of a line of JSON."""
        fields = json.loads(line)
        return replace(cls(**fields), ranks=[RankStart(**rank) for rank in fields["ranks"]])


def start_plan(hostfile: Hostfile, backend: str, words: Sequence[str], first_port: int) -> StartPlan:
    """Return the plan of a run, by the ring or JACCL.

    Args:
        hostfile: says what the backend needs.
        backend: ring, jaccl or jaccl-ring.
        words: what every rank runs: the words behind Python's name.
        first_port: of the ring's, one for each address in turn; of JACCL, the one on which rank 0 meets the others.
    """
    hosts = hostfile.hosts
    environment = {name: os.environ[name] for name in (TRACEBACK,) if name in os.environ}
    environment |= dict(one.split("=", 1) for one in hostfile.envs)
    if backend == "ring":
        ports = iter(range(first_port, 1 << 16))
        places = [[f"{address}:{next(ports)}" for address in host.ips] for host in hosts]
        files = {"MLX_HOSTFILE": json.dumps(places)}
    else:
        environment["MLX_JACCL_COORDINATOR"] = f"{hosts[0].ips[0]}:{first_port}"
        if backend == "jaccl-ring":
            environment["MLX_JACCL_RING"] = "1"
        files = {"MLX_IBV_DEVICES": json.dumps([host.rdma for host in hosts])}
    ranks = [
        RankStart(
            host.ssh,
            sys.executable if host.ssh == THIS_MACHINE else host.python or sys.executable,
            {"MLX_RANK": str(rank)} | ({SPEED: str(host.speed)} if host.speed else {}),
        )
        for rank, host in enumerate(hosts)
    ]
    return StartPlan(words, ranks, environment, files)


def quoted(path: str) -> str:
    """Return a path for a shell, which must still know what ~/ is."""
    return f"~/{shlex.quote(path[2:])}" if path.startswith("~/") else shlex.quote(path)
