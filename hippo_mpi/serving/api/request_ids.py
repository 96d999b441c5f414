"""A unique name for every request, in the headers of its response and in the id of its answer."""

from __future__ import annotations

import secrets

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

REQUEST_ID_HEADERS = ("x-request-id", "request-id")  # OpenAI's clients read the first, Anthropic's the second


class RequestIds:
    """ASGI middleware that names requests, and puts the names into the headers of all responses."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request under a new name."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        name = secrets.token_hex(12)
        scope.setdefault("state", {})["request_id"] = name

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(id_headers(name))
            await send(message)

        await self._app(scope, receive, send_named)


def id_headers(name: str) -> dict[str, str]:
    """Return the headers with the name of a request."""
    return dict.fromkeys(REQUEST_ID_HEADERS, f"req_{name}")


def request_id(request: Request) -> str:
    """Return the name of a request."""
    return str(request.state.request_id)
