"""The order in which each rank computes, sends and receives, as plain data: no MLX, no sockets.

`actions(rank, num_stages, num_steps)` is what rank does for `num_steps` steps whose results all come back, with
at most `num_stages` in flight. Rank 0 forwards the next step, then receives the oldest result, then sends: with
sends that block until they are taken, "send as soon as computed" would deadlock. `worker.Leader.step` and
`worker.Follower.follow` act in this order; a test compares them.
`simulate` runs all ranks' actions against each other and tells when, or that they never, finish.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["forward", "head", "send", "receive"]


@dataclass(frozen=True)
class Action:
    """One thing that a rank does for one step. "head" is rank 0's norm, head and sampling."""

    kind: Kind
    step: int

    def __str__(self) -> str:
        return f"{self.kind[0].upper()}{self.step}"


def actions(rank: int, num_stages: int, num_steps: int) -> list[Action]:
    if num_stages == 1:
        return [Action(kind, step) for step in range(num_steps) for kind in ("forward", "head")]
    if rank > 0:
        return [Action(kind, step) for step in range(num_steps) for kind in ("receive", "forward", "send")]
    order: list[Action] = []
    for step in range(num_steps + num_stages - 1):
        oldest = step - (num_stages - 1)
        if step < num_steps:
            order.append(Action("forward", step))
        if 0 <= oldest < num_steps:
            order += [Action("receive", oldest), Action("head", oldest)]
        if step < num_steps:
            order.append(Action("send", step))
    return order


def table(num_stages: int, num_steps: int) -> str:
    """All ranks' actions, a line each, for people and golden files."""
    lines = (" ".join(map(str, actions(rank, num_stages, num_steps))) for rank in range(num_stages))
    return "".join(f"rank {rank}: {line}\n" for rank, line in enumerate(lines))


@dataclass(frozen=True)
class Simulation:
    """What `simulate` found: total time, and each rank's share of it spent computing."""

    total_s: float
    busy: tuple[float, ...]


class Deadlock(Exception):
    """Every rank that is not done waits for another."""


def simulate(
    schedules: Sequence[Sequence[Action]],
    stage_s: Sequence[float],
    head_s: float = 0.0,
    hop_s: float = 0.0,
    blocking_sends: bool = True,
) -> Simulation:
    """Run the schedules against each other.

    Args:
        schedules: what each rank does, in order.
        stage_s: seconds that each rank's forward takes.
        head_s, hop_s: seconds of rank 0's head, and from a send to the receive.
        blocking_sends: a send ends only when it is received (the worst that a transport may do).

    Raises:
        Deadlock: some ranks never finish.
    """
    num_ranks = len(schedules)
    clock, busy, done = [0.0] * num_ranks, [0.0] * num_ranks, [0] * num_ranks
    arrived: dict[tuple[int, int], float] = {}  # (receiving rank, step) -> time at which it can be received
    moved = True
    while moved:
        moved = False
        for rank, schedule in enumerate(schedules):
            while done[rank] < len(schedule):
                action = schedule[done[rank]]
                if action.kind in ("forward", "head"):
                    cost = stage_s[rank] if action.kind == "forward" else head_s
                    clock[rank] += cost
                    busy[rank] += cost
                elif action.kind == "send":
                    to = (rank + 1) % num_ranks
                    if blocking_sends and not _waits_for(schedules[to], done[to], action.step):
                        break
                    if blocking_sends:
                        clock[rank] = max(clock[rank], clock[to])
                    arrived[to, action.step] = clock[rank] + hop_s
                elif (rank, action.step) in arrived:
                    clock[rank] = max(clock[rank], arrived.pop((rank, action.step)))
                else:
                    break
                done[rank] += 1
                moved = True
    stuck = [rank for rank in range(num_ranks) if done[rank] < len(schedules[rank])]
    if stuck:
        where = ", ".join(f"rank {rank} at {schedules[rank][done[rank]]}" for rank in stuck)
        raise Deadlock(where)
    total_s = max(clock)
    return Simulation(total_s, tuple(b / total_s for b in busy))


def _waits_for(schedule: Sequence[Action], done: int, step: int) -> bool:
    return done < len(schedule) and schedule[done] == Action("receive", step)
