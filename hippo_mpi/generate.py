"""hippo_mpi.generate: answer one prompt with a model that is split over the launched ranks.

mlx.launch --hostfile hostfile -n 2 hippo_mpi.generate --model M --prompt "..."
"""

from __future__ import annotations

import sys

from hippo_mpi import config
from hippo_mpi.engine.request import SamplingParams
from hippo_mpi.offline.conversation import json_answer, statistics_line, write
from hippo_mpi.runtime.assembly import build_conversation
from hippo_mpi.runtime.entry import run
from hippo_mpi.runtime.session import Session


def make_parser() -> config.Parser:
    parser = config.Parser(prog="hippo_mpi.generate", description=(__doc__ or "").splitlines()[0])
    config.add_model_options(parser)
    config.add_draft_options(parser)
    parser.add_argument("--prompt", default=config.DEFAULT_PROMPT, help="what to answer; - reads standard input")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--show-plan", action="store_true", help="print what each rank would hold, and stop")
    config.add_prompt_options(parser)
    config.add_sampling_options(parser, max_tokens=256)
    config.add_cache_options(parser)
    config.add_run_options(parser)
    return parser


def answer(session: Session) -> int:
    arguments = session.arguments
    if arguments.show_plan:
        session.show_plan()
        session.control.close()
        return 0
    if session.world.rank > 0:
        session.follow()
        return 0
    prompt = arguments.prompt.replace("\\n", "\n").replace("\\t", "\t")
    if prompt == "-":
        session.control.idle()
        prompt = session.launcher.read_all()
        session.control.progress("loading")
    pipeline, conversation = build_conversation(session, prompt)
    show_text = (lambda text: None) if arguments.json else session.show
    result = conversation.say(prompt, SamplingParams.from_options(arguments), show_text, session.progress)
    ranks = pipeline.end() or []
    if arguments.json:
        write(json_answer(result, ranks) + "\n")
    else:
        write("\n")
        sys.stderr.write(statistics_line(result.timings, ranks) + "\n")
    return 0


def main() -> None:
    run(make_parser(), answer)


if __name__ == "__main__":
    main()
