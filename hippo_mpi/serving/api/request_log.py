"""A log line for every request. It never has a text, a key, or the query of a URL, which may contain one."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hippo_mpi.serving.api.audit_log import key_id
from hippo_mpi.serving.supervision.answer import Answer

_log = logging.getLogger(__name__)
_POLLED = ("/health", "/ready", "/metrics")  # by programs, every second or so


@dataclass(frozen=True)
class Answered:
    """What an endpoint leaves for the log in `request.state.answered`: its answers, and their id for clients."""

    id: str
    model: str
    answers: Sequence[Answer]


class RequestLog:
    """ASGI middleware that logs every request when it has ended, in whatever way.

    Args:
        app: the application behind it.
        key_of: returns the API key of a request; empty if it has none.
    """

    def __init__(self, app: ASGIApp, key_of: Callable[[Request], str]) -> None:
        self._app, self._key_of = app, key_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request, and log it at its end."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began_s, status, request_id = time.perf_counter(), 500, ""

        async def watched(message: Message) -> None:
            nonlocal status, request_id
            if message["type"] == "http.response.start":
                status = message["status"]
                request_id = dict(message.get("headers", ())).get(b"x-request-id", b"").decode("latin-1")
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            answered: Answered | None = scope.get("state", {}).get("answered")
            parts = [_asked(scope, status), *(_made(answered, began_s) if answered else ())]
            parts.append(f"total {time.perf_counter() - began_s:.2f} s")
            if ids := dict.fromkeys(filter(None, (request_id, answered.id if answered else ""))):
                parts.append(f"id {_printable('/'.join(ids))}")
            if key := self._key_of(Request(scope)):
                parts.append(f"key {key_id(key)}")
            _log.log(_level(scope["path"], status, answered), "%s", ", ".join(parts))


def _asked(scope: Scope, status: int) -> str:
    path = scope.get("raw_path", b"").decode("latin-1")
    return f"{_printable(scope['method'])} {_printable(path)} {status}"


def _made(answered: Answered, began_s: float) -> list[str]:
    """Return the parts of a line that describe the answers."""
    timings = [answer.timings for answer in answered.answers]
    tokens = sum(len(one.token_ids) for one in timings)
    first = timings[0]
    parts = [
        answered.model,
        f"prompt {first.prompt_tokens} tokens ({first.cached_tokens} cached)",
        f"answer {tokens} tokens",
        _outcome([answer.outcome for answer in answered.answers]),
    ]
    begun = [one for one in timings if one.token_ids]
    if begun:
        first_s, last_s = min(one.first_token_s for one in begun), max(one.finished_s for one in begun)
        parts.append(f"first token {first_s - began_s:.2f} s")
        if last_s > first_s:
            parts.append(f"{(tokens - len(begun)) / (last_s - first_s):.1f} tok/s")
    return parts


def _outcome(outcomes: Sequence[str]) -> str:
    """Join finish reasons. Errors are only called "error": their messages may quote the prompt."""
    if any(outcome.startswith("error") for outcome in outcomes):
        return "error"
    return "client gone" if "abort" in outcomes else "/".join(dict.fromkeys(outcomes))


def _level(path: str, status: int, answered: Answered | None) -> int:
    if path in _POLLED and status in (200, 503):
        return logging.DEBUG
    failed = answered is not None and _outcome([answer.outcome for answer in answered.answers]) == "error"
    return logging.WARNING if status >= 500 or failed else logging.INFO


def _printable(text: str) -> str:
    """Replace what a client could use to forge parts of a line, and shorten it."""
    return re.sub("[^!-~]|,", "?", text[:120])
