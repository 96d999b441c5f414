"""Long prompts are tokenized one after another; short ones and clients that leave don't wait for them."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest
from starlette.requests import ClientDisconnect, Request

from hippo_mpi.serving.api.request_bodies import Tokenizing

LONG = 1 << 20


def request(length: int | None, is_gone: bool = False) -> Request:
    async def receive() -> dict[str, Any]:
        if not is_gone:
            await asyncio.Event().wait()
        return {"type": "http.disconnect"}

    headers = [] if length is None else [(b"content-length", str(length).encode())]
    return Request({"type": "http", "headers": headers}, receive)


@pytest.mark.parametrize("length", [LONG, None], ids=["long", "of unknown length"])
def test_one_at_a_time_in_one_thread(length: int | None) -> None:
    async def run() -> None:
        tokenizing, at_work, most, threads = Tokenizing(), 0, 0, set()

        def work() -> int:
            nonlocal at_work, most
            threads.add(threading.get_ident())
            at_work += 1
            most = max(most, at_work)
            time.sleep(0.01)
            at_work -= 1
            return 7

        assert await asyncio.gather(*(tokenizing.run(request(length), work) for _ in range(5))) == [7] * 5
        assert most == len(threads) == 1

    asyncio.run(run())


def test_a_short_one_passes_and_one_that_leaves_is_never_begun() -> None:
    async def run() -> None:
        tokenizing, has_begun, may_end, begun = Tokenizing(), threading.Event(), threading.Event(), []
        first = asyncio.ensure_future(tokenizing.run(request(LONG), lambda: (has_begun.set(), may_end.wait(30))))
        async with asyncio.timeout(5):
            while not has_begun.is_set():
                await asyncio.sleep(0.01)
            assert await tokenizing.run(request(100), lambda: 7) == 7
            with pytest.raises(ClientDisconnect):
                await tokenizing.run(request(LONG, is_gone=True), lambda: begun.append(1))
            may_end.set()
            await first
            assert await tokenizing.run(request(LONG), lambda: 8) == 8
        assert not begun

    asyncio.run(run())


def test_a_fault_is_told_and_the_next_one_works() -> None:
    def fail() -> None:
        raise ValueError("fox")

    async def run() -> None:
        tokenizing = Tokenizing()
        with pytest.raises(ValueError, match="fox"):
            await tokenizing.run(request(LONG), fail)
        assert await tokenizing.run(request(LONG), lambda: 7) == 7

    asyncio.run(run())
