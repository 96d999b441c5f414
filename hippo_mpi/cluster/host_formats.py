"""Lists of hosts as other launchers write them: Open MPI, MPICH, PBS, Slurm, plain lines; read and written."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from hippo_mpi.cluster.hostfile import Hostfile, hostfile_of, read_hostfile
from hippo_mpi.errors import LaunchError, UserError
from hippo_mpi.transport.ports import THIS_MACHINE

FORMATS = ("mlx", "openmpi", "mpich", "lines")
_MAX_RANKS = 10_000
_OPEN_MPI = re.compile(r"(\S+)\s+(?:slots|max_slots|max-slots)\s*=\s*(\d+).*")
_MPICH = re.compile(r"([^\s:]+):(\d+)(?:\s.*)?")
_RANGE = re.compile(r"(\d+)-(\d+)")


def read_any(path: Path) -> Hostfile:
    """Read a list of hosts in any format: a hostfile of ours, or lines such as host, host slots=2, host:2 or node[01-04].

    Raises:
        UserError: it can't be read, or a line names no host.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} can't be read: {error}") from None
    if text.lstrip().startswith(("[", "{")):
        return read_hostfile(path)
    names = [
        name for number, line in enumerate(text.splitlines(), 1) for name in _names(line, f"{path}, line {number}")
    ]
    return hostfile_of([{"ssh": name} for name in names], str(path))


def _names(line: str, where: str) -> Iterator[str]:
    """Return the host of each rank in a line."""
    line = line.partition("#")[0].strip()
    if not line:
        return
    found = _OPEN_MPI.fullmatch(line) or _MPICH.fullmatch(line)
    host, count = (found[1], int(found[2])) if found else (line, 1)
    if count > _MAX_RANKS:
        raise UserError(f"{where}: {count:,} ranks exceed the limit of {_MAX_RANKS:,}")
    for name in expand(host, where):
        yield from [name] * count


def expand(nodes: str, where: str) -> list[str]:
    """Return the names in Slurm's form for many, such as node[01-03,7],login.

    Raises:
        UserError: it is no such list.
    """
    names: list[str] = []
    for part in re.split(r",(?![^\[]*\])", nodes):
        found = re.fullmatch(r"([^\[\]]*)(?:\[([0-9,-]+)\]([^\[\]]*))?", part)
        if not found or not part:
            raise UserError(f"{where}: {nodes[:80]!a} is not a list of hosts")
        for number in _numbers(found[2], where) if found[2] else [""]:
            names.append(f"{found[1]}{number}{found[3] or ''}")
    return names


def _numbers(ranges: str, where: str) -> Iterator[str]:
    """Return the numbers in 01-03,7, as wide as they are written."""
    for one in ranges.split(","):
        found = _RANGE.fullmatch(one)
        if not found and not one.isdigit():
            raise UserError(f"{where}: {one!a} is not a range of numbers")
        first, last = (found[1], found[2]) if found else (one, one)
        if int(last) - int(first) > _MAX_RANKS:
            raise UserError(f"{where}: {one} exceeds the limit of {_MAX_RANKS:,} hosts")
        yield from (f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1))


def written(hostfile: Hostfile, form: str) -> str:
    """Return a list of hosts in a format.

    Raises:
        LaunchError: a host for mlx.launch has no address that can be looked up.
    """
    if form == "mlx":
        return _with_addresses(hostfile).to_json() + "\n"
    names = [_own_name() if host.ssh == THIS_MACHINE else host.ssh.rpartition("@")[2] for host in hostfile.hosts]
    counts = [(name, sum(1 for _ in group)) for name, group in groupby(names)]
    line = {"openmpi": "{} slots={}", "mpich": "{}:{}", "lines": "{}"}[form]
    return "".join(f"{line.format(name, count)}\n" * (count if form == "lines" else 1) for name, count in counts)


def _own_name() -> str:
    """Return what others call this machine: loopback's address would be each one's own."""
    return socket.gethostname()


def _with_addresses(hostfile: Hostfile) -> Hostfile:
    hosts = []
    for host in hostfile.hosts:
        ips = host.ips
        if not ips:
            try:
                ips = (str(socket.getaddrinfo(host.ssh.rpartition("@")[2], 22, socket.AF_INET)[0][4][0]),)
            except OSError:
                raise LaunchError(f"{hostfile.where}: can't resolve {host.ssh}: give its ips") from None
        hosts.append(replace(host, ips=ips))
    return replace(hostfile, hosts=tuple(hosts))
