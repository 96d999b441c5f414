"""hippo_mpi.run: start a command on all ranks.

What ./launch/run does, too: check the hosts, start the ranks, lend rank 0 its terminal, and end with rank 0's status.
"""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a Ctrl-C during the imports needs no traceback

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from hippo_mpi.cluster.doctor.doctor import first_error
from hippo_mpi.cluster.hostfile import Host, Hostfile, hostfile_of, read_hostfile
from hippo_mpi.cluster.hosts import check_hosts, installed, knock
from hippo_mpi.cluster.starting.launch import Launch
from hippo_mpi.cluster.starting.start_plan import StartPlan, start_plan
from hippo_mpi.config import checks
from hippo_mpi.config.bundled import BUNDLED
from hippo_mpi.config.parser import OptionsParser, option, read_given
from hippo_mpi.config.serve_options import BACKENDS, StartOptions
from hippo_mpi.config.yaml_file import ConfigFile, read_start, take_config, words_of
from hippo_mpi.errors import HippoError, LaunchError, RankError, install_hint, print_error
from hippo_mpi.transport.ports import THIS_MACHINE, HeldPorts, new_loopback
from hippo_mpi.transport.run_key import RunKey
from hippo_mpi.transport.terminal import open_standard_streams

HOSTFILE = BUNDLED / "hostfile"  # a checkout's
RANKS = 2
"""Of this machine, where there is no hostfile either."""
_HERE = Host(THIS_MACHINE, (THIS_MACHINE,))
# Otherwise mpirun refuses to start more ranks than there are cores.
_MANY_RANKS = {
    "PRTE_MCA_hwloc_default_binding_policy": "none",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}
COMMANDS = [f"hippo_mpi.{name}" for name in ("generate", "chat", "batch", "benchmark", "models", "plan", "serve")]


def _dotted(name: str) -> str:
    return f"hippo_mpi.{name.removeprefix('hippo_mpi.')}"


@dataclass(frozen=True, kw_only=True)
class LaunchOptions:
    """All options of hippo_mpi.run."""

    num_ranks: int | None = option(
        None, "number of local ranks, instead of a hostfile", "-n", check=checks.positive, metavar="RANKS"
    )
    hostfile: Path | None = option(
        None,
        "JSON list of hosts, as for mlx.launch; default: the hosts of --config, those in the file hostfile of a"
        f" checkout, or {RANKS} local ranks",
        check=Path, metavar="FILE",
    )  # fmt: skip
    backend: str | None = option(None, "default: ring", choices=BACKENDS)
    starting_port: int | None = option(
        None, "first of the ring's ports, one per rank; default: free ones", check=checks.port, metavar="PORT"
    )
    command: str = option(
        COMMANDS[0], "command that every rank runs; hippo_mpi. may be left out", check=_dotted, choices=COMMANDS
    )


def make_parser() -> OptionsParser[LaunchOptions]:
    """Return the parser of the command line's own options."""
    prog = "./launch/run" if Path(sys.argv[0]).name == "run.py" else "hippo_mpi.run"  # which starts this as a module
    return OptionsParser(
        LaunchOptions,
        prog=prog,
        usage=f"{prog} [-n RANKS | --hostfile FILE] [--backend NAME] [--starting-port PORT] [--command NAME] [options of the command]",
        description="Start a command on all ranks. Options that aren't listed here go to the command; its own follow.",
        add_help=False,
    )


def find_hosts(options: LaunchOptions, rest: list[str]) -> Hostfile:
    """Return where ranks are to run, and by which backend, checked.

    Raises:
        LaunchError: the hosts can't be used.
        UserError: the file of --config can't be read.
    """
    options, file = _with_file(options, rest)
    hostfile = None if options.num_ranks is not None else _named_hosts(options, file)
    hostfile = hostfile or Hostfile((_HERE,) * (options.num_ranks or RANKS), "this machine")
    hostfile = replace(hostfile, backend=options.backend or hostfile.backend or "ring")
    hostfile.check(hostfile.backend or "")
    check_hosts(hostfile)
    return hostfile


def make_job(
    options: LaunchOptions, hostfile: Hostfile, rest: list[str], held: contextlib.ExitStack, key: RunKey
) -> StartPlan | list[str]:
    """Return what our starter is to do, or mlx.launch's command line for MPI. Ports are `held`; the hosts let us in.

    Raises:
        LaunchError: a host doesn't answer, or there are no ports.
    """
    hosts, backend = hostfile.hosts, hostfile.backend or "ring"
    knock(hostfile, key if backend == "mpi" else None)
    if backend == "mpi":
        if not shutil.which("mpirun"):
            raise LaunchError(f"--backend mpi needs mpirun, which isn't installed: {install_hint('mpi')}")
        if set(hosts) == {_HERE} and len(hosts) > (os.cpu_count() or 1):
            for name, value in _MANY_RANKS.items():
                os.environ.setdefault(name, value)
        on = ["--hostfile", _write_hosts(hostfile, held), "--backend", backend]
        return [installed("mlx.launch"), *on, "--", installed(options.command), *rest]
    if set(hosts) == {_HERE}:
        # The ring of ranks of this machine is one that no stranger meets by chance.
        hosts = (replace(_HERE, ips=(new_loopback(),)),) * len(hosts)
    num_ports = sum(len(host.ips) for host in hosts) if backend == "ring" else 1
    if (options.starting_port or 0) + num_ports > 1 << 16:
        raise LaunchError(
            f"--starting-port {options.starting_port} is too high: the run needs {num_ports} ports up to 65535"
        )
    first = options.starting_port or held.enter_context(HeldPorts(num_ports)).first
    return start_plan(replace(hostfile, hosts=hosts), backend, ["-m", options.command, *rest], first)


def _with_file(options: LaunchOptions, rest: list[str]) -> tuple[LaunchOptions, ConfigFile]:
    """Return the options with what the file of --config says where they say nothing, and what else it says of hosts."""
    path, _ = take_config(rest)
    file = read_start(path) if path else ConfigFile()
    told, _ = read_given(StartOptions, words_of(file.settings, StartOptions))
    if options.num_ranks is None and options.hostfile is None:
        # As for a server, a hostfile wins over a number of ranks.
        ranks = None if "hostfile" in told else told.get("ranks")
        options = replace(options, num_ranks=ranks, hostfile=told.get("hostfile"))
    return replace(options, backend=options.backend or told.get("backend")), file


def _named_hosts(options: LaunchOptions, file: ConfigFile) -> Hostfile | None:
    """Return the hosts of the hostfile, or of the file of --config; None: there are none."""
    if options.hostfile is not None:
        return read_hostfile(options.hostfile)
    if file.hosts:
        return hostfile_of(file.hosts, file.lines["hosts"])
    return read_hostfile(HOSTFILE) if HOSTFILE.exists() else None


def _write_hosts(hostfile: Hostfile, held: contextlib.ExitStack) -> str:
    """Return the name of a hostfile that is there as long as it is held."""
    path = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="hippo-hosts-"))) / "hosts.json"
    path.write_text(hostfile.to_json())
    return str(path)


def main() -> None:
    """Run the command on this process's command line; ends the process."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # nor one while hosts are checked
    open_standard_streams()
    # Where mpirun is, which mlx.launch looks for, in an environment that isn't active.
    beside_us = str(Path(sys.executable).parent)
    os.environ["PATH"] = os.pathsep.join([*filter(None, [os.environ.get("PATH")]), beside_us])
    parser = make_parser()
    try:
        options, rest = parser.read_known()
        if {"-h", "--help"} & set(rest):
            print(f"{parser.format_help()}\n{options.command}:\n", flush=True)
            sys.exit(subprocess.run([installed(options.command), "--help"]).returncode)
        if "--version" in rest:
            sys.exit(subprocess.run([installed(options.command), "--version"]).returncode)
        with contextlib.ExitStack() as held:
            hostfile, key = find_hosts(options, rest), RunKey()
            code = Launch().run(make_job(options, hostfile, rest, held, key), key)
        if code == RankError.exit_code and (finding := first_error(hostfile)):
            print_error(f"{finding.check} on {finding.host}: {finding.found}; {finding.fix}")
    except HippoError as error:
        print_error(str(error))
        code = error.exit_code
    sys.exit(code)


if __name__ == "__main__":
    main()
