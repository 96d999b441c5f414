"""hippo_mpi.run: start a command on all ranks.

What ./launch/run does, too: check the hosts, start mlx.launch, lend rank 0 its terminal, and end with rank 0's status.
"""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a Ctrl-C during the imports needs no traceback

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hippo_mpi.cluster.hosts import check_addresses, installed, knock, read_hostfile, read_json
from hippo_mpi.cluster.launch import Launch
from hippo_mpi.config.bundled import BUNDLED
from hippo_mpi.config.checks import port, positive
from hippo_mpi.config.parser import Parser
from hippo_mpi.config.serve_options import BACKENDS
from hippo_mpi.errors import HippoError, LaunchError, install_hint, print_error
from hippo_mpi.transport.ports import THIS_MACHINE, HeldPorts, new_loopback
from hippo_mpi.transport.run_key import RunKey
from hippo_mpi.transport.terminal import open_standard_streams

HOSTFILE = BUNDLED / "hostfile"  # a checkout's
RANKS = 2
"""Of this machine, where there is no hostfile either."""
COMMANDS = [f"hippo_mpi.{name}" for name in ("generate", "chat", "batch", "benchmark", "models", "plan", "serve")]


def make_parser() -> Parser:
    prog = "./launch/run" if Path(sys.argv[0]).name == "run.py" else "hippo_mpi.run"  # which starts this as a module
    parser = Parser(
        prog=prog,
        usage=f"{prog} [-n RANKS | --hostfile FILE] [--backend NAME] [--starting-port PORT] [--command NAME] [options of the command]",
        description="Start a command on all ranks. What isn't listed here goes to the command, whose options follow.",
        add_help=False,
    )
    parser.add_argument("-n", type=positive, metavar="RANKS", help="number of local ranks, instead of a hostfile")
    parser.add_argument(
        "--hostfile",
        type=Path,
        metavar="FILE",
        default=HOSTFILE if HOSTFILE.exists() else None,
        help=f"JSON list of hosts, as for mlx.launch; without one {RANKS} local ranks",
    )
    parser.add_argument("--backend", choices=BACKENDS, help="ring if not given")
    parser.add_argument(
        "--starting-port",
        type=port,
        metavar="PORT",
        help="first port of the ring, one per rank; a free one if not given",
    )
    parser.add_argument(
        "--command",
        type=lambda name: f"hippo_mpi.{name.removeprefix('hippo_mpi.')}",
        choices=COMMANDS,
        default=COMMANDS[0],
        help="what every rank runs; hippo_mpi. may be left out",
    )
    return parser


def launch_arguments(
    arguments: argparse.Namespace, rest: list[str], held: contextlib.ExitStack, key: RunKey
) -> list[str]:
    """Return the mlx.launch command line; its ports are `held`, and its hosts have the key.

    Raises:
        LaunchError: the hosts can't be used, or don't answer.
    """
    launch = [installed("mlx.launch")]
    backend = arguments.backend or "ring"
    if arguments.n is not None or arguments.hostfile is None:
        num_ranks = arguments.n or RANKS
        hosts: list[dict[str, Any]] = [{"ssh": THIS_MACHINE, "ips": [THIS_MACHINE]}] * num_ranks
        launch += ["-n", str(num_ranks)]
    else:
        hosts, content = read_hostfile(arguments.hostfile), read_json(arguments.hostfile)
        backend = arguments.backend or (isinstance(content, dict) and content.get("backend")) or "ring"
        check_addresses(hosts, backend, f"hostfile {arguments.hostfile}")
        knock(hosts, f"hostfile {arguments.hostfile}", key)
        launch += ["--hostfile", str(arguments.hostfile)]
    launch += ["--backend", backend]
    if backend == "mpi" and not shutil.which("mpirun"):
        raise LaunchError(f"--backend mpi needs mpirun, which isn't here: {install_hint('mpi')}")
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


def main() -> None:
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # nor one while hosts are checked
    open_standard_streams()
    # Where mpirun is, which mlx.launch looks for, in an environment that isn't active.
    beside_us = str(Path(sys.executable).parent)
    os.environ["PATH"] = os.pathsep.join([*filter(None, [os.environ.get("PATH")]), beside_us])
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
