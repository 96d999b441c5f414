"""What went wrong, as a response in the shape of its endpoint: OpenAI's or Anthropic's."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from hippo_mpi.errors import HippoError, UserError
from hippo_mpi.serving.protocols.anthropic_messages import MESSAGES, messages_error
from hippo_mpi.serving.protocols.openai_answers import error_object
from hippo_mpi.serving.supervision.front import Overloaded

_RETRY_AFTER_S = 2
_ANTHROPIC_KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
_OPENAI_CODES = {401: "invalid_api_key", 404: "model_not_found", 429: "rate_limit_exceeded"}


def error_of(error: Exception) -> dict[str, Any]:
    """OpenAI's object."""
    kind = "invalid_request_error" if isinstance(error, UserError) else "server_error"
    return error_object(str(error), kind)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    status, is_starlette_s_own = (
        error.status_code,
        error.detail == HTTPStatus(error.status_code).phrase,
    )  # no such route
    if request.url.path.startswith(MESSAGES):
        kind = _ANTHROPIC_KINDS.get(status, "invalid_request_error")
        return JSONResponse(messages_error(Exception(error.detail), kind), status, error.headers)
    kind = "rate_limit_error" if status == 429 else "invalid_request_error"
    code = None if is_starlette_s_own else _OPENAI_CODES.get(status)
    return JSONResponse(error_object(str(error.detail), kind, code), status, error.headers)


async def _overloaded(request: Request, error: Exception) -> Response:
    found = HTTPException(429, f"{error}; try again later", {"Retry-After": str(_RETRY_AFTER_S)})
    return await _http_error(request, found)


async def _failed(request: Request, error: Exception) -> Response:
    found = messages_error(error) if request.url.path.startswith(MESSAGES) else error_of(error)
    return JSONResponse(found, 400 if isinstance(error, UserError) else 503)


async def _gone(_: Request, __: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


HANDLERS: dict[Any, Any] = {
    HTTPException: _http_error,
    Overloaded: _overloaded,
    HippoError: _failed,
    ClientDisconnect: _gone,
}
