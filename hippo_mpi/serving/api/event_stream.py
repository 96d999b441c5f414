"""Server-sent events: streams that end what they are of, and don't fall silent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

DONE = b"data: [DONE]\n\n"
"""The last event of OpenAI's completions."""
_KEEP_ALIVE_S = 10.0  # proxies and clients give up on connections that say nothing for a minute or so


class EventStream(StreamingResponse):
    """Server-sent events of an answer.

    Args:
        end: called when they have ended, or the client has gone away, even before the first.
        why_waiting: says what the answer waits for; empty: for nothing but its tokens.
    """

    def __init__(self, events: AsyncIterator[bytes], end: Callable[[], None], why_waiting: Callable[[], str]) -> None:
        headers = {"Cache-Control": "no-store"}
        pieces = kept_alive(events, _KEEP_ALIVE_S, why_waiting)
        super().__init__(pieces, media_type="text/event-stream", headers=headers)
        self._end = end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._end()


async def kept_alive(
    events: AsyncIterator[bytes], silence_s: float, why_waiting: Callable[[], str]
) -> AsyncIterator[bytes]:
    """Yield the same events, and comments, which clients skip: at once if they have to wait for something, and after
    every so many seconds without an event."""
    pending = asyncio.ensure_future(_next(events))
    try:
        if why := why_waiting():
            yield _comment(why)
        while True:
            if not (await asyncio.wait({pending}, timeout=silence_s))[0]:
                yield _comment(why_waiting() or "no news yet")
            elif (event := pending.result()) is None:
                return
            else:
                yield event
                pending = asyncio.ensure_future(_next(events))
    finally:
        pending.cancel()


def _comment(text: str) -> bytes:
    return f": {' '.join(text.split())}\n\n".encode()  # a line break would begin an event


async def numbered(events: AsyncIterator[bytes], after: int, is_cut: Callable[[], bool]) -> AsyncIterator[bytes]:
    """Yield events with their numbers as ids, from 0, for a client that will ask for those after the last that it got. If
    that was the last of all, it gets the end of the stream again, or a comment.

    Args:
        after: the number of the last one that isn't wanted.
        is_cut: whether an event that comes now only says that the rest is to be fetched elsewhere; such has no number.
    """
    number, event, has_come = 0, b"", False
    async for event in events:
        if is_cut():
            has_come = True
            yield event
        elif number > after:
            has_come = True
            yield b"id: %d\n%b" % (number, event)
        number += 1
    if not has_come:
        yield b"id: %d\n%b" % (number - 1, event) if event == DONE else _comment("that was all")


async def _next(events: AsyncIterator[bytes]) -> bytes | None:
    return await anext(events, None)
