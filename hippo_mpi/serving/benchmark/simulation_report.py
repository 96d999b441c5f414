"""What a simulation predicts, for people and for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hippo_mpi.engine.predicting import Link, StageTimes, Workload, one_machine, predict
from hippo_mpi.errors import UserError


def prediction_object(times: Sequence[StageTimes], link: Link, workload: Workload) -> dict[str, Any]:
    """Everything, with the times that --stage-times reads."""
    alone = predict([one_machine(times)], link, workload)
    return {
        "link": asdict(link),
        "workload": asdict(workload),
        "times": [stage.as_object() for stage in times],
        "one_machine": asdict(alone),
        "pipeline": asdict(predict(times, link, workload)),
    }


def prediction_table(times: Sequence[StageTimes], link: Link, workload: Workload) -> str:
    alone, together = predict([one_machine(times)], link, workload), predict(times, link, workload)
    prompt = workload.prompt_tokens
    rows = [(f"prompt of {prompt:,} tokens", prompt / alone.first_token_s, prompt / together.first_token_s)]
    rows += [(f"generation, {n} at once", alone.decode_tps[n], together.decode_tps[n]) for n in workload.concurrent]
    head = f"{'predicted':<26} {'one machine':>16} {f'{len(times)} ranks':>16} {'ratio':>6}"
    lines = [
        f"link: {link.latency_s * 1e6:,.0f} us, {link.bytes_per_s / 1e6:,.0f} MB/s; all layers on one machine: no link"
    ]
    lines.append(head)
    for name, one, ours in rows:
        lines.append(f"{name:<26} {one:>10.1f} tok/s {ours:>10.1f} tok/s {ours / one:>6.2f}")
    return "\n".join(lines)


def read_times(path: Path, workload: Workload, num_stages: int) -> list[StageTimes]:
    """The times in a --json output.

    Raises:
        UserError: it can't be read, or was measured for another number of ranks or another load.
    """
    try:
        found = json.loads(path.read_text())
        times = [StageTimes.from_object(one) for one in found["times"]]
    except OSError as error:
        raise UserError(f"--stage-times {path} can't be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"--stage-times {path} is no output of hippo_mpi.plan --simulate --json") from None
    if len(times) != num_stages:
        raise UserError(f"--stage-times {path} has {len(times)} stages, but this plan has {num_stages}")
    num_chunks = -(-workload.prompt_tokens // workload.chunk_tokens)
    missing = {*workload.batch_sizes(num_stages)} - {*times[0].steps}
    if missing or any(len(stage.chunks) != num_chunks for stage in times):
        raise UserError(f"--stage-times {path} was measured for other --prompt-tokens or --concurrent")
    return times
