"""What ./launch/run does: check the hosts, start mlx.launch, lend rank 0 its terminal, and end with rank 0's status."""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a Ctrl-C during the imports needs no traceback

import argparse
import contextlib
import ipaddress
import json
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hippo_mpi.config import Parser, port, positive
from hippo_mpi.errors import HippoError, LaunchError, print_error
from hippo_mpi.serving.terminal.launch import Launch
from hippo_mpi.transport.ports import THIS_MACHINE, HeldPorts, new_loopback
from hippo_mpi.transport.run_key import RunKey
from hippo_mpi.transport.terminal import open_standard_streams

HOSTFILE = Path(__file__).parent.parent / "hostfile"
COMMANDS = [f"hippo_mpi.{name}" for name in ("generate", "chat", "batch", "benchmark", "models", "plan", "serve")]
_KNOCK_S = 5


def make_parser() -> Parser:
    parser = Parser(
        prog="./launch/run",
        usage="./launch/run [-n RANKS | --hostfile FILE] [--backend NAME] [--starting-port PORT] [--command NAME] [options of the command]",
        description="Start a command on all ranks. What isn't listed here goes to the command, whose options follow.",
        add_help=False,
    )
    parser.add_argument("-n", type=positive, metavar="RANKS", help="number of local ranks, instead of a hostfile")
    parser.add_argument(
        "--hostfile", type=Path, metavar="FILE", default=HOSTFILE, help="JSON list of hosts, as for mlx.launch"
    )
    parser.add_argument("--backend", choices=("ring", "mpi", "jaccl", "jaccl-ring"), help="ring if not given")
    parser.add_argument(
        "--starting-port",
        type=port,
        metavar="PORT",
        help="first port of the ring, one per rank; a free one if not given",
    )
    parser.add_argument("--command", choices=COMMANDS, default=COMMANDS[0], help="what every rank runs")
    return parser


def read_hostfile(path: Path) -> list[dict[str, Any]]:
    """The hosts of a hostfile.

    Raises:
        LaunchError: it can't be read, names no host, or a host that can't be found.
    """
    content = _read_json(path)
    hosts = content.get("hosts") if isinstance(content, dict) else content
    if not isinstance(hosts, list) or not hosts:
        raise LaunchError(f'hostfile {path} lists no host; it needs one {{"ssh": ..., "ips": [...]}} per rank')
    check_hosts(hosts, f"hostfile {path}")
    return hosts


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise LaunchError(f"hostfile {path} can't be read: {error.strerror}") from None
    except ValueError as error:
        raise LaunchError(f"hostfile {path} is not JSON: {error}") from None


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
    if name == THIS_MACHINE:
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


def installed(command: str) -> str:
    """A command's full path, if it is installed beside us: through ssh, no PATH leads to a virtual environment."""
    path = Path(sys.executable).parent / command
    return str(path) if path.exists() else command


def launch_arguments(
    arguments: argparse.Namespace, rest: list[str], held: contextlib.ExitStack, key: RunKey
) -> list[str]:
    """Return the mlx.launch command line; its ports are `held`, and its hosts have the key.

    Raises:
        LaunchError: the hosts can't be used, or don't answer.
    """
    launch = [installed("mlx.launch")]
    backend = arguments.backend or "ring"
    if arguments.n is not None:
        hosts: list[dict[str, Any]] = [{"ssh": THIS_MACHINE, "ips": [THIS_MACHINE]}] * arguments.n
        launch += ["-n", str(arguments.n)]
    else:
        hosts, content = read_hostfile(arguments.hostfile), _read_json(arguments.hostfile)
        backend = arguments.backend or (isinstance(content, dict) and content.get("backend")) or "ring"
        _check_addresses(hosts, backend, f"hostfile {arguments.hostfile}")
        knock(hosts, f"hostfile {arguments.hostfile}", key)
        launch += ["--hostfile", str(arguments.hostfile)]
    launch += ["--backend", backend]
    if backend == "ring":
        if all((host["ssh"], host["ips"]) == (THIS_MACHINE, [THIS_MACHINE]) for host in hosts):
            launch[1:3] = ["--hostfile", held.enter_context(_hosts_here(len(hosts)))]
        num_ports = sum(len(host["ips"]) for host in hosts)
        if (arguments.starting_port or 0) + num_ports > 1 << 16:
            raise LaunchError(f"--starting-port {arguments.starting_port} leaves no {num_ports} ports up to 65535")
        first = arguments.starting_port or held.enter_context(HeldPorts(num_ports)).first
        launch += ["--starting-port", str(first)]
    return [*launch, "--", installed(arguments.command), *rest]


@contextlib.contextmanager
def _hosts_here(count: int) -> Iterator[str]:
    """Write a hostfile for ranks of this machine, whose ring no stranger meets by chance."""
    with tempfile.NamedTemporaryFile("w", prefix="hippo-hosts-", suffix=".json") as file:
        json.dump([{"ssh": THIS_MACHINE, "ips": [new_loopback()]}] * count, file)
        file.flush()
        yield file.name


def _check_addresses(hosts: list[dict[str, Any]], backend: str, where: str) -> None:
    """Raise a LaunchError if the ring's ranks wouldn't know where to listen."""
    for rank, host in enumerate(hosts):
        if backend == "ring" and not host.get("ips"):
            raise LaunchError(
                f'{where}: rank {rank} ({host["ssh"]}) has no "ips", where the ring listens; such as'
                f' {{"ssh": "{host["ssh"]}", "ips": ["192.168.5.{rank + 1}"]}}'
            )


def knock(hosts: list[dict[str, Any]], where: str, key: RunKey) -> None:
    """Hand the run's key to all other machines at once, which let us in without a password.

    Raises:
        LaunchError: some don't, within seconds; it names each, with ssh's last line.
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
    """ "" if ssh lets us in and the key is there, else its last line."""
    try:
        found = subprocess.run(
            key.command(name, _KNOCK_S), input=key.key.encode(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            timeout=2 * _KNOCK_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"no answer within {2 * _KNOCK_S} s"
    lines = found.stderr.decode(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), f"exit status {found.returncode}")
    return last if found.returncode else ""


def main() -> None:
    open_standard_streams()
    parser = make_parser()
    try:
        arguments, rest = parser.parse_known_args()
        if {"-h", "--help"} & set(rest):
            print(f"{parser.format_help()}\n{arguments.command}:\n", flush=True)
            sys.exit(subprocess.run([installed(arguments.command), "--help"]).returncode)
        if "--version" in rest:
            sys.exit(subprocess.run([installed(arguments.command), "--version"]).returncode)
        with contextlib.ExitStack() as held:
            key = RunKey()
            code = Launch().run(launch_arguments(arguments, rest, held, key), key)
    except HippoError as error:
        print_error(str(error))
        code = error.exit_code
    sys.exit(code)


if __name__ == "__main__":
    main()
