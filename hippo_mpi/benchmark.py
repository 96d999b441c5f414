"""hippo_mpi.benchmark: measure the speed of the launched ranks together against that of each alone.

    mlx.launch --hostfile hostfile -n 2 hippo_mpi.benchmark --model M --concurrent 1,4,16

In one run and in turn, so that drift cancels: the model on rank 0 alone, the pipeline over all ranks, and a replica of
the whole model on every rank with the requests shared out; with --compare also mlx-lm's own ways.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

from mlx_lm.tokenizer_utils import TokenizerWrapper

from hippo_mpi.config import checks
from hippo_mpi.config.options import RunOptions
from hippo_mpi.config.parser import OptionsParser, option
from hippo_mpi.errors import UserError
from hippo_mpi.measure.benchmark_report import check_plot, plot, report
from hippo_mpi.measure.benchmark_run import Bench
from hippo_mpi.measure.load_test import Load, Measured
from hippo_mpi.parallel.timeline import busy_shares, trace_events
from hippo_mpi.runtime.assembly import open_model_tokenizer
from hippo_mpi.runtime.entry import run
from hippo_mpi.runtime.pipeline import Pipeline
from hippo_mpi.runtime.session import Session


@dataclass(frozen=True, kw_only=True)
class _LoadOptions:
    """What is measured."""

    GROUP: ClassVar = "what to measure"
    prompt_tokens: int = option(128, "tokens per prompt", check=checks.positive)
    generation_tokens: int = option(
        64, "tokens generated per request; timed while all requests run", check=checks.positive
    )
    concurrent: tuple[int, ...] = option((1, 4, 16), "numbers of concurrent requests", check=checks.request_counts)
    trials: int = option(5, "number of trials; medians are shown", check=checks.positive)
    pipeline_only: bool = option(False, "skip whole models, standalone and as replicas")
    compare: str | None = option(
        None,
        "also measure mlx-lm's own batch generation: on rank 0, and over all ranks if it can split the model type",
        choices=("mlx-lm",),
    )


@dataclass(frozen=True, kw_only=True)
class _OutputOptions:
    """Where what was measured goes."""

    GROUP: ClassVar = "output"
    json: bool = option(False, "print one JSON object instead of tables")
    plot: Path | None = option(
        None, "plot throughput against concurrent requests to this file (.png, .svg, .pdf ...)", check=Path
    )
    trace: Path | None = option(
        None, "write a trace of all ranks to this file, for Perfetto or chrome://tracing", check=Path
    )


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions(RunOptions, _LoadOptions, _OutputOptions):
    """All options of hippo_mpi.benchmark."""

    @property
    def shows_progress(self) -> bool:
        """Whether people are told how far a start is."""
        return not self.json


def make_parser() -> OptionsParser[BenchmarkOptions]:
    """Return the parser of the command line."""
    return OptionsParser(BenchmarkOptions, prog="hippo_mpi.benchmark", description=(__doc__ or "").splitlines()[0])


def benchmark(session: Session[BenchmarkOptions]) -> int:
    """Measure, and print what was found, on rank 0; the others take part. Returns the exit status."""
    options = session.options
    if session.world.rank > 0:
        part = session.load()  # after it, rank 0 has found nothing wrong: what all could say is said once
        _bench(session, part, open_model_tokenizer(session)).follow()
        return 0
    if options.prompt_tokens + options.generation_tokens > session.agreement.max_context:
        raise UserError(
            f"--prompt-tokens {options.prompt_tokens} and --generation-tokens {options.generation_tokens}"
            f" exceed the context of {session.agreement.max_context:,} (--max-context)"
        )
    for path in filter(None, (options.plot, options.trace)):
        _check_folder(path)
    if options.plot:
        check_plot(options.plot)
    tokenizer = open_model_tokenizer(session)
    bench = _bench(session, session.load(), tokenizer)
    modes = bench.modes()
    found: dict[str, Any] = {**_facts(session), "ring": []}
    if session.world.size > 1:
        found["ring"] = [asdict(hop) for hop in bench.ring()]
    results: dict[tuple[str, int], list[Measured]] = {}
    for trial in range(options.trials):
        for count in options.concurrent:
            for mode, run_mode in modes.items():
                session.progress.measuring(trial, options.trials, f"{mode}, {count} at once")
                load = Load(count, options.prompt_tokens, options.generation_tokens, session.agreement.max_context)
                results.setdefault((mode, count), []).append(run_mode(load))
    session.progress.clear()
    found["results"] = [
        {"mode": mode, "concurrent": count, "trials": [asdict(one) for one in trials]}
        for (mode, count), trials in results.items()
    ]
    found["busy"] = busy_shares(bench.marks)
    found["memory"] = [asdict(rank) for rank in bench.end() or []]
    sys.stdout.write(f"{json.dumps(found)}\n" if options.json else report(found, bench.whole is not None))
    sys.stdout.flush()  # what was measured is not lost with a file that can't be written
    if options.trace:
        _write_trace(options.trace, trace_events(bench.marks))
    if options.plot:
        plot(found, options.plot)
    return 0


def _facts(session: Session[BenchmarkOptions]) -> dict[str, Any]:
    """Return what must be known of figures to compare them with others."""
    options = session.options
    return {
        "model": options.model,
        "precision": options.precision,
        "ranks": session.world.size,
        "backend": session.world.backend,
        "parallel": options.parallel,
        "notes": session.agreement.planned.notes if session.agreement.planned is not None else (),
        "prompt_tokens": options.prompt_tokens,
        "generation_tokens": options.generation_tokens,
        "trials": options.trials,
        "date": date.today().isoformat(),
        "version": version("hippo-mpi"),
    }


def _bench(session: Session[BenchmarkOptions], part: Pipeline, tokenizer: TokenizerWrapper) -> Bench:
    options = session.options
    return Bench(
        part, session.settings, tokenizer, options.prefill_step_size,
        has_whole=not options.pipeline_only, has_mlx_lm=bool(options.compare),
    )  # fmt: skip


def _check_folder(path: Path) -> None:
    """Raise a UserError if no file could be written there: before anything is measured."""
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(f"{path} can't be written: {path.parent} is not a writable folder")


def _write_trace(path: Path, trace: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(trace))
    except OSError as error:
        raise UserError(f"{path} can't be written: {error.strerror}") from None


def main() -> None:
    """Run the command on this process's command line; ends the process."""
    run(make_parser(), benchmark)


if __name__ == "__main__":
    main()
