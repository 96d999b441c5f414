"""The hosts of a run: looked up, and given the run key. Loads no MLX."""

from __future__ import annotations

import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hippo_mpi.cluster.hostfile import Hostfile
from hippo_mpi.errors import LaunchError
from hippo_mpi.transport.ports import THIS_MACHINE
from hippo_mpi.transport.run_key import SSH, RunKey

_SSH_TIMEOUT_S = 5  # to connect; the whole command gets twice as long


def check_hosts(hostfile: Hostfile) -> None:
    """Check that all hosts exist.

    Raises:
        LaunchError: one doesn't, or there is no ssh.
    """
    for rank, host in enumerate(hostfile.hosts):
        _check_host(hostfile.where, rank, host.ssh)


def _check_host(where: str, rank: int, name: str) -> None:
    if name == THIS_MACHINE:
        return
    try:
        # The name may be an alias of ssh's configuration, which name servers don't know.
        settings = subprocess.run(["ssh", "-G", name], capture_output=True, text=True, timeout=10, check=True).stdout
        real = next(line.split()[1] for line in settings.splitlines() if line.startswith("hostname "))
        socket.getaddrinfo(real, 22)
    except FileNotFoundError:
        raise LaunchError(f"{where}: host {name} of rank {rank} needs ssh, which isn't installed") from None
    except (OSError, subprocess.SubprocessError, StopIteration):
        raise LaunchError(f"{where}: unknown host {name} (rank {rank})") from None


def installed(command: str) -> str:
    """Return a command's full path if it is installed beside our Python, else its name.

    Through ssh, PATH doesn't include the virtual environment.
    """
    path = Path(sys.executable).parent / command
    return str(path) if path.exists() else command


def knock(hostfile: Hostfile, key: RunKey | None = None) -> None:
    """Check that ssh lets us into all other machines without a password; copy the run's key there if one is given.

    Raises:
        LaunchError: some don't let us in within seconds; the message names each, with ssh's last line.
    """
    names: dict[str, int] = {}
    for rank, host in enumerate(hostfile.hosts):
        if host.ssh != THIS_MACHINE:
            names.setdefault(host.ssh, rank)
    with ThreadPoolExecutor(max(1, len(names))) as pool:
        answers = dict(zip(names, pool.map(lambda name: _knock_at(name, key), names), strict=True))
    silent = [f"{name} (rank {names[name]}): {why}" for name, why in answers.items() if why]
    if silent:
        raise LaunchError(f"{hostfile.where}: `ssh NAME true` fails for {'; '.join(silent)}")


def _knock_at(name: str, key: RunKey | None) -> str:
    """Return "" if a host lets us in, else the last line of ssh."""
    command = (
        key.command(name, _SSH_TIMEOUT_S) if key else [*SSH, "-o", f"ConnectTimeout={_SSH_TIMEOUT_S}", name, "true"]
    )
    try:
        ended = subprocess.run(
            command, input=key.key.encode() if key else b"", stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            timeout=2 * _SSH_TIMEOUT_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"no answer within {2 * _SSH_TIMEOUT_S} s"
    lines = ended.stderr.decode(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), f"exit status {ended.returncode}")
    return last if ended.returncode else ""
