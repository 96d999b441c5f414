"""The hosts of a run: read from a hostfile, checked, and given the run key. Loads no MLX."""

from __future__ import annotations

import ipaddress
import json
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hippo_mpi.errors import LaunchError
from hippo_mpi.transport.ports import THIS_MACHINE
from hippo_mpi.transport.run_key import RunKey

_SSH_TIMEOUT_S = 5  # to connect; the whole command gets twice as long


def read_hostfile(path: Path) -> list[dict[str, Any]]:
    """Read a hostfile; return its entries, {"ssh": name, "ips": [address]}, one per rank.

    Raises:
        LaunchError: it can't be read, names no host, or a host that can't be ended.
    """
    content = read_json(path)
    hosts = content.get("hosts") if isinstance(content, dict) else content
    if not isinstance(hosts, list) or not hosts:
        raise LaunchError(f'hostfile {path} lists no host; it needs one {{"ssh": ..., "ips": [...]}} per rank')
    check_hosts(hosts, f"hostfile {path}")
    return hosts


def read_json(path: Path) -> Any:
    """Read a hostfile as JSON, without checking its content.

    Raises:
        LaunchError: it can't be read, or isn't JSON.
    """
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise LaunchError(f"hostfile {path} can't be read: {error.strerror}") from None
    except ValueError as error:
        raise LaunchError(f"hostfile {path} is not JSON: {error}") from None


def check_hosts(hosts: list[Any], where: str) -> None:
    """Check that entries are {"ssh": name, "ips": [...]} with valid addresses, and that their hosts exist.

    Raises:
        LaunchError: one isn't, or its host can't be ended; the message begins with `where`.
    """
    for rank, host in enumerate(hosts):
        if not isinstance(host, dict) or not isinstance(host.get("ssh"), str):
            raise LaunchError(f'{where}: the entry of rank {rank} has no "ssh"')
        for ip in host.get("ips", []):
            try:
                ipaddress.ip_address(ip)
            except ValueError:
                raise LaunchError(f"{where}: {ip!r} of rank {rank} is not an IP address") from None
        _check_host(where, rank, host["ssh"])


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
        raise LaunchError(f"{where}: there is no host {name} (rank {rank})") from None


def installed(command: str) -> str:
    """Return a command's full path if it is installed beside our Python, else its name.

    Through ssh, PATH doesn't include the virtual environment.
    """
    path = Path(sys.executable).parent / command
    return str(path) if path.exists() else command


def check_addresses(hosts: list[dict[str, Any]], backend: str, where: str) -> None:
    """Check that each host of a ring has an address to listen on.

    Raises:
        LaunchError: one has none; the message begins with `where`.
    """
    for rank, host in enumerate(hosts):
        if backend == "ring" and not host.get("ips"):
            raise LaunchError(
                f'{where}: rank {rank} ({host["ssh"]}) has no "ips", where the ring listens; such as'
                f' {{"ssh": "{host["ssh"]}", "ips": ["192.168.5.{rank + 1}"]}}'
            )


def knock(hosts: list[dict[str, Any]], where: str, key: RunKey) -> None:
    """Copy the run's key to all other machines in parallel, through ssh without a password.

    Raises:
        LaunchError: some don't let us in within seconds; the message names each, with ssh's last line.
    """
    names: dict[str, int] = {}
    for rank, host in enumerate(hosts):
        if host["ssh"] != THIS_MACHINE:
            names.setdefault(host["ssh"], rank)
    with ThreadPoolExecutor(max(1, len(names))) as pool:
        answers = dict(zip(names, pool.map(lambda name: _hand_over(key, name), names), strict=True))
    silent = [f"{name} (rank {names[name]}): {why}" for name, why in answers.items() if why]
    if silent:
        raise LaunchError(f"{where}: no way in by `ssh NAME true` to {'; '.join(silent)}")


def _hand_over(key: RunKey, name: str) -> str:
    """Copy the key to a host; return "" if that worked, else the last line of ssh."""
    try:
        ended = subprocess.run(
            key.command(name, _SSH_TIMEOUT_S), input=key.key.encode(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            timeout=2 * _SSH_TIMEOUT_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"no answer within {2 * _SSH_TIMEOUT_S} s"
    lines = ended.stderr.decode(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), f"exit status {ended.returncode}")
    return last if ended.returncode else ""
