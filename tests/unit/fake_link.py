"""What fake ranks and a front say to each other. All messages of the tests of recovery are built and read here."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any, cast

from hippo_mpi.engine.messages import ErrorMessage, OutputMessage
from hippo_mpi.engine.request import FinishReason, Request, SamplingParams
from hippo_mpi.errors import HippoError
from hippo_mpi.serving.supervision.answer import Told
from hippo_mpi.serving.supervision.messages import (
    Add,
    Beat,
    Begun,
    Ready,
    Refused,
    Taking,
    Waiting,
    line_of,
    read_order,
)
from hippo_mpi.serving.supervision.request_broker import RequestBroker

MAX_CONTEXT = VOCAB_SIZE = 100
HANG_S = 30.0


def ready(layout: str | None = None) -> bytes:
    return line_of(Ready(MAX_CONTEXT, VOCAB_SIZE, layout=layout))


def output(
    number: int, token: int | None, text: str = "x", finish: FinishReason | None = None, state: int = 0
) -> bytes:
    return line_of(OutputMessage(number, text, token, finish_reason=finish, random_state=[state] if state else None))


def waiting(number: int) -> bytes:
    return line_of(Waiting(number))


def begun(*numbers: int) -> bytes:
    return line_of(Begun(list(numbers)))


def taking(number: int | None) -> bytes:
    return line_of(Taking(number))


def refused(number: int, error: HippoError) -> bytes:
    return line_of(Refused(number, ErrorMessage.of(error)))


def beat(waiting: int = 0, stalled_s: float = 0.0) -> bytes:
    return line_of(Beat([], waiting, stalled_s))


def read_told(line: bytes) -> Request | int:
    """Return a request that ranks are to answer, or the number of one that is aborted."""
    order = read_order(line)
    return order.request if isinstance(order, Add) else order.request_id


RANK_PROGRAM = f"""
import json, os, signal, socket, sys, time
front = socket.socket(socket.AF_UNIX)
if os.environ["MLX_RANK"] == "0":
    front.connect(os.environ["HIPPO_FRONT"])
def send(text):
    front.sendall(text.encode())
def say(**message):
    send(json.dumps(message) + "\\n")
def ready():
    send({ready().decode()!r})
def begin():
    ready()
    front.recv(1, socket.MSG_PEEK)  # the front knows it, and has told something
def beat():
    send({beat().decode()!r})
def begun(*numbers):
    say(type="begun", request_ids=numbers)
def taking(number):
    say(type="taking", request_id=number)
def output(number, token, finish=None, text="x"):
    say(type="output", request_id=number, token=token, text=text, finish_reason=finish)
def told():  # (request's number, its prompt, its tokens so far), or (number, None, None) of one that is aborted
    for line in front.makefile("rb"):
        message = json.loads(line)
        if message["type"] == "abort":
            yield message["request_id"], None, None
        else:
            request = message["request"]
            yield request["id"], request["prompt"], (request.get("resume") or {{"tokens": []}})["tokens"]
def status(code, why=""):
    with open(os.environ["HIPPO_STATUS_FILE"], "w") as file:
        file.write(f"{{code}}\\n{{why}}")
    os._exit(code)
"""
"""The beginning of a rank's program that imports nothing of ours."""


class Client:
    """Somebody who waits for an answer of so many tokens, each of which says which it is."""

    def __init__(self, front: RequestBroker, model: str, num_tokens: int) -> None:
        self._front, self.num_tokens, self.is_gone = front, num_tokens, False
        self.told: list[Told] = []
        self.answer = front.submit([num_tokens, 1], SamplingParams(), model, self.told.append)

    @property
    def has_ended(self) -> bool:
        last = self.told[-1] if self.told else None
        return self.is_gone or isinstance(last, HippoError) or bool(last and last.finish_reason)

    @property
    def error(self) -> str:
        """Return why there is no whole answer; empty if there is, or it isn't complete."""
        return str(self.told[-1]) if self.told and isinstance(self.told[-1], HippoError) else ""

    def leave(self) -> None:
        """Go away, if nothing more comes also behind the end."""
        self._front.abort(self.answer)
        self.is_gone = self.is_gone or not self.has_ended

    def check(self) -> None:
        """Each token came once, in order, and one end, which was the last."""
        outputs = [one for one in self.told if not isinstance(one, HippoError)]
        tokens = [one.token for one in outputs]
        assert tokens == list(range(len(tokens))) == self.answer.timings.token_ids
        assert "".join(one.text for one in outputs) == "x" * len(tokens)
        ends = [isinstance(one, HippoError) or one.finish_reason is not None for one in self.told]
        assert not any(ends[:-1]) and self.has_ended
        if not self.error and not self.is_gone:
            assert len(tokens) == self.num_tokens and self.answer.outcome == "length"


class FakeRanks:
    """Ranks as a front knows them: what they are told, and what they say."""

    def __init__(self, front: RequestBroker, silence_s: float = HANG_S, limit: int = 1 << 20) -> None:
        self.told: list[Request | int] = []
        self.is_closed = False
        self._reader = asyncio.StreamReader(limit=limit)
        self._serving = asyncio.ensure_future(front.serve_ranks(self._reader, cast(Any, self), silence_s))

    def write(self, line: bytes) -> None:
        self.told.append(read_told(line))

    def close(self) -> None:
        self.is_closed = True

    @property
    def added(self) -> list[int]:
        return [one.id for one in self.told if isinstance(one, Request)]

    @property
    def aborted(self) -> list[int]:
        return [one for one in self.told if isinstance(one, int)]

    async def say(self, *lines: bytes) -> None:
        """And let the front hear it."""
        for line in lines:
            self._reader.feed_data(line)
            for _ in range(10):
                await asyncio.sleep(0)

    async def be_cancelled(self, moment: int, line: bytes) -> None:
        """Let the front be cancelled so many looks behind a line."""
        self._reader.feed_data(line)
        for _ in range(moment):
            await asyncio.sleep(0)
        self._serving.cancel()
        for _ in range(20):
            await asyncio.sleep(0)

    @property
    def has_ended(self) -> bool:
        return self._serving.done()

    async def end(self, last: bytes = b"") -> str:
        """Close their connection; what the front makes of it."""
        self._reader.feed_data(last)
        self._reader.feed_eof()
        return await self.await_end()

    async def fail(self, error: OSError) -> str:
        """Break their connection."""
        self._reader.set_exception(error)
        return await self.await_end()

    async def await_end(self) -> str:
        await asyncio.wait({self._serving}, timeout=HANG_S)
        return "cancelled" if self._serving.cancelled() else self._serving.result()


async def ready_ranks(front: RequestBroker) -> FakeRanks:
    ranks = FakeRanks(front)
    await ranks.say(ready())
    return ranks


def run(work: Coroutine[Any, Any, None]) -> None:
    """Run a test; no task of it may be left."""

    async def main() -> None:
        await work
        for _ in range(3):
            await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


def numbers_of(answers: Iterable[Any]) -> list[int]:
    return [answer.request.id for answer in answers]
