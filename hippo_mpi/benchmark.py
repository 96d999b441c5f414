"""hippo_mpi.benchmark: what the launched ranks give together, against what each gives alone.

    mlx.launch --hostfile hostfile -n 2 hippo_mpi.benchmark --model M --concurrent 1,4,16

In one run and in turn, so that drift cancels: the model on rank 0 alone, the pipeline over all ranks, and a replica of
the whole model on every rank with the requests shared out.
"""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from hippo_mpi import config
from hippo_mpi.command import Session, run
from hippo_mpi.engine.engine import Engine
from hippo_mpi.engine.measuring import Load, Measured, measure, measure_mlx_lm
from hippo_mpi.engine.scheduler import Limits
from hippo_mpi.errors import UserError
from hippo_mpi.generate import open_model_tokenizer
from hippo_mpi.parallel.hop_times import echo, time_ring
from hippo_mpi.parallel.pipeline import Pipeline
from hippo_mpi.parallel.timeline import busy_shares, trace_events
from hippo_mpi.parallel.worker import Leader
from hippo_mpi.serving.benchmark_report import plot, report
from hippo_mpi.shard import Stage, pipeline
from hippo_mpi.transport.memory import available_bytes

_MARGIN = 1.2  # memory for a whole model beside a rank's part: its weights and this much more


def make_parser() -> config.Parser:
    parser = config.Parser(prog="hippo_mpi.benchmark", description=(__doc__ or "").splitlines()[0])
    config.add_model_options(parser)
    group = parser.add_argument_group("what to measure")
    group.add_argument("--prompt-tokens", type=config.positive, default=128, help="tokens of every prompt")
    group.add_argument("--generation-tokens", type=config.positive, default=64, help="tokens of every answer")
    group.add_argument("--concurrent", type=config.counts, default=(1, 4, 16), help="numbers of requests at once")
    group.add_argument("--trials", type=config.positive, default=5, help="how often; medians are shown")
    group.add_argument("--pipeline-only", action="store_true", help="no whole models: neither standalone nor replicas")
    group.add_argument("--compare", choices=("mlx-lm",), help="also measure mlx-lm's own batch generation on rank 0")
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    group.add_argument("--plot", type=Path, help="draw throughput against requests at once into this file (.png)")
    group.add_argument("--trace", type=Path, help="write what every rank did, when, for Perfetto or chrome://tracing")
    config.add_cache_options(parser)
    config.add_run_options(parser)
    return parser


class _Bench:
    """One rank's part in the measurements. Rank 0 says what comes; the others do it with it.

    `whole` is the whole model on this rank, if there is room for it on every rank.
    """

    def __init__(self, session: Session, tokenizer: TokenizerWrapper) -> None:
        self.session, self.tokenizer = session, tokenizer
        self.control, self.world = session.control, session.world
        self.pipeline: Pipeline = session.load()
        self._limits = Limits(prefill_chunk=session.arguments.prefill_step_size, can_batch=session.agreement.can_batch)
        self.whole: Stage | None = None
        if self._has_room():
            checkpoint = session.agreement.checkpoint
            self.whole = pipeline(checkpoint, [checkpoint.flow.num_layers], 0, self._loaded)

    def _loaded(self, done_bytes: int) -> None:
        self.control.progress(f"loading the whole model, {done_bytes:,} bytes")

    def _has_room(self) -> bool:
        """Whether a whole model fits beside its part on every rank: all must decide alike."""
        needed = sum(self.session.agreement.checkpoint.weight_bytes.values()) * _MARGIN
        gathered = self.control.gather({"host": self.world.host, "bytes": available_bytes()})
        verdict = None
        if gathered is not None:
            hosts = [found["host"] for found in gathered]
            fits = all(found["bytes"] > needed * hosts.count(found["host"]) for found in gathered)
            verdict = {"room": fits and not self.session.arguments.pipeline_only}
        return bool(self.control.share(verdict)["room"])

    def follow(self) -> None:
        """What ranks other than 0 do."""
        while (order := self.control.share(None))["do"] != "end":
            if order["do"] == "ring":
                echo(self.pipeline.channel)
            elif order["do"] == "pipeline":
                self.pipeline.timeline.start()
                self.pipeline.follow()
                self.control.gather({"marks": self.pipeline.timeline.stop()})
            else:
                self.control.gather(asdict(self._alone(Load(**order["loads"][self.world.rank]))))
        self.pipeline.end()

    def standalone(self, load: Load) -> Measured:
        return self._alone(load)

    def replicas(self, load: Load) -> Measured:
        size = self.world.size
        shares = [load.num_requests // size + (rank < load.num_requests % size) for rank in range(size)]
        loads = [{**asdict(load), "num_requests": share} for share in shares]
        self.control.share({"do": "replicas", "loads": loads})
        gathered = self.control.gather(asdict(self._alone(Load(**loads[0]))))
        assert gathered is not None
        found = [Measured(**one) for one in gathered if one["first_token_s"]]
        first_s = statistics.median(one.first_token_s for one in found)
        return Measured(sum(one.prompt_tps for one in found), sum(one.decode_tps for one in found), first_s)

    def pipelined(self, load: Load) -> Measured:
        self.control.share({"do": "pipeline"})
        self.pipeline.timeline.start()
        found = self._measure(self.pipeline.leader(), load)
        self.pipeline.release()
        gathered = self.control.gather({"marks": self.pipeline.timeline.stop()})
        assert gathered is not None
        self.marks = [one["marks"] for one in gathered]
        return found

    def mlx_lm(self, load: Load) -> Measured:
        """mlx-lm's own continuous batching over the same weights."""
        assert self.whole is not None
        return measure_mlx_lm(self.whole.model, load, lambda: self.control.progress("measuring mlx-lm"))

    def _alone(self, load: Load) -> Measured:
        assert self.whole is not None
        leader = Leader(self.whole, self.pipeline.channel, self.session.settings, 1, self.control.progress)
        return self._measure(leader, load)

    def _measure(self, leader: Leader, load: Load) -> Measured:
        agreement = self.session.agreement
        limits = replace(self._limits, max_batch_size=max(load.num_requests, 1))
        engine = Engine(leader, self.tokenizer, limits, agreement.max_context, agreement.vocab_size)
        self._limits = engine.limits  # which rows may share a step is asked once
        return measure(engine, load)


def benchmark(session: Session) -> int:
    arguments, control = session.arguments, session.control
    if min(arguments.concurrent) < 1:
        raise UserError("--concurrent takes numbers of requests above 0, such as 1,4,16")
    if arguments.prompt_tokens + arguments.generation_tokens > session.agreement.max_context:
        raise UserError(
            f"--prompt-tokens {arguments.prompt_tokens} and --generation-tokens {arguments.generation_tokens} are more"
            f" than the context of {session.agreement.max_context:,} (--max-context)"
        )
    bench = _Bench(session, open_model_tokenizer(session))
    if session.world.rank > 0:
        bench.follow()
        return 0
    modes = {"pipeline": bench.pipelined}
    if bench.whole is not None:
        modes = {"standalone": bench.standalone, **modes}
        modes |= {"replicas": bench.replicas} if session.world.size > 1 else {}
        modes |= {"mlx-lm": bench.mlx_lm} if arguments.compare else {}
    found: dict[str, Any] = {"ranks": session.world.size, "backend": session.world.backend, "ring": []}
    if session.world.size > 1:
        control.share({"do": "ring"})
        found["ring"] = [asdict(hop) for hop in time_ring(bench.pipeline.channel, session.world.size, control.progress)]
    results: dict[tuple[str, int], list[Measured]] = {}
    for trial in range(arguments.trials):
        for count in arguments.concurrent:
            for mode, run_mode in modes.items():
                session.progress.measuring(trial, arguments.trials, f"{mode}, {count} at once")
                load = Load(count, arguments.prompt_tokens, arguments.generation_tokens)
                results.setdefault((mode, count), []).append(run_mode(load))
    session.progress.clear()
    control.share({"do": "end"})
    found["results"] = [
        {"mode": mode, "concurrent": count, "trials": [asdict(one) for one in trials]}
        for (mode, count), trials in results.items()
    ]
    found["busy"] = busy_shares(bench.marks)
    found["memory"] = bench.pipeline.end()
    sys.stdout.write(f"{json.dumps(found)}\n" if arguments.json else report(found, bench.whole is not None))
    sys.stdout.flush()  # what was measured is not lost with a file that can't be written
    if arguments.trace:
        _write_trace(arguments.trace, trace_events(bench.marks))
    if arguments.plot:
        plot(found, arguments.plot)
    return 0


def _write_trace(path: Path, trace: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(trace))
    except OSError as error:
        raise UserError(f"{path} can't be written: {error.strerror}") from None


def main() -> None:
    run(make_parser(), benchmark)


if __name__ == "__main__":
    main()
