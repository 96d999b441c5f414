"""hippo_mpi.batch: answer a file of prompts with a model that is split over the launched ranks.

    mlx.launch --hostfile hostfile -n 2 hippo_mpi.batch --model M prompts.jsonl -o answers.jsonl

The file holds OpenAI batch lines, short JSON lines, or a prompt a line; a job script (#!) brings its own options in
#HIPPO lines; - reads standard input. The same command again goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hippo_mpi.config.options import BatchOptions, ManyOptions, PromptOptions, SamplingOptions
from hippo_mpi.config.parser import OptionsParser, option, read_given
from hippo_mpi.engine.request import SamplingParams
from hippo_mpi.errors import UserError
from hippo_mpi.offline.answer_file import AnswerFile, Answers, StandardOutput
from hippo_mpi.offline.batch_file import Prompts, job_options, kept_prompts, open_prompts, read_tasks
from hippo_mpi.offline.batch_run import BatchRun
from hippo_mpi.offline.progress import BatchProgress
from hippo_mpi.runtime.assembly import build_engine, open_text
from hippo_mpi.runtime.entry import run
from hippo_mpi.runtime.session import Session
from hippo_mpi.units import count_of
from hippo_mpi.views.view import commit_of

SOME_FAILED = 4
_STANDARD = Path("-")  # input or output
# Options that leave answers what they are: all others must be those of answers that are kept.
_WITHOUT_EFFECT = {
    "prompts", "output", "restart", "keep_order", "model", "revision", "trust_remote_code", "draft_model",
    "num_draft_tokens", "config", "max_batch_size", "max_batch_tokens", "prompt_cache_bytes", "layer_split", "timeout",
    "start_timeout", "prefill_step_size", "collectives",
}  # fmt: skip


def _path(text: str) -> Path:
    """Name standard input the same, however it was named."""
    return _STANDARD if text in ("/dev/stdin", "/dev/fd/0", "/proc/self/fd/0") else Path(text)


@dataclass(frozen=True, kw_only=True)
class _OptionsOfPrompts(PromptOptions, SamplingOptions, BatchOptions):
    """What a file of prompts may set, too: how its prompts are asked, and how many at once."""

    keep_order: bool = option(False, "sort the answers into the order of the prompts")


@dataclass(frozen=True, kw_only=True)
class BatchCommandOptions(_OptionsOfPrompts, ManyOptions):
    """All options of hippo_mpi.batch."""

    prompts: Path | None = option(
        None, "file of prompts, or a job script; - reads standard input", "prompts", check=_path, nargs="?"
    )
    output: Path | None = option(
        None, "file for the answers, or - for standard output; default: PROMPTS.answers.jsonl, or - for pipes", "-o",
        check=Path,
    )  # fmt: skip
    restart: bool = option(False, "discard the answers that are already in the output")

    @property
    def load(self) -> str:
        """What has to be fast."""
        return self.plan_for or "many"


class _Parser(OptionsParser[BatchCommandOptions]):
    """Takes the options of a job script, too; those of the command line win."""

    def read(self, argv: Sequence[str] | None = None) -> BatchCommandOptions:
        """Return the options of a command line, and of the file of prompts that it names.

        Raises:
            UserError: one of either is wrong.
        """
        options = super().read(argv)
        # Ranks that don't see the file say so by their arguments, if it had any to give.
        if options.prompts is None or options.prompts == _STANDARD or not options.prompts.is_file():
            return options
        with open_prompts(options.prompts) as prompts:
            words = job_options(prompts)
        if not words:
            return options
        given, _ = read_given(BatchCommandOptions, sys.argv[1:] if argv is None else argv)
        return replace(options, **{**_allowed(words, options.prompts), **given})


def _allowed(words: list[str], path: Path) -> dict[str, Any]:
    """Return the options that a file of prompts sets.

    It may come from anybody, so it chooses no model, no code, and no file to write.

    Raises:
        UserError: it says more, or a value is wrong.
    """
    try:
        allowed, others = read_given(_OptionsOfPrompts, words)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if not others:
        return allowed
    names = {name: name for action in make_parser()._actions for name in action.option_strings}
    word = next((word for word in others if word != "--"), "--")
    name = names.get(word.split("=")[0]) or (None if word.startswith("--") else names.get(word[:2]))
    if name is None:
        raise UserError(f"{path}: unrecognized arguments: {' '.join(others)}")
    raise UserError(
        f"{path}: a prompt file can set prompt, sampling and batch options only, not {name}:"
        " give it on the command line"
    )


def make_parser() -> OptionsParser[BatchCommandOptions]:
    """Return the parser of the command line."""
    return _Parser(BatchCommandOptions, prog="hippo_mpi.batch", description=(__doc__ or "").splitlines()[0])


def answer_all(session: Session[BatchCommandOptions]) -> int:
    """Answer all prompts, on rank 0; the others follow. Returns the exit status."""
    if session.world.rank > 0:
        session.follow()
        return 0
    options = session.options
    # Each line draws numbers of its own, whatever runs beside it or has run before.
    defaults = replace(SamplingParams.from_options(options), seed=options.seed)
    with _open_prompts(session) as prompts:
        if not any(True for _ in read_tasks(prompts, defaults)):
            raise UserError(f"{prompts} has no prompts")
        with contextlib.closing(_open_answers(session)) as answers:
            return _answer(session, prompts, defaults, answers)


def _answer(session: Session[BatchCommandOptions], prompts: Prompts, defaults: SamplingParams, answers: Answers) -> int:
    options = session.options
    total = answers.check(read_tasks(prompts, defaults))
    tokenizer, chat_format = open_text(session)
    pipeline = session.load()
    engine = build_engine(session, pipeline, tokenizer)
    if engine.limits.can_batch is False:
        sys.stderr.write("note: this model can't be batched, so requests are answered one at a time\n")
    progress = BatchProgress(total, len(answers.done))
    batch = BatchRun(
        engine,
        tokenizer,
        chat_format,
        answers,
        progress,
        Path(options.model).name,
        options.system_prompt,
        session.control.pausing,
    )
    batch.run(read_tasks(prompts, defaults), lambda: session.control.progress("reading prompts"))
    if options.keep_order:
        session.control.idle()
        answers.sort(read_tasks(prompts, defaults))
    pipeline.end()
    if progress.failed:
        sys.stderr.write(_failures(progress.failed, batch.reasons, answers))
    return SOME_FAILED if progress.failed else 0


def _open_prompts(session: Session[BatchCommandOptions]) -> Prompts:
    """Find the file of prompts, or read standard input.

    Raises:
        UserError: none was given, or standard input isn't text, or has options, for which it is too late.
    """
    path = session.options.prompts
    if path is None:
        raise UserError("no prompt file given (--help lists the options)")
    session.control.idle()  # reading long files may take its time
    if path != _STANDARD:
        return open_prompts(path)
    try:
        text = session.launcher.read_all()
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not UTF-8 (byte {error.start + 1})") from None
    return kept_prompts("standard input", text.encode("utf-8", "surrogateescape"))


def _open_answers(session: Session[BatchCommandOptions]) -> Answers:
    """Open what answers go to.

    Raises:
        UserError: there is something else, or answers that other options have made.
    """
    options = session.options
    prompts, output = options.prompts, options.output
    assert prompts is not None  # they have been opened
    if output is None:
        output = _STANDARD if not prompts.is_file() else prompts.with_suffix(".answers.jsonl")
    if output == _STANDARD:
        return StandardOutput(options.keep_order)
    if prompts != _STANDARD and output.exists() and prompts.exists() and output.samefile(prompts):
        raise UserError(f"{output} is the prompt file: give another --output")
    path = session.agreement.checkpoint.source.path
    model = (
        {"--model": options.model, "--revision": commit} if (commit := commit_of(path)) else {"--model": path.resolve()}
    )
    others = {f"--{name.replace('_', '-')}": v for name, v in vars(options).items() if name not in _WITHOUT_EFFECT}
    return AnswerFile(output, model | others, options.restart)


def _failures(count: int, reasons: list[str], answers: Answers) -> str:
    """Say how many requests failed, and why the first ones did."""
    more = [f"... and {count - len(reasons):,} more"] if count > len(reasons) else []
    return "\n  ".join([f"{count_of(count, 'request')} failed; {answers} says why:", *reasons, *more]) + "\n"


def main() -> None:
    """Run the command on this process's command line; ends the process."""
    run(make_parser(), answer_all)


if __name__ == "__main__":
    main()
