"""Long bodies take turns; short ones and clients that leave don't wait for them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.requests import ClientDisconnect, Request

from hippo_mpi.serving.api.request_bodies import LongBodies


def request(length: int | None, is_gone: bool = False) -> Request:
    async def receive() -> dict[str, Any]:
        if not is_gone:
            await asyncio.Event().wait()
        return {"type": "http.disconnect"}

    headers = [] if length is None else [(b"content-length", str(length).encode())]
    return Request({"type": "http", "headers": headers}, receive)


@pytest.mark.parametrize("length", [1 << 20, None], ids=["long", "of unknown length"])
def test_one_at_a_time(length: int | None) -> None:
    async def run() -> None:
        bodies, at_work, most = LongBodies(), 0, 0

        async def work() -> None:
            nonlocal at_work, most
            async with bodies.turn(request(length)):
                at_work += 1
                most = max(most, at_work)
                await asyncio.sleep(0.01)
                at_work -= 1

        await asyncio.gather(*(work() for _ in range(5)))
        assert most == 1

    asyncio.run(run())


def test_a_short_one_passes_and_one_that_leaves_takes_no_turn() -> None:
    async def run() -> None:
        bodies = LongBodies()
        async with bodies.turn(request(1 << 20)):
            async with asyncio.timeout(5), bodies.turn(request(100)):
                pass
            with pytest.raises(ClientDisconnect):
                async with bodies.turn(request(1 << 20, is_gone=True)):
                    pytest.fail("it is gone")
        async with asyncio.timeout(5), bodies.turn(request(1 << 20)):
            pass

    asyncio.run(run())


def test_a_fault_frees_the_turn() -> None:
    async def run() -> None:
        bodies = LongBodies()
        with pytest.raises(ValueError, match="fox"):
            async with bodies.turn(request(1 << 20)):
                raise ValueError("fox")
        async with asyncio.timeout(5), bodies.turn(request(1 << 20)):
            pass

    asyncio.run(run())
