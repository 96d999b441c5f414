"""Many histories on one server after another, and what came of them in a line."""

from __future__ import annotations

import subprocess
import time

from tests.histories.driver import Driver, Outcome
from tests.histories.stage import stage


def run_campaign(count: int, seed: int, minutes: float | None = None) -> list[Outcome]:
    """Run the histories of `count` seeds from `seed` on, or as many as begin within so many minutes; print each bad one
    with its seed. After an exception (the server is gone, say) the next one has a new server."""
    ends = float("inf") if minutes is None else time.monotonic() + 60 * minutes
    outcomes: list[Outcome] = []
    todo = list(range(seed, seed + count))
    while todo and time.monotonic() < ends:
        try:
            with stage() as found:
                driver = Driver(found)
                while todo and time.monotonic() < ends and not (outcomes and outcomes[-1].is_broken):
                    outcomes.append(driver.run_seed(todo.pop(0)))
                    if not outcomes[-1].is_good:
                        print(f"  {outcomes[-1]}", flush=True)
                outcomes[-1].is_broken = False
        except (AssertionError, subprocess.SubprocessError) as error:  # at its end
            outcomes[-1].wrong.append(f"at the server's end: {error}")
            print(f"  {outcomes[-1]}", flush=True)
    print(f"  {summary(outcomes)}", flush=True)
    return outcomes


def summary(outcomes: list[Outcome]) -> str:
    """What the table of issue 12 asks for."""
    streams = sum(len(one.history.streams) for one in outcomes)
    faults = sum(len(one.history.faults) for one in outcomes)
    lost, changed, left, wrong = (
        sum(len(getattr(one, name)) for one in outcomes) for name in ("lost", "changed", "left", "wrong")
    )
    late_s = max((one.late_s for one in outcomes), default=0.0)
    wait_s = max((one.wait_s for one in outcomes), default=0.0)
    good = sum(one.is_good for one in outcomes)
    return (
        f"{len(outcomes)} histories, {good} good; {faults} faults, {streams} streams: {lost} lost, {changed} changed,"
        f" {left} processes left, {wrong} else; longest wait for an event: {wait_s:.1f} s, over a"
        f" stream's deadline: {late_s:.1f} s (below 0: before it)"
    )
