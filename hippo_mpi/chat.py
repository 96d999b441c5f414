"""hippo_mpi.chat: chat with a model that is split over the launched ranks.

    mlx.launch --hostfile hostfile -n 2 hippo_mpi.chat --model M

The KV cache is kept between turns, so that a turn costs what it adds. While the person thinks, all ranks sleep.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import NoReturn

from hippo_mpi.config.options import TextOptions
from hippo_mpi.config.parser import OptionsParser
from hippo_mpi.engine.request import SamplingParams
from hippo_mpi.errors import INTERRUPTED, UserError, interrupted
from hippo_mpi.offline.conversation import Conversation, ask, statistics_line, write
from hippo_mpi.offline.interrupts import Interrupts
from hippo_mpi.runtime.assembly import build_conversation
from hippo_mpi.runtime.entry import run
from hippo_mpi.runtime.pipeline import Pipeline
from hippo_mpi.runtime.session import Session

_HELP = (
    "/bye, q or Ctrl-D: quit; /reset, r: start over; /help, h: this help; Ctrl-C: stop the answer.\n"
    "Anything else is sent to the model, as is a line that begins with a space."
)


def make_parser() -> OptionsParser[TextOptions]:
    """Return the parser of the command line."""
    return OptionsParser(TextOptions, prog="hippo_mpi.chat", description=(__doc__ or "").splitlines()[0])


def chat(session: Session[TextOptions]) -> int:
    """Hold the conversation, on rank 0; the others follow. Returns the exit status."""
    if session.world.rank > 0:
        session.follow()
        return 0
    pipeline, conversation = build_conversation(session)
    interrupts = Interrupts(lambda: _leave(session))
    session.launcher.take_interrupts()
    if session.launcher.may_be_typed:
        sys.stderr.write(f"{_HELP}\n")
    code = 0
    try:
        while (line := _ask(session, interrupts)) not in (None, "/bye", "q"):
            _turn(session, pipeline, conversation, interrupts, line or "")
    except KeyboardInterrupt:
        code = INTERRUPTED
    pipeline.end()
    return code


def _leave(session: Session[TextOptions]) -> NoReturn:
    """End all ranks, from any thread, whatever they do."""
    with contextlib.suppress(OSError):
        os.write(2, b"\n")  # the cursor is behind the answer
    session.control.fail(interrupted())


def _ask(session: Session[TextOptions], interrupts: Interrupts) -> str | None:
    """The next line, without the space at its end."""
    session.control.idle()
    line = None
    try:
        with interrupts.asking():
            line = ask(session.launcher, ">> ")
    finally:
        if line is None and session.launcher.may_be_typed:
            sys.stderr.write("\n")  # the cursor is behind the prompt
    return None if line is None else line.rstrip()


def _turn(
    session: Session[TextOptions], pipeline: Pipeline, conversation: Conversation, interrupts: Interrupts, line: str
) -> None:
    if line in ("/help", "h"):
        sys.stderr.write(f"{_HELP}\n")
    elif line in ("/reset", "r"):
        conversation.reset()
    elif line.startswith("/"):
        sys.stderr.write(
            f"{line.split()[0]} isn't a command (/help lists them); with a space before it, it is sent to the model\n"
        )
    elif line:
        sampling = SamplingParams.from_options(session.options)
        try:
            answer = conversation.say(
                line.strip(), sampling, session.show, session.progress, lambda: interrupts.is_stopped
            )
        except UserError as error:  # too long, say: the conversation goes on without this turn
            sys.stderr.write(f"error: {error}\n")
            return
        write("\n")
        if answer.timings.token_ids:
            sys.stderr.write(statistics_line(answer.timings, [pipeline.statistics()]) + "\n")


def main() -> None:
    """Run the command on this process's command line; ends the process."""
    run(make_parser(), chat)


if __name__ == "__main__":
    main()
