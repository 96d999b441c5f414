"""Streams that don't fall silent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from hippo_mpi.serving.api.event_stream import DONE, kept_alive, numbered


def test_a_pause_is_filled_with_comments() -> None:
    async def events() -> AsyncIterator[bytes]:
        yield b"data: a\n\n"
        await asyncio.sleep(0.5)
        yield b"data: b\n\n"

    async def collect() -> list[bytes]:
        return [event async for event in kept_alive(events(), 0.1, lambda: "")]

    first, *comments, last = asyncio.run(collect())
    assert (first, last) == (b"data: a\n\n", b"data: b\n\n")
    assert comments and all(comment.startswith(b":") and comment.endswith(b"\n\n") for comment in comments)


def test_comments_say_what_is_waited_for() -> None:
    """At once, and again; in one line, whatever the reason has in it."""
    reasons = iter(["quant is being loaded (1 s)", "rank 1\ndata: failed", ""])

    async def events() -> AsyncIterator[bytes]:
        await asyncio.sleep(0.25)
        yield b"data: a\n\n"

    async def collect() -> list[bytes]:
        return [event async for event in kept_alive(events(), 0.1, lambda: next(reasons))]

    told = [b": quant is being loaded (1 s)\n\n", b": rank 1 data: failed\n\n", b": still waiting\n\n", b"data: a\n\n"]
    assert asyncio.run(collect()) == told


def test_events_end_with_their_reader() -> None:
    """A client that goes away in a pause: what makes its events is told."""
    ended = []

    async def events() -> AsyncIterator[bytes]:
        try:
            await asyncio.sleep(60)
            yield b""
        finally:
            ended.append(True)

    async def leave() -> None:
        async for _ in kept_alive(events(), 60, lambda: ""):
            pass

    async def run() -> None:
        reader = asyncio.ensure_future(leave())
        await asyncio.sleep(0.05)
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        await asyncio.sleep(0.05)

    asyncio.run(run())
    assert ended == [True]


def test_a_mistake_is_not_hidden() -> None:
    async def events() -> AsyncIterator[bytes]:
        yield b"data: a\n\n"
        raise ValueError("x")

    async def collect() -> list[bytes]:
        return [event async for event in kept_alive(events(), 1, lambda: "")]

    with pytest.raises(ValueError, match="x"):
        asyncio.run(collect())


@pytest.mark.parametrize(
    ("after", "got"),
    [
        (-1, [b"id: 0\ndata: a\n\n", b"id: 1\ndata: [DONE]\n\n"]),
        (0, [b"id: 1\ndata: [DONE]\n\n"]),
        (1, [b"id: 1\ndata: [DONE]\n\n"]),
        (9, [b"id: 1\ndata: [DONE]\n\n"]),
    ],
)
def test_who_has_had_every_event_gets_the_last_again(after: int, got: list[bytes]) -> None:
    """So that no stream is empty, which some clients take for a failure."""
    assert told_after([b"data: a\n\n", DONE], after) == got


def test_a_stream_without_a_last_event_of_its_own_ends_with_a_comment() -> None:
    events = [b"event: message_start\n\n", b"event: message_stop\n\n"]
    assert told_after(events, 0) == [b"id: 1\nevent: message_stop\n\n"]
    assert told_after(events, 1) == [b": no further events\n\n"]


def told_after(events: list[bytes], after: int) -> list[bytes]:
    async def each() -> AsyncIterator[bytes]:
        for event in events:
            yield event

    async def collect() -> list[bytes]:
        return [event async for event in numbered(each(), after, lambda: False)]

    return asyncio.run(collect())
