"""hippo_mpi.batch: answer a file of prompts with a model that is split over the launched ranks.

    mlx.launch --hostfile hostfile -n 2 hippo_mpi.batch --model M prompts.jsonl -o answers.jsonl

The file holds OpenAI batch lines, short JSON lines, or a prompt a line; a job script (#!) brings its own options in
#HIPPO lines. The same command again goes on where it stopped.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from hippo_mpi import command, config
from hippo_mpi.command import Session
from hippo_mpi.engine.engine import Engine
from hippo_mpi.engine.prefix_cache import PrefixBudget
from hippo_mpi.engine.request import SamplingParams
from hippo_mpi.engine.scheduler import Limits
from hippo_mpi.errors import UserError
from hippo_mpi.generate import load_drafter, open_text
from hippo_mpi.parallel.pipeline import Pipeline
from hippo_mpi.serving.batch.batch_file import AnswerFile, job_options, read_tasks
from hippo_mpi.serving.batch.batch_run import BatchRun
from hippo_mpi.serving.terminal.progress import BatchProgress

SOME_FAILED = 4


class _Parser(config.Parser):
    """Takes the options of a job script, too; those of the command line win."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> argparse.Namespace:  # type: ignore[override]
        found = super().parse_args(args, namespace)
        # Ranks that don't see the file say so by their arguments, if it had any to give.
        options = job_options(found.prompts) if found.prompts and found.prompts.exists() else []
        return super().parse_args(args, super().parse_args(options)) if options else found


def make_parser() -> config.Parser:
    parser = _Parser(prog="hippo_mpi.batch", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("prompts", type=Path, nargs="?", help="file of prompts, or a job script")
    parser.add_argument("--output", "-o", type=Path, help="file for the answers; default: PROMPTS.answers.jsonl")
    parser.add_argument("--restart", action="store_true", help="forget the answers that are in the output already")
    parser.add_argument("--keep-order", action="store_true", help="put the answers into the order of the prompts")
    config.add_model_options(parser)
    config.add_draft_options(parser)
    config.add_prompt_options(parser)
    config.add_sampling_options(parser, max_tokens=256)
    config.add_batch_options(parser)
    config.add_cache_options(parser)
    config.add_run_options(parser)
    return parser


def answer_all(session: Session) -> int:
    if session.world.rank > 0:
        command.follow(session)
        return 0
    arguments = session.arguments
    if arguments.prompts is None:
        raise UserError("no file of prompts was given (--help lists the options)")
    session.control.idle()  # reading long files may take its time
    # Each line draws numbers of its own, whatever runs beside it or has run before.
    defaults = replace(SamplingParams.from_options(arguments), seed=arguments.seed)
    output = arguments.output or arguments.prompts.with_suffix(".answers.jsonl")
    if output.exists() and arguments.prompts.exists() and output.samefile(arguments.prompts):
        raise UserError(f"{output} holds the prompts: give another file with --output")
    if not any(True for _ in read_tasks(arguments.prompts, defaults)):
        raise UserError(f"{arguments.prompts} has no prompts")
    answers = AnswerFile(output, arguments.restart)
    total = answers.check(read_tasks(arguments.prompts, defaults))
    tokenizer, chat_format = open_text(session)
    pipeline = session.load()
    engine = make_engine(session, pipeline, tokenizer)
    if engine.limits.can_batch is False:
        sys.stderr.write("note: rows of this model can't share a step, so requests take turns\n")
    progress = BatchProgress(total, len(answers.done))
    run = BatchRun(
        engine, tokenizer, chat_format, answers, progress, Path(arguments.model).name, arguments.system_prompt
    )
    run.run(read_tasks(arguments.prompts, defaults), lambda: session.control.progress("reading prompts"))
    if arguments.keep_order:
        session.control.idle()
        answers.sort(read_tasks(arguments.prompts, defaults))
    pipeline.end()
    if progress.failed:
        sys.stderr.write(f"{progress.failed:,} requests failed; {output} says why\n")
    return SOME_FAILED if progress.failed else 0


def make_engine(session: Session, pipeline: Pipeline, tokenizer: TokenizerWrapper) -> Engine:
    """An engine for many requests, within what the memory guard leaves for caches."""
    arguments, split = session.arguments, session.agreement.split
    assert split is not None  # rank 0 has planned
    size, cache_tokens = split.cache_room(arguments.max_batch_size)
    limits = Limits(
        size,
        arguments.max_batch_tokens,
        cache_tokens,
        arguments.prefill_step_size,
        session.agreement.can_batch,
        deadline_s=arguments.timeout,
    )
    num_bytes = arguments.prompt_cache_bytes
    num_bytes = split.prefix_room_bytes() if num_bytes is None else num_bytes
    budget = PrefixBudget(num_bytes, split.sequence_bytes) if num_bytes else None
    agreement, propose = session.agreement, load_drafter(session)
    return Engine(pipeline.leader(), tokenizer, limits, agreement.max_context, agreement.vocab_size, budget, propose)


def main() -> None:
    command.run(make_parser(), answer_all)


if __name__ == "__main__":
    main()
