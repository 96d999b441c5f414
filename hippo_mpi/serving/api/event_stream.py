"""Streams of server-sent events that report their end, and never fall silent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

DONE = b"data: [DONE]\n\n"
"""The last event of OpenAI's completions."""
_KEEP_ALIVE_INTERVAL_S = 10.0  # proxies and clients close connections that are silent for a minute or so


class EventStream(StreamingResponse):
    """A response of server-sent events.

    Args:
        events: of an answer.
        end: called when they have ended, or the client has gone away, even before the first one.
        why_waiting: returns what the answer waits for; empty: only for its next token.
    """

    def __init__(self, events: AsyncIterator[bytes], end: Callable[[], None], why_waiting: Callable[[], str]) -> None:
        headers = {"Cache-Control": "no-store"}
        pieces = kept_alive(events, _KEEP_ALIVE_INTERVAL_S, why_waiting)
        super().__init__(pieces, media_type="text/event-stream", headers=headers)
        self._end = end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events, and call `end` in any case."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._end()


async def kept_alive(
    events: AsyncIterator[bytes], silence_s: float, why_waiting: Callable[[], str]
) -> AsyncIterator[bytes]:
    """Yield the same events, and between them comments, which clients skip.

    Args:
        events: of an answer.
        silence_s: seconds without an event after which a comment comes.
        why_waiting: returns what the answer waits for; if it isn't empty, a comment with it comes at once.
    """
    pending = asyncio.ensure_future(_next(events))
    try:
        if why := why_waiting():
            yield _comment(why)
        while True:
            if not (await asyncio.wait({pending}, timeout=silence_s))[0]:
                yield _comment(why_waiting() or "still waiting")
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
    """Yield the events after a number, with their numbers from 0 as ids, so that a client can resume the stream.

    A client that has all events gets the end of the stream again, or a comment.

    Args:
        events: all events of an answer.
        after: the number of the last event that isn't wanted; -1: all are.
        is_cut: returns whether the present event only says that the rest has to be fetched later; it gets no number.
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
        yield b"id: %d\n%b" % (number - 1, event) if event == DONE else _comment("no further events")


async def _next(events: AsyncIterator[bytes]) -> bytes | None:
    return await anext(events, None)
