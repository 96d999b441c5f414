"""hippo_mpi.chat: a conversation with a model that is split over the launched ranks.

    mlx.launch --hostfile hostfile -n 2 hippo_mpi.chat --model M

The KV cache is kept between turns, so that a turn costs what it adds. While the person thinks, all ranks sleep.
"""

from __future__ import annotations

import sys

from hippo_mpi import command, config
from hippo_mpi.command import Session
from hippo_mpi.engine.request import SamplingParams
from hippo_mpi.errors import UserError
from hippo_mpi.generate import lead
from hippo_mpi.parallel.pipeline import Pipeline
from hippo_mpi.serving.terminal.console import Conversation, statistics_line, write

_HELP = "q: quit, r: begin anew, h: this help; anything else is said to the model"


def make_parser() -> config.Parser:
    parser = config.Parser(prog="hippo_mpi.chat", description=(__doc__ or "").splitlines()[0])
    config.add_model_options(parser)
    config.add_draft_options(parser)
    config.add_prompt_options(parser)
    config.add_sampling_options(parser, max_tokens=256)
    config.add_cache_options(parser)
    config.add_run_options(parser)
    return parser


def chat(session: Session) -> int:
    if session.world.rank > 0:
        command.follow(session)
        return 0
    pipeline, conversation = lead(session)
    sys.stderr.write(f"{_HELP}\n")
    while True:
        sys.stderr.write(">> ")
        sys.stderr.flush()
        session.control.idle()
        line = session.launcher.read_line()
        if line is None or line.strip() == "q":
            break
        _turn(session, pipeline, conversation, line.strip())
    pipeline.end()
    return 0


def _turn(session: Session, pipeline: Pipeline, conversation: Conversation, line: str) -> None:
    if line == "h":
        sys.stderr.write(f"{_HELP}\n")
    elif line == "r":
        conversation.reset()
    elif line:
        try:
            answer = conversation.say(line, SamplingParams.from_options(session.arguments), write, session.progress)
        except UserError as error:  # too long, say: the conversation goes on without this turn
            sys.stderr.write(f"error: {error}\n")
            return
        write("\n")
        sys.stderr.write(statistics_line(answer.timings, [pipeline.statistics()]) + "\n")


def main() -> None:
    command.run(make_parser(), chat)


if __name__ == "__main__":
    main()
