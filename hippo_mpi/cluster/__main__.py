"""hippo_mpi.cluster: look after the machines of a run.

hippo_mpi.cluster find                                        # machines that can be logged in to
hippo_mpi.cluster setup mini2.local                           # from a bare machine to a first token
hippo_mpi.cluster remove mini2.local                          # all as it was before
hippo_mpi.cluster tune                                        # settings that matter; --apply, --undo
hippo_mpi.cluster doctor --hostfile hosts.json                # what is wrong with them, and what to do
hippo_mpi.cluster doctor mini2.local anna@mini3.local         # of hosts that are in no hostfile yet
hippo_mpi.cluster doctor --save report.json                   # for a bug report; --from judges it again
hippo_mpi.cluster link --hostfile hosts.json                  # what their links give, and what they should
hippo_mpi.cluster top --hostfile hosts.json                   # what they do, live
hippo_mpi.cluster sync org/model --hostfile hosts.json        # each host gets the bytes of its own layers
hippo_mpi.cluster stop --hostfile hosts.json                  # ranks whose starter is gone
hippo_mpi.cluster convert $PBS_NODEFILE --to mlx              # lists of hosts of other launchers
"""

from __future__ import annotations

import importlib
import signal
import sys
from types import ModuleType

from hippo_mpi.config.parser import OptionsParser, Parser
from hippo_mpi.errors import HippoError, print_error

VERBS = {
    "find": "list machines that announce their ssh server, and the link to each",
    "setup": "from bare machines to a first token, and a hostfile; safe to repeat",
    "remove": "take away all that setup and tune have put on a host",
    "tune": "settings of hosts that matter to ranks: shown, changed after a yes, put back",
    "doctor": "say what is wrong with hosts, and what to do",
    "link": "measure the links between hosts",
    "top": "show what hosts do, live in the terminal",
    "sync": "give each host the bytes of its own layers",
    "stop": "end ranks whose starter is gone",
    "convert": "print a list of hosts in another format",
}
"""Each is a module of `verbs`, with a dataclass `Options` and `run`, which returns the exit status."""


def make_parser() -> Parser:
    """Return the parser of the command; each verb has its own."""
    parser = Parser(
        prog="hippo_mpi.cluster",
        usage="hippo_mpi.cluster VERB [options]",
        description=(__doc__ or "").splitlines()[0],
        epilog="Each verb has a --help of its own.",
    )
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", dest="verb", required=True)
    for name, line in VERBS.items():
        verbs.add_parser(name, help=line, add_help=False)
    return parser


def _module_of(verb: str) -> ModuleType:
    return importlib.import_module(f"hippo_mpi.cluster.verbs.{verb}")


def parser_of(verb: str) -> OptionsParser:  # type: ignore[type-arg]  # of the verb's own class
    """Return the parser of a verb's options."""
    return OptionsParser(_module_of(verb).Options, prog=f"hippo_mpi.cluster {verb}", description=VERBS[verb])


def main() -> None:
    """Run the command and exit with its status."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing is left half done by a Ctrl-C
    try:
        if sys.argv[1:2] and sys.argv[1] in VERBS:
            code: int = _module_of(sys.argv[1]).run(parser_of(sys.argv[1]).read(sys.argv[2:]))
        else:
            make_parser().parse_args(sys.argv[1:] or ["--help"])
            code = 0
    except HippoError as error:
        print_error(str(error))
        code = error.exit_code
    sys.exit(code)


if __name__ == "__main__":
    main()
