"""HTTP/1.1 on one connection: uvicorn's protocol with deadlines, which also notices when a pipelining client leaves."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from hippo_mpi.serving.addresses import network_of
from hippo_mpi.serving.api.connections import Connections

HEADERS_S = 10.0  # for a request's headers to be complete; uvicorn itself has no limit
_MAX_AHEAD_BYTES = 64 << 10  # of further requests, sent before the present one is answered
_REFUSED = json.dumps({"error": {"message": "too many connections: try again later", "type": "server_error"}}).encode()
_REFUSAL = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 2\r\nConnection: close\r\n"
    b"Content-Length: %d\r\n\r\n%s" % (len(_REFUSED), _REFUSED)
)


class HttpProtocol(H11Protocol):
    """A connection that is closed if headers aren't complete HEADERS_S after it was opened, or after a request began.

    Args:
        args: of uvicorn's protocol.
        open_connections: in which it has to find a place.
        kwargs: of uvicorn's protocol.
    """

    def __init__(self, *args: Any, open_connections: Connections, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._open_connections = open_connections
        self._deadline: asyncio.TimerHandle | None = None
        self._ahead = b""
        self.address = self.network = ""
        self._answered_s = time.monotonic()

    # ---- called by asyncio

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Find a place for the connection, or answer that there is none, and close it."""
        super().connection_made(transport)
        self.address = self.client[0] if self.client else ""
        self.network = network_of(self.address)
        if not self._open_connections.admit(self):
            transport.write(_REFUSAL)
            transport.close()
            return
        self._set_deadline()

    def data_received(self, data: bytes) -> None:
        """Read on while a request is answered: uvicorn would stop, and not notice that the client has gone."""
        if not self._is_reading():
            self._ahead += data
            if len(self._ahead) > _MAX_AHEAD_BYTES:
                self.abort()
            return
        if self._is_between_requests() and self._deadline is None:
            self._set_deadline()
        super().data_received(data)
        if not self._is_between_requests():
            self._clear_deadline()
        if not self._is_reading():
            self.flow.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        """Free the connection's place."""
        self._clear_deadline()
        self._open_connections.remove(self)
        self._ahead = b""
        super().connection_lost(exc)

    # ---- called by uvicorn

    def on_response_complete(self) -> None:
        """Go on with what the client has sent ahead."""
        self._answered_s = time.monotonic()
        super().on_response_complete()
        if self._ahead and not self.transport.is_closing():
            data, self._ahead = self._ahead, b""
            self.data_received(data)

    # ---- called by Connections

    @property
    def silent_since_s(self) -> float | None:
        """When it was last answered, or opened, on time.monotonic(); None: a request or its answer is under way."""
        return self._answered_s if self._is_between_requests() and not self.unsent_bytes else None

    @property
    def unsent_bytes(self) -> int:
        """How much of its answers waits to be sent."""
        return self.transport.get_write_buffer_size()

    def abort(self) -> None:
        """Close it at once; what is unsent is lost."""
        self.transport.abort()

    def _is_reading(self) -> bool:
        """Return True if more of the present request has to come, or a next one may."""
        return self.conn.their_state in (h11.IDLE, h11.SEND_BODY)

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
