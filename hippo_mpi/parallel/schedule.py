"""The order in which each rank computes, sends and receives, as plain data: no MLX, no sockets.

`actions(rank, num_stages, num_steps)` lists what a rank does for `num_steps` steps. Rank 0 forwards the next step, then
receives the oldest result, then sends: with sends that block until they are received, "send as soon as computed" would
deadlock. `worker.Leader` (`exchange` and `advance`) and `worker.Follower.follow` act in this order; a test compares
them. `simulate` runs all ranks' actions against each other and tells when they finish, or that they never do.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["forward", "head", "send", "receive"]


@dataclass(frozen=True)
class Action:
    """One operation of a rank for one step; "head" is rank 0's norm, head and sampling."""

    kind: Kind
    step: int

    def __str__(self) -> str:
        return f"{self.kind[0].upper()}{self.step}"


def actions(
    rank: int, num_stages: int, num_steps: int, max_in_flight: int | None = None, num_silent: int = 0
) -> list[Action]:
    """Return what a rank does, in order.

    Args:
        rank: which rank.
        num_stages: number of ranks, each with one stage.
        num_steps: steps to run.
        max_in_flight: most micro-batches in flight; None: one per stage. With fewer, rank 0 waits before the next step.
        num_silent: how many of the steps, the first ones, return no result (chunks of a prompt).
    """
    if num_stages == 1:
        return [Action(kind, step) for step in range(num_steps) for kind in _alone(step < num_silent)]
    order: list[Action] = []
    if rank > 0:
        for step in range(num_steps):
            order += [Action("receive", step), Action("forward", step)]
            if rank < num_stages - 1 or step >= num_silent:
                order.append(Action("send", step))
        return order
    max_in_flight = min(max_in_flight or num_stages, num_stages)
    in_flight: deque[int] = deque()

    def finish_oldest() -> None:
        step = in_flight.popleft()
        order.extend([Action("receive", step), Action("head", step)])

    for step in range(num_steps):
        if len(in_flight) == max_in_flight:
            finish_oldest()
        order.append(Action("forward", step))
        if in_flight and len(in_flight) >= num_stages - 1:
            finish_oldest()
        order.append(Action("send", step))
        if step >= num_silent:
            in_flight.append(step)
    while in_flight:
        finish_oldest()
    return order


def _alone(is_silent: bool) -> tuple[Kind, ...]:
    return ("forward",) if is_silent else ("forward", "head")


def table(num_stages: int, num_steps: int) -> str:
    """Return all ranks' actions, one line per rank, for people and golden files."""
    lines = (" ".join(map(str, actions(rank, num_stages, num_steps))) for rank in range(num_stages))
    return "".join(f"rank {rank}: {line}\n" for rank, line in enumerate(lines))


@dataclass(frozen=True)
class Simulation:
    """Result of `simulate`: total seconds, and each rank's share of them spent computing."""

    total_s: float
    busy: tuple[float, ...]


class Deadlock(Exception):
    """Raised when every rank that isn't done waits for another."""


def simulate(
    schedules: Sequence[Sequence[Action]],
    compute_s: Callable[[int, Action], float],
    latency_s: float = 0.0,
    transfer_s: Callable[[int, int], float] = lambda rank, step: 0.0,
    blocking_sends: bool = True,
) -> Simulation:
    """Run the schedules against each other.

    Args:
        schedules: each rank's actions, in order.
        compute_s: seconds that a "forward" or "head" action takes on a rank.
        latency_s: seconds from the end of a message's transfer to its arrival.
        transfer_s: seconds for which a rank's message after a step occupies its link.
        blocking_sends: whether a send ends only when it is received (the worst that a transport may do).

    Raises:
        Deadlock: some ranks never finish.
    """
    num_ranks = len(schedules)
    clock, busy, done = [0.0] * num_ranks, [0.0] * num_ranks, [0] * num_ranks
    link_free = [0.0] * num_ranks
    arrived: dict[tuple[int, int], float] = {}  # (receiving rank, step) -> time at which it can be received
    moved = True
    while moved:
        moved = False
        for rank, schedule in enumerate(schedules):
            while done[rank] < len(schedule):
                action = schedule[done[rank]]
                if action.kind in ("forward", "head"):
                    cost = compute_s(rank, action)
                    clock[rank] += cost
                    busy[rank] += cost
                elif action.kind == "send":
                    to = (rank + 1) % num_ranks
                    if blocking_sends and not _waits_for(schedules[to], done[to], action.step):
                        break
                    if blocking_sends:
                        clock[rank] = max(clock[rank], clock[to])
                    link_free[rank] = max(clock[rank], link_free[rank]) + transfer_s(rank, action.step)
                    arrived[to, action.step] = link_free[rank] + latency_s
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
