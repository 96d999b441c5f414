"""Server-sent events: streams that end what they are of, and don't fall silent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

_KEEP_ALIVE_S = 10.0  # proxies and clients give up on connections that say nothing for a minute or so


class EventStream(StreamingResponse):
    """Server-sent events; `end` is called when they have ended, or the client has gone away, even before the first."""

    def __init__(self, events: AsyncIterator[bytes], end: Callable[[], None]) -> None:
        headers = {"Cache-Control": "no-store"}
        super().__init__(kept_alive(events, _KEEP_ALIVE_S), media_type="text/event-stream", headers=headers)
        self._end = end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._end()


async def kept_alive(events: AsyncIterator[bytes], silence_s: float) -> AsyncIterator[bytes]:
    """The same events, with a comment, which clients skip, after every so many seconds without one."""
    pending = asyncio.ensure_future(_next(events))
    try:
        while True:
            if not (await asyncio.wait({pending}, timeout=silence_s))[0]:
                yield b": no news yet\n\n"
            elif (event := pending.result()) is None:
                return
            else:
                yield event
                pending = asyncio.ensure_future(_next(events))
    finally:
        pending.cancel()


async def _next(events: AsyncIterator[bytes]) -> bytes | None:
    return await anext(events, None)
