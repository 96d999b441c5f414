"""hippo_mpi.benchmark: what the launched ranks give together, against what each gives alone.

    mlx.launch --hostfile hostfile -n 2 hippo_mpi.benchmark --model M --concurrent 1,4,16

In one run and in turn, so that drift cancels: the model on rank 0 alone, the pipeline over all ranks, and a replica of
the whole model on every rank with the requests shared out; with --compare also mlx-lm's own ways.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from hippo_mpi import config
from hippo_mpi.errors import UserError
from hippo_mpi.measure.benchmark_report import check_plot, plot, report
from hippo_mpi.measure.benchmark_run import Bench
from hippo_mpi.measure.load_test import Load, Measured
from hippo_mpi.parallel.timeline import busy_shares, trace_events
from hippo_mpi.runtime.assembly import open_model_tokenizer
from hippo_mpi.runtime.entry import run
from hippo_mpi.runtime.pipeline import Pipeline
from hippo_mpi.runtime.session import Session


def make_parser() -> config.Parser:
    parser = config.Parser(prog="hippo_mpi.benchmark", description=(__doc__ or "").splitlines()[0])
    config.add_model_options(parser)
    group = parser.add_argument_group("what to measure")
    group.add_argument("--prompt-tokens", type=config.positive, default=128, help="tokens of every prompt")
    group.add_argument(
        "--generation-tokens",
        type=config.positive,
        default=64,
        help="tokens per request, counted while all are answered",
    )
    group.add_argument(
        "--concurrent", type=config.request_counts, default=(1, 4, 16), help="numbers of requests at once"
    )
    group.add_argument("--trials", type=config.positive, default=5, help="how often; medians are shown")
    group.add_argument("--pipeline-only", action="store_true", help="no whole models: neither standalone nor replicas")
    group.add_argument(
        "--compare",
        choices=("mlx-lm",),
        help="also measure mlx-lm's own batch generation: on rank 0, and over all ranks if its model type has a pipeline",
    )
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    group.add_argument(
        "--plot", type=Path, help="draw throughput against requests at once into this file (.png, .svg, .pdf ...)"
    )
    group.add_argument("--trace", type=Path, help="write what every rank did, when, for Perfetto or chrome://tracing")
    config.add_cache_options(parser)
    config.add_run_options(parser)
    return parser


def benchmark(session: Session) -> int:
    arguments = session.arguments
    if session.world.rank > 0:
        part = session.load()  # after it, rank 0 has found nothing wrong: what all could say is said once
        _bench(session, part, open_model_tokenizer(session)).follow()
        return 0
    if arguments.prompt_tokens + arguments.generation_tokens > session.agreement.max_context:
        raise UserError(
            f"--prompt-tokens {arguments.prompt_tokens} and --generation-tokens {arguments.generation_tokens} are more"
            f" than the context of {session.agreement.max_context:,} (--max-context)"
        )
    for path in filter(None, (arguments.plot, arguments.trace)):
        _check_folder(path)
    if arguments.plot:
        check_plot(arguments.plot)
    tokenizer = open_model_tokenizer(session)
    bench = _bench(session, session.load(), tokenizer)
    modes = bench.modes()
    found: dict[str, Any] = {**_facts(session), "ring": []}
    if session.world.size > 1:
        found["ring"] = [asdict(hop) for hop in bench.ring()]
    results: dict[tuple[str, int], list[Measured]] = {}
    for trial in range(arguments.trials):
        for count in arguments.concurrent:
            for mode, run_mode in modes.items():
                session.progress.measuring(trial, arguments.trials, f"{mode}, {count} at once")
                load = Load(count, arguments.prompt_tokens, arguments.generation_tokens, session.agreement.max_context)
                results.setdefault((mode, count), []).append(run_mode(load))
    session.progress.clear()
    found["results"] = [
        {"mode": mode, "concurrent": count, "trials": [asdict(one) for one in trials]}
        for (mode, count), trials in results.items()
    ]
    found["busy"] = busy_shares(bench.marks)
    found["memory"] = [asdict(rank) for rank in bench.end() or []]
    sys.stdout.write(f"{json.dumps(found)}\n" if arguments.json else report(found, bench.whole is not None))
    sys.stdout.flush()  # what was measured is not lost with a file that can't be written
    if arguments.trace:
        _write_trace(arguments.trace, trace_events(bench.marks))
    if arguments.plot:
        plot(found, arguments.plot)
    return 0


def _facts(session: Session) -> dict[str, Any]:
    """Return what must be known of figures to compare them with others."""
    arguments = session.arguments
    return {
        "model": arguments.model,
        "precision": arguments.precision,
        "ranks": session.world.size,
        "backend": session.world.backend,
        "prompt_tokens": arguments.prompt_tokens,
        "generation_tokens": arguments.generation_tokens,
        "trials": arguments.trials,
        "date": date.today().isoformat(),
        "version": version("hippo-mpi"),
    }


def _bench(session: Session, part: Pipeline, tokenizer: TokenizerWrapper) -> Bench:
    arguments = session.arguments
    return Bench(
        part, session.settings, tokenizer, arguments.prefill_step_size,
        has_whole=not arguments.pipeline_only, has_mlx_lm=bool(arguments.compare),
    )  # fmt: skip


def _check_folder(path: Path) -> None:
    """Raise a UserError if no file could be written there: before anything is measured."""
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(f"{path} can't be written: {path.parent} is no folder that may be written to")


def _write_trace(path: Path, trace: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(trace))
    except OSError as error:
        raise UserError(f"{path} can't be written: {error.strerror}") from None


def main() -> None:
    run(make_parser(), benchmark)


if __name__ == "__main__":
    main()
