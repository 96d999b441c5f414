"""The hosts of a run, as a hostfile names them: read, checked, and written down for a start. Loads no MLX."""

from __future__ import annotations

import ipaddress
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hippo_mpi.config.serve_options import BACKENDS
from hippo_mpi.errors import LaunchError

# No option of ssh's, and nothing that a terminal would obey. ssh itself splits "user@host".
_NAME = re.compile(r"(?!-)[A-Za-z0-9._:\[\]%-]+(@(?!-)[A-Za-z0-9._:\[\]%-]+)?")
# No process can be given a NUL, nor what isn't UTF-8's.
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=[^\0\ud800-\udfff]*")
_PLAIN = ", without NULs and lone surrogates"
_PATH = re.compile(r"~?/[^\0\ud800-\udfff]*")


@dataclass(frozen=True)
class Host:
    """Where a rank runs.

    Args:
        ssh: the name by which ssh reaches it; 127.0.0.1 is this machine.
        ips: its addresses for data; of rank 0, the first is also where the ranks of JACCL meet.
        rdma: JACCL's device, or devices, on the cable to each rank; None where there is no cable.
        python: path of the Python there that has hippo_mpi, such as ~/hippo/.venv/bin/python; None: the same as here.
        speed: how fast it is, relative to the others; None: that is measured.
    """

    ssh: str
    ips: tuple[str, ...] = ()
    rdma: tuple[str | list[str] | None, ...] = ()
    python: str | None = None
    speed: float | None = None


@dataclass(frozen=True)
class Hostfile:
    """Hosts, rank 0's first, and how they are to be used.

    Args:
        hosts: an entry per rank.
        where: what the file is called in errors.
        backend: that the file asks for.
        envs: NAME=value, for the environment of every rank.
    """

    hosts: tuple[Host, ...]
    where: str = "hostfile"
    backend: str | None = None
    envs: tuple[str, ...] = ()

    def only(self, ranks: Sequence[int]) -> Hostfile:
        """Return the hosts of some ranks, which get new numbers: also in what leads from one to the other."""
        kept = [self.hosts[rank] for rank in ranks]
        hosts = (
            replace(host, rdma=tuple(host.rdma[rank] for rank in ranks)) if len(host.rdma) == len(self.hosts) else host
            for host in kept
        )
        return replace(self, hosts=tuple(hosts))

    def to_json(self) -> str:
        """Return what mlx.launch reads, too."""
        hosts = [
            {"ssh": host.ssh, "ips": host.ips, "rdma": host.rdma}
            | {key: value for key in ("python", "speed") if (value := getattr(host, key)) is not None}
            for host in self.hosts
        ]
        return json.dumps({"backend": self.backend or "", "envs": self.envs, "hosts": hosts})

    def check(self, backend: str) -> None:
        """Check that the hosts say what a backend needs.

        Raises:
            LaunchError: they don't.
        """
        if backend not in BACKENDS:
            raise LaunchError(f"{self.where}: unknown backend {backend[:100]!a}; choose from {', '.join(BACKENDS)}")
        if backend == "ring":
            for rank, host in enumerate(self.hosts):
                if not host.ips:
                    raise LaunchError(
                        f'{self.where}: rank {rank} ({host.ssh}) has no "ips", which the ring listens on; expected, for example,'
                        f' {{"ssh": "{host.ssh}", "ips": ["192.168.5.{rank + 1}"]}}'
                    )
        elif backend == "mpi":
            for rank, host in enumerate(self.hosts):
                if key := next((key for key in ("python", "speed") if getattr(host, key) is not None), None):
                    raise LaunchError(
                        f'{self.where}: "{key}" of rank {rank} ({host.ssh}) is not supported with mpi, which starts the same on every host'
                    )
        else:
            self._check_rdma(backend)

    def _check_rdma(self, backend: str) -> None:
        size, instead = len(self.hosts), "; hippo_mpi also runs with --backend ring"
        if not self.hosts[0].ips:
            raise LaunchError(
                f'{self.where}: rank 0 ({self.hosts[0].ssh}) has no "ips", where ranks connect for {backend}'
            )
        for rank, host in enumerate(self.hosts):
            if len(host.rdma) != size:
                raise LaunchError(
                    f'{self.where}: {backend} needs "rdma", a device (or null) for each of {size} ranks, but rank {rank}'
                    f" ({host.ssh}) has {len(host.rdma)}{instead}"
                )
            if host.rdma[rank] is not None:
                raise LaunchError(
                    f'{self.where}: the "rdma" of rank {rank} ({host.ssh}) must be null for rank {rank} itself'
                )
            neighbors = {(rank - 1) % size, (rank + 1) % size} if backend == "jaccl-ring" else set(range(size))
            for other in sorted(neighbors - {rank}):
                if not host.rdma[other]:
                    raise LaunchError(
                        f"{self.where}: {backend} needs an RDMA device from rank {rank} ({host.ssh}) to rank {other}"
                        f" ({self.hosts[other].ssh}), and there is none{instead}"
                    )


def read_hostfile(path: Path) -> Hostfile:
    """Read a hostfile: a list of hosts, or {"backend": ..., "envs": [...], "hosts": [...]}.

    Raises:
        LaunchError: it can't be read, or says something else.
    """
    where = f"hostfile {path}"
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise LaunchError(f"{where} can't be read: {error.strerror}") from None
    except ValueError as error:
        raise LaunchError(f"{where} is not JSON: {error}") from None
    except RecursionError:
        raise LaunchError(f"{where} is too deeply nested") from None
    if not isinstance(content, dict):
        return hostfile_of(content, where)
    backend, envs = content.get("backend") or None, content.get("envs") or []
    if backend is not None and not isinstance(backend, str):
        raise LaunchError(f'{where}: "backend" must be a name such as "ring", not {json.dumps(backend)}')
    if not isinstance(envs, list) or not all(isinstance(one, str) and _VARIABLE.fullmatch(one) for one in envs):
        raise LaunchError(f'{where}: "envs" must be a list of "NAME=value"{_PLAIN}')
    return replace(hostfile_of(content.get("hosts"), where), backend=backend, envs=tuple(envs))


def hostfile_of(entries: Any, where: str) -> Hostfile:
    """Return the hosts of a list of {"ssh": name, "ips": [address]}, one per rank.

    Raises:
        LaunchError: it is none; the message begins with `where`.
    """
    if not isinstance(entries, list) or not entries:
        raise LaunchError(f'{where} lists no hosts; it needs one {{"ssh": ..., "ips": [...]}} per rank')
    return Hostfile(tuple(_host(entry, rank, where) for rank, entry in enumerate(entries)), where)


def _host(entry: Any, rank: int, where: str) -> Host:
    name = entry.get("ssh") if isinstance(entry, dict) else None
    if not isinstance(name, str):
        raise LaunchError(f'{where}: the entry of rank {rank} has no "ssh"')
    if not _NAME.fullmatch(name):
        raise LaunchError(f"{where}: {name[:100]!a} of rank {rank} is not the name of a host")
    ips, rdma = entry.get("ips", []), entry.get("rdma", [])
    for key, values in (("ips", ips), ("rdma", rdma)):
        if not isinstance(values, list):
            raise LaunchError(f'{where}: "{key}" of rank {rank} ({name}) must be a list')
    for one in rdma:
        if one is not None and not all(isinstance(device, str) for device in (one if isinstance(one, list) else [one])):
            raise LaunchError(f'{where}: "rdma" of rank {rank} ({name}) must have names of devices')
    for ip in ips:
        try:
            ipaddress.ip_address(ip if isinstance(ip, str) else "")
        except ValueError:
            raise LaunchError(f"{where}: {ip!r} of rank {rank} is not an IP address") from None
    python = entry.get("python")
    if python is not None and not (isinstance(python, str) and _PATH.fullmatch(python)):
        raise LaunchError(f'{where}: "python" of rank {rank} ({name}) must be a path that begins with / or ~/{_PLAIN}')
    speed = entry.get("speed")
    if speed is not None and (
        not isinstance(speed, int | float) or isinstance(speed, bool) or not 0 < speed < math.inf
    ):
        raise LaunchError(f'{where}: "speed" of rank {rank} ({name}) must be a number above 0')
    return Host(name, tuple(ips), tuple(rdma), python, speed)
