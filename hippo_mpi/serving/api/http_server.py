"""The HTTP server: uvicorn, with a deadline for headers, until a signal comes."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
from typing import Any

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from hippo_mpi.errors import UserError
from hippo_mpi.serving.logs import ANNOUNCEMENTS
from hippo_mpi.serving.supervision.answer import ServerEnding
from hippo_mpi.serving.supervision.front import Front

_log = logging.getLogger(__name__)
_announcements = logging.getLogger(ANNOUNCEMENTS)
HEADERS_S = 10.0  # uvicorn itself waits for ever for the end of a request's headers
_KEEP_ALIVE_S = 30
_MOST_HEADER_BYTES = 32 << 10


class _DeadlineProtocol(H11Protocol):
    """Closes connections on which a request has begun, or might, but doesn't get to the end of its headers."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._set_deadline()

    def data_received(self, data: bytes) -> None:
        if self._is_between_requests() and self._deadline is None:
            self._set_deadline()
        super().data_received(data)
        if not self._is_between_requests():
            self._clear_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        self._clear_deadline()
        super().connection_lost(exc)

    def _is_between_requests(self) -> bool:
        cycle: Any = self.cycle
        return cycle is None or bool(cycle.response_complete)

    def _set_deadline(self) -> None:
        self._deadline = self.loop.call_later(HEADERS_S, self._close)

    def _clear_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _close(self) -> None:
        self._deadline = None
        if self._is_between_requests() and self.transport is not None:
            self.transport.close()


async def serve_http(app: Starlette, front: Front, address: str, port: int) -> None:
    """Serve until a signal comes; then clients are told, in words.

    Raises:
        UserError: the address can't be listened on.
    """
    try:
        listener = socket.create_server((address, port), backlog=256)
    except OSError as error:
        raise UserError(f"can't listen on {address}:{port}: {error.strerror}") from None
    settings = uvicorn.Config(
        app, http=_DeadlineProtocol, lifespan="off", log_config=None,
        timeout_keep_alive=_KEEP_ALIVE_S, timeout_graceful_shutdown=2,
        h11_max_incomplete_event_size=_MOST_HEADER_BYTES,
    )  # fmt: skip
    _announcements.info("listening on http://%s:%d", address, listener.getsockname()[1])
    announcing = asyncio.ensure_future(_announce(front))
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises them again when it has ended
            signal.signal(number, lambda *_: None)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup has it
            signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))
    server = uvicorn.Server(settings)
    ending = asyncio.ensure_future(_end_answers(server, front))
    await server.serve([listener])
    announcing.cancel()
    ending.cancel()


async def _end_answers(server: uvicorn.Server, front: Front) -> None:
    while not server.should_exit:
        await asyncio.sleep(0.1)
    _log.info("the server is ending; requests that are told so: %d", front.num_requests)
    front.fail_all(ServerEnding("the server is ending"))


async def _announce(front: Front) -> None:
    while not front.is_ready:
        await asyncio.sleep(0.1)
    _announcements.info("ready")
