"""Checks of a request before its body is read, against web pages of other sites.

A browser lets any page post forms and plain text to any server; and if the owner of a page's host name lets it point at
127.0.0.1 (DNS rebinding), the browser takes this server for the page's own.
"""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from hippo_mpi.serving.api.access import Access
from hippo_mpi.serving.api.http_errors import http_error

_JSON = "application/json"


class Gate:
    """ASGI middleware that checks where requests come from; those with a body hold a place until they have ended.

    Args:
        app: the application behind it.
        access: that has the places.
        hosts: names that the Host header may have; none: any.
        origins: of web pages that may send requests; "*": any.
    """

    def __init__(self, app: ASGIApp, access: Access, hosts: tuple[str, ...], origins: tuple[str, ...]) -> None:
        self._app, self._access = app, access
        self._hosts, self._origins = {host.lower() for host in hosts}, origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request that passes the checks, and answer others with an error."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        try:
            self._check_host(request)
            self._check_origin(request)
            if _has_body(request):
                _check_type(request)
                self._access.take_places(request, 1)
        except HTTPException as error:
            response = await http_error(request, error)
            await response(scope, receive, send)
            return
        try:
            await self._app(scope, receive, send)
        finally:
            self._access.free_places(request)

    def _check_host(self, request: Request) -> None:
        host = _host_of(request.headers.get("host", ""))
        if self._hosts and host and host not in self._hosts:
            raise HTTPException(403, f"host {host!r} is not allowed: start the server with --allow-host {host}")

    def _check_origin(self, request: Request) -> None:
        origin = request.headers.get("origin")
        if origin is None or "*" in self._origins or origin in self._origins:
            return
        if origin.partition("://")[2].lower() != request.headers.get("host", "").lower():
            why = f"origin {origin!r} is not allowed: start the server with --allow-origin {origin}"
            raise HTTPException(403, why)


def _host_of(authority: str) -> str:
    """Return the name or address in a Host header, as it is compared: [::1]:8080 is ::1."""
    host, _, port = authority.rpartition(":")
    name = host if host and port.isdecimal() and (host.endswith("]") or ":" not in host) else authority
    return name.strip("[]").rstrip(".").lower()


def _has_body(request: Request) -> bool:
    return "transfer-encoding" in request.headers or request.headers.get("content-length", "0") != "0"


def _check_type(request: Request) -> None:
    given = request.headers.get("content-type", "")
    if given.partition(";")[0].strip().lower() != _JSON:
        what = f"not {given!r}" if given else "and is missing"
        advice = f"with curl: -H 'Content-Type: {_JSON}'"
        raise HTTPException(415, f"the header must be Content-Type: {_JSON}, {what} ({advice})")
