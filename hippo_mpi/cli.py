"""hippo-mpi: all commands under one name; `hippo-mpi generate` is hippo_mpi.generate.

It knows commands by name only, and imports a command when it is asked for.
"""

from __future__ import annotations

import importlib
import signal
import sys
from importlib.resources import files
from types import ModuleType

from hippo_mpi.config.bundled import BUNDLED
from hippo_mpi.config.parser import Parser
from hippo_mpi.errors import UserError, print_error

COMMANDS = {
    "run": "start a command on all ranks: run -n 2 --command chat",
    "generate": "answer one prompt",
    "chat": "hold a conversation",
    "batch": "answer a file of prompts",
    "serve": "serve an API that survives rank failures",
    "page": "open a web page for a server: a chat, and its ranks",
    "benchmark": "measure the speed of all ranks against one",
    "plan": "show what each rank would hold; loads no weights",
    "models": "list a catalogue's models, and whether they fit",
    "audit": "verify an audit log, or summarise it",
    "cluster": "say what is wrong with the machines of a run, and what to do",
}
SHELLS = ("bash", "zsh", "fish")


def make_parser() -> Parser:
    """Return the parser of `hippo-mpi` itself; the commands have their own."""
    parser = Parser(
        prog="hippo-mpi",
        usage="hippo-mpi COMMAND [options]",
        description="Run a model that is too big for one machine on several.",
        epilog="Each command has a --help of its own.",
    )
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND [options]", dest="verb", required=True)
    for name, line in COMMANDS.items():
        verbs.add_parser(name, help=line, add_help=False)
    completion = verbs.add_parser("completion", help="print a shell's completion script")
    completion.add_argument("shell", choices=SHELLS, help="bash, zsh or fish")
    verbs.add_parser("dashboard", help="print a Grafana dashboard of a server's metrics")
    return parser


def main() -> None:
    """Run the command that sys.argv names, or print what else it asks for."""
    argv = sys.argv[1:] or ["--help"]
    if argv[0] in COMMANDS:
        sys.argv = [f"hippo_mpi.{argv[0]}", *argv[1:]]
        _load(argv[0]).main()
        return
    try:
        arguments = make_parser().parse_args(argv)
    except UserError as error:
        print_error(str(error))
        sys.exit(error.exit_code)
    if arguments.verb == "completion":
        print(completion_script(arguments.shell), end="")
    else:
        print((BUNDLED / "launch" / "grafana.json").read_text(), end="")


def completion_script(shell: str) -> str:
    """Return the completion script of a shell.

    The scripts are generated from the parsers beforehand: importing all of those takes MLX, and seconds.
    """
    return (files("hippo_mpi") / "completions" / f"hippo-mpi.{shell}").read_text()


def module_of(command: str) -> str:
    """Return the module of a command; that of a command with a room of its own is in there."""
    return "hippo_mpi.cluster.__main__" if command == "cluster" else f"hippo_mpi.{command}"


def _load(command: str) -> ModuleType:
    """Import a command; a Ctrl-C during the import ends the process without a traceback."""
    previous = signal.getsignal(signal.SIGINT)
    if previous is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    module = importlib.import_module(module_of(command))
    signal.signal(signal.SIGINT, previous)
    return module


if __name__ == "__main__":
    main()
