"""What ./launch/run does: check the hostfile, start mlx.launch, and pass on the exit status that it swallows."""

from __future__ import annotations

import argparse
import ipaddress
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hippo_mpi.config import Parser, positive
from hippo_mpi.errors import HippoError, LaunchError
from hippo_mpi.serving.terminal.progress import TERMINAL
from hippo_mpi.transport.control import RUN_KEY
from hippo_mpi.transport.world import STATUS_FILE

HOSTFILE = Path(__file__).parent.parent / "hostfile"


def make_parser() -> Parser:
    parser = Parser(
        prog="./launch/run",
        description="Start a command on all ranks; what isn't listed here goes to the command.",
        add_help=False,
    )
    parser.add_argument("-n", type=positive, help="number of local ranks, instead of a hostfile")
    parser.add_argument("--hostfile", type=Path, default=HOSTFILE, help="JSON list of hosts, as for mlx.launch")
    parser.add_argument("--backend", default=None, help="ring, mpi, jaccl or jaccl-ring")
    parser.add_argument("--starting-port", type=positive, help="first port of the ring; a free one if not given")
    parser.add_argument("--command", default="hippo_mpi.generate", help="hippo_mpi.generate, .chat or .plan")
    return parser


def read_hostfile(path: Path) -> list[dict[str, Any]]:
    """The hosts of a hostfile.

    Raises:
        LaunchError: it can't be read, names no host, or a host that can't be found.
    """
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise LaunchError(f"hostfile {path} can't be read: {error.strerror}") from None
    except ValueError as error:
        raise LaunchError(f"hostfile {path} is not JSON: {error}") from None
    hosts = content.get("hosts") if isinstance(content, dict) else content
    if not isinstance(hosts, list) or not hosts:
        raise LaunchError(f'hostfile {path} lists no host; it needs one {{"ssh": ..., "ips": [...]}} per rank')
    check_hosts(hosts, f"hostfile {path}")
    return hosts


def check_hosts(hosts: list[Any], where: str) -> None:
    """Raise a LaunchError if an entry isn't {"ssh": name, "ips": [...]}, or there is no such host."""
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
    if name == "127.0.0.1":
        return
    try:
        # ssh knows aliases that name servers don't.
        settings = subprocess.run(["ssh", "-G", name], capture_output=True, text=True, timeout=10, check=True).stdout
        real = next(line.split()[1] for line in settings.splitlines() if line.startswith("hostname "))
        socket.getaddrinfo(real, 22)
    except FileNotFoundError:
        raise LaunchError(f"{where}: host {name} of rank {rank} needs ssh, which isn't installed") from None
    except (OSError, subprocess.SubprocessError, StopIteration):
        raise LaunchError(f"{where}: there is no host {name} (rank {rank})") from None


def free_ports(count: int) -> int:
    """The first of `count` local ports in a row that nobody listens on."""
    for first in range(32323, 60000, 16):
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind(("", port))
            return first
        except OSError:
            continue
    raise LaunchError(f"no {count} free ports in a row between 32323 and 60000")


def installed(command: str) -> str:
    """A command's full path, if it is installed beside us: through ssh, no PATH leads to a virtual environment."""
    path = Path(sys.executable).parent / command
    return str(path) if path.exists() else command


def launch_arguments(arguments: argparse.Namespace, rest: list[str]) -> list[str]:
    """The mlx.launch command line."""
    launch = [installed("mlx.launch")]
    if arguments.n is not None:
        num_ranks = arguments.n
        launch += ["-n", str(num_ranks)]
    else:
        num_ranks = len(read_hostfile(arguments.hostfile))
        launch += ["--hostfile", str(arguments.hostfile)]
    launch += ["--backend", arguments.backend] if arguments.backend else []
    if arguments.backend in (None, "ring"):
        launch += ["--starting-port", str(arguments.starting_port or free_ports(num_ranks))]
    return [*launch, "--", installed(arguments.command), *rest]


def start(command_line: list[str]) -> int:
    """Run mlx.launch to its end; the exit status of rank 0, or 1 if it left none."""
    with tempfile.TemporaryDirectory(prefix="hippo-run-") as folder:
        status = Path(folder) / "status"
        # mlx.launch lives on after SIGINT, with nobody to read its ranks' output; after SIGTERM the ranks see
        # their input end, and go.
        given = {STATUS_FILE: str(status), RUN_KEY: secrets.token_hex(32)}
        env = {**os.environ, **given, TERMINAL: str(int(sys.stderr.isatty()))}
        # A host that isn't called 127.0.0.1 is reached through ssh, which passes no environment on.
        words = [word for name, value in given.items() for word in ("--env", f"{name}={value}")]
        command_line = [command_line[0], *words, *command_line[1:]]
        launcher = subprocess.Popen(command_line, env=env)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda *_: launcher.terminate())
        code = launcher.wait()
        if code != 0:
            return code if code > 0 else 128 - code
        return int(status.read_text()) if status.exists() else 1


def main() -> None:
    try:
        arguments, rest = make_parser().parse_known_args()
        code = start(launch_arguments(arguments, rest))
    except HippoError as error:
        sys.stderr.write(f"error: {error}\n")
        code = error.exit_code
    sys.exit(code)


if __name__ == "__main__":
    main()
