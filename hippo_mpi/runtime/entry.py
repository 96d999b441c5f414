"""From a command line to a joined rank, and from its body to an exit status that every rank ends with."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, NoReturn, TypeVar

from hippo_mpi.checkpoint.checkpoint import ModelSource
from hippo_mpi.config.options import ConfigOptions, DeadlineOptions, DraftOptions, RunOptions
from hippo_mpi.config.parser import OptionsParser, changed
from hippo_mpi.config.yaml_file import expanded
from hippo_mpi.errors import ForeignError, HippoError, UserError, interrupted, print_error, printable, unread
from hippo_mpi.offline.progress import Progress
from hippo_mpi.planning.layer_split import Machine
from hippo_mpi.runtime.agreement import compare_ranks, negotiate
from hippo_mpi.runtime.layout_planner import PlanConstraints
from hippo_mpi.runtime.session import Session
from hippo_mpi.sharding.slot_caches import KVSettings
from hippo_mpi.transport.console import LentConsole, borrow_console
from hippo_mpi.transport.control import Control
from hippo_mpi.transport.launcher import Launcher
from hippo_mpi.transport.processes import kill_stopped_ranks
from hippo_mpi.transport.status_file import write_status
from hippo_mpi.transport.terminal import open_standard_streams, put_back_terminal
from hippo_mpi.transport.world import World, connect, detect_launch, end_within

_R = TypeVar("_R", bound=RunOptions)
_D = TypeVar("_D", bound=DeadlineOptions)
_LEAST_END_S = 10.0  # for the other ranks to end, on a busy machine


@dataclass(frozen=True)
class _Joined(Generic[_D]):
    """A rank that has joined, before anything is agreed on."""

    options: _D
    given: dict[str, str]  # options that aren't at their defaults; the same on every rank
    mistake: UserError | None
    world: World
    control: Control
    console: LentConsole | None


def run(
    parser: OptionsParser[_R],
    body: Callable[[Session[_R]], int],
    argv: list[str] | None = None,
    machines: Callable[[_R], list[Machine] | None] = lambda options: None,
) -> NoReturn:
    """Run `body` on every rank, over a model that they have agreed on. Rank 0's result is the exit status."""
    _run(parser, lambda joined: _with_model(joined, body, machines(joined.options)), argv)


def run_without_model(parser: OptionsParser[_D], body: Callable[[_D, list[Machine], Control], int]) -> NoReturn:
    """Run `body` on rank 0, which is told the ranks' budgets. Its result is the exit status."""

    def call(joined: _Joined[_D]) -> int:
        if joined.mistake and joined.world.rank == 0:
            joined.control.fail(joined.mistake)
        machines = compare_ranks(joined.world, joined.control, joined.given)
        code = body(joined.options, machines, joined.control) if joined.world.rank == 0 else 0
        joined.control.close()
        return code

    _run(parser, call)


def _run(parser: OptionsParser[_D], body: Callable[[_Joined[_D]], int], argv: list[str] | None = None) -> NoReturn:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a Python handler wouldn't run while MLX waits
    open_standard_streams()
    argv = sys.argv[1:] if argv is None else argv
    world, options, mistake, console = _start(parser, argv)
    try:
        control = Control(world, options.start_timeout, options.timeout)
    except HippoError as error:
        _refuse(f"{world.name}: {error}", error.exit_code, world.rank)
    try:
        given = {name: printable(str(value)) for name, value in changed(options).items()}
        control.on_end = _note_end
        code = body(_Joined(options, given, mistake, world, control, console))
    except HippoError as error:
        control.fail(error)
    except KeyboardInterrupt:
        control.fail(interrupted())
    except BrokenPipeError:  # whoever read our answer has enough
        control.fail(unread())
    except Exception as error:  # a worker's top frame: whatever went wrong, all ranks must end
        control.fail(ForeignError.caused_by(error))
    if world.size > 1:
        end_s = max(options.timeout, _LEAST_END_S)
        end_within(end_s, f"{world.name} waited {end_s:.0f} s for the other ranks to end")
    if world.backend != "mpi":  # which waits itself
        control.part()
    world.group = None  # MPI is finalised when the last reference goes
    _exit(code, world.rank, is_orderly=world.backend == "mpi")


def _note_end(code: int, why: str) -> None:
    """What rank 0 leaves behind when it must end at once."""
    put_back_terminal()
    write_status(code, why)


def _start(parser: OptionsParser[_D], argv: list[str]) -> tuple[World, _D, UserError | None, LentConsole | None]:
    """Return the world, the options and rank 0's console; a mistake is kept until all ranks can hear of it."""
    rank = 0
    try:
        launch = detect_launch()
        rank = launch.rank
        if rank > 0 and {"-h", "--help", "--version"} & set(argv):
            _exit(0, rank)
        console = borrow_console() if rank == 0 else None
        options, mistake = _read(parser, argv)
        if mistake and not launch.backend:
            raise mistake
        return connect(launch, options.start_timeout), options, mistake, console
    except HippoError as error:
        _refuse(str(error), error.exit_code, rank)


def _refuse(line: str, code: int, rank: int) -> NoReturn:
    """End a rank that has no connection to the others yet; each speaks for itself."""
    print_error(line)
    kill_stopped_ranks(os.getppid())
    _exit(code, rank)


def _with_model(joined: _Joined[_R], body: Callable[[Session[_R]], int], machines: list[Machine] | None) -> int:
    options, world, control, mistake = joined.options, joined.world, joined.control, joined.mistake
    launcher = Launcher(world, joined.console)
    progress = Progress(is_shown=world.rank == 0 and options.shows_progress)
    settings = KVSettings.from_options(options)

    def find_source() -> ModelSource:
        if mistake:
            raise mistake
        return ModelSource.from_options(options, not options.only_plans, looking)

    def looking() -> None:
        control.progress("listing the hub's files")

    num_draft_tokens = options.num_draft_tokens if isinstance(options, DraftOptions) else 0
    constraints = PlanConstraints(
        options.layer_split,
        options.max_context,
        num_draft_tokens,
        options.parallel,
        options.width_split,
        options.stages,
        options.tensor == "exact",
        options.collectives,
        options.layout,
        options.load,
        options.plan_for is not None,
        options.planned_link,
        options.has_comparison,
    )

    def say(text: str) -> None:
        progress.clear()
        print(text, file=sys.stderr, flush=True)

    agreement = negotiate(
        world,
        control,
        find_source,
        constraints,
        settings,
        joined.given,
        machines,
        lambda: ModelSource.of_draft(options, not options.only_plans, looking),
        say=say,
    )
    for note in agreement.planned.notes if agreement.planned is not None else ():
        say(note)
    try:
        return body(Session(options, world, control, launcher, settings, agreement, progress))
    finally:
        progress.clear()  # what is said next begins on a line of its own


def _read(parser: OptionsParser[_D], argv: list[str]) -> tuple[_D, UserError | None]:
    try:
        takes_config = issubclass(parser.options, ConfigOptions)
        return parser.read(expanded(argv, parser.options) if takes_config else argv), None
    except SystemExit:  # --help, --version
        _exit(0, 0)
    except UserError as error:
        return parser.options(), error


def _exit(code: int, rank: int, is_orderly: bool = False) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    if rank == 0:
        write_status(code)
    if is_orderly:
        sys.exit(code)
    os._exit(code)
