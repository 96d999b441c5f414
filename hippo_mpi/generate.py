"""hippo_mpi.generate: answer one prompt with a model that is split over the launched ranks.

mlx.launch --hostfile hostfile -n 2 hippo_mpi.generate --model M --prompt "..."
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from hippo_mpi.config.bundled import DEFAULT_PROMPT
from hippo_mpi.config.options import TextOptions
from hippo_mpi.config.parser import OptionsParser, option
from hippo_mpi.engine.request import SamplingParams
from hippo_mpi.offline.conversation import json_answer, statistics_line, write
from hippo_mpi.runtime.assembly import build_conversation
from hippo_mpi.runtime.entry import run
from hippo_mpi.runtime.session import Session


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(TextOptions):
    """All options of hippo_mpi.generate."""

    prompt: str = option(DEFAULT_PROMPT, "the prompt; - reads standard input")
    json: bool = option(False, "print one JSON object instead of text")
    show_plan: bool = option(False, "print what each rank would hold, and exit")

    @property
    def shows_progress(self) -> bool:
        """Whether people are told how far a start is."""
        return not self.json

    @property
    def only_plans(self) -> bool:
        """Whether the plan is all that is wanted."""
        return self.show_plan


def make_parser() -> OptionsParser[GenerateOptions]:
    """Return the parser of the command line."""
    return OptionsParser(GenerateOptions, prog="hippo_mpi.generate", description=(__doc__ or "").splitlines()[0])


def answer(session: Session[GenerateOptions]) -> int:
    """Answer the prompt, on rank 0; the others follow. Returns the exit status."""
    options = session.options
    if options.show_plan:
        session.show_plan(options.json)
        session.control.close()
        return 0
    if session.world.rank > 0:
        session.follow()
        return 0
    prompt = options.prompt.replace("\\n", "\n").replace("\\t", "\t")
    if prompt == "-":
        session.control.idle()
        prompt = session.launcher.read_all()
        session.control.progress("loading")
    pipeline, conversation = build_conversation(session, prompt)
    show_text = (lambda text: None) if options.json else session.show
    result = conversation.say(prompt, SamplingParams.from_options(options), show_text, session.progress)
    ranks = pipeline.end() or []
    if options.json:
        write(json_answer(result, ranks) + "\n")
    else:
        write("\n")
        sys.stderr.write(statistics_line(result.timings, ranks) + "\n")
    return 0


def main() -> None:
    """Run the command on this process's command line; ends the process."""
    run(make_parser(), answer)


if __name__ == "__main__":
    main()
