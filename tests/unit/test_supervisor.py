"""The supervisor over ranks that are a few lines of Python without MLX: what they say, and how they end."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress

from hippo_mpi.engine.request import SamplingParams
from hippo_mpi.errors import UserError
from hippo_mpi.serving.supervision.answer import Answer
from hippo_mpi.serving.supervision.front import Front
from hippo_mpi.serving.supervision.supervisor import LaunchPlan, Supervisor

MAX_RESTARTS = 2
DEADLINE_S = 30.0
_RANK = """
import json, os, socket, sys, time
front = socket.socket(socket.AF_UNIX)
front.connect(os.environ["HIPPO_FRONT"])
def say(**message):
    front.sendall(json.dumps(message).encode() + b"\\n")
def ready():
    say(type="ready", max_context=100, vocab_size=100)
"""


def run(*lives: str, work: Callable[[Front], Sequence[Answer]]) -> tuple[Front, Sequence[Answer]]:
    """Let a supervisor keep one rank, whose n-th life is the n-th program (later ones: the last), until the work of
    a front is over; returns both."""

    async def main() -> tuple[Front, Sequence[Answer]]:
        front, starts = Front(10, "m"), 0

        async def plan(model: str, living: Sequence[int] | None) -> LaunchPlan:
            nonlocal starts
            starts += 1
            return LaunchPlan([sys.executable, "-c", _RANK + lives[min(starts, len(lives)) - 1]], num_local=1)

        supervisor = Supervisor(front, plan, (), DEADLINE_S, DEADLINE_S, MAX_RESTARTS)
        running = asyncio.ensure_future(supervisor.run())
        answers = work(front)

        async def until_told() -> None:
            while front.num_requests or not answers:
                await asyncio.sleep(0.02)

        await asyncio.wait(
            {running, asyncio.ensure_future(until_told())}, timeout=DEADLINE_S, return_when="FIRST_COMPLETED"
        )
        assert not front.num_requests, front.state
        running.cancel()
        with suppress(asyncio.CancelledError, UserError):
            await running
        return front, answers

    return asyncio.run(main())


def test_what_a_rank_said_before_a_reset_is_heard() -> None:
    """A request that it had begun is suspected of its death, and not only in its next life."""
    dies = """
ready()
while not front.recv(1, socket.MSG_PEEK):
    pass
front.sendall(b'{"type": "beat", "ranks": [], "waiting": 0, "stalled_s": 0}\\n' * 100 + b'{"type": "begun", "request_ids": [0]}\\n')
os._exit(1)  # with a request unread: the front's next read fails
"""
    front, (answer,) = run(dies, work=lambda front: [front.submit([1], SamplingParams(), "m")])
    assert "the ranks failed 3 times in a row" in answer.outcome
    assert front.num_starts == MAX_RESTARTS + 1


def test_a_model_that_was_loaded_before_isnt_refused_at_once() -> None:
    """Status 2 of its ranks may come from a disk that is full just now: they are started again."""
    loads = "ready()\nwhile front.recv(1 << 16):\n    pass"
    answers = """
ready()
said = b""
while b'"add"' not in said:
    said += front.recv(1 << 16)
number = json.loads(said.split(b"\\n")[0])["request"]["id"]
say(type="output", request_id=number, text="x", token=1, finish_reason="length")
while front.recv(1 << 16):
    pass
"""

    def work(front: Front) -> Sequence[Answer]:
        async def change() -> None:
            await front.load("other")
            told.append(front.submit([1], SamplingParams(), "m"))

        changing.append(asyncio.ensure_future(change()))
        return told

    told, changing = list[Answer](), list[asyncio.Future[None]]()
    _, (answer,) = run(loads, loads, "sys.exit(2)", answers, work=work)
    assert answer.outcome == "length"
