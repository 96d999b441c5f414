"""Error responses, in the format of the endpoint: OpenAI's or Anthropic's."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from hippo_mpi.errors import ContextError, FieldError, ForeignError, HippoError, UserError
from hippo_mpi.protocols.anthropic_messages import MESSAGES, messages_error
from hippo_mpi.protocols.openai_answers import error_object
from hippo_mpi.protocols.openai_requests import CHAT, COMPLETION
from hippo_mpi.protocols.openai_responses import RESPONSES
from hippo_mpi.serving.api.request_ids import id_headers, request_id
from hippo_mpi.serving.supervision.answer import Overloaded

_RETRY_AFTER_S = 2
_LONG_FIELDS = {CHAT: "messages", COMPLETION: "prompt", RESPONSES: "input"}
_ANTHROPIC_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
_OPENAI_CODES = {401: "invalid_api_key", 404: "model_not_found", 429: "rate_limit_exceeded"}


def error_of(error: Exception) -> dict[str, Any]:
    """Return an error as OpenAI's error object."""
    kind = "invalid_request_error" if isinstance(error, UserError) else "server_error"
    code = "context_length_exceeded" if isinstance(error, ContextError) else None
    return error_object(str(error), kind, code, error.field if isinstance(error, FieldError) else None)


def _speaks_anthropic(request: Request) -> bool:
    return request.url.path.startswith(MESSAGES) or "anthropic-version" in request.headers


async def http_error(request: Request, error: Exception) -> Response:
    """Return the response to an HTTPException."""
    assert isinstance(error, HTTPException)
    status, text = error.status_code, error.detail
    has_no_route = status == 404 and text == HTTPStatus.NOT_FOUND.phrase
    if has_no_route:
        meant = _meant(request)
        text = f"unknown URL {request.url.path}; {f'did you mean {meant}?' if meant else 'GET / describes this server'}"
    if _speaks_anthropic(request):
        kind = _ANTHROPIC_KINDS.get(status, "invalid_request_error")
        return JSONResponse(messages_error(Exception(text), kind), status, error.headers)
    kind = "rate_limit_error" if status == 429 else "invalid_request_error"
    code = None if has_no_route else _OPENAI_CODES.get(status)
    param = "model" if code == "model_not_found" else None
    return JSONResponse(error_object(text, kind, code, param), status, error.headers)


def _meant(request: Request) -> str:
    """Return a known path with the same end as an unknown one, or "": a base URL may lack /v1, or have it twice."""
    path, paths = request.url.path, [route.path for route in request.app.routes]
    return next((known for known in paths if known.startswith("/v1/") and path.endswith(known.removeprefix("/v1"))), "")


async def _overloaded(request: Request, error: Exception) -> Response:
    refusal = HTTPException(429, f"{error}; try again later", {"Retry-After": str(_RETRY_AFTER_S)})
    return await http_error(request, refusal)


async def _failed(request: Request, error: Exception) -> Response:
    body = messages_error(error) if _speaks_anthropic(request) else error_of(error)
    if isinstance(error, ContextError) and "error" in body and "param" in body["error"]:
        body["error"]["param"] = _LONG_FIELDS.get(request.url.path)
    status = 400 if isinstance(error, UserError) else 500 if isinstance(error, ForeignError) else 503
    return JSONResponse(body, status)


async def _broken(request: Request, _: Exception) -> Response:
    """Return the response to a bug of ours, whose traceback is in the log; middleware doesn't see this response."""
    error = HippoError("internal error: please report it with the traceback in the server's log")
    body = messages_error(error) if _speaks_anthropic(request) else error_of(error)
    return JSONResponse(body, 500, id_headers(request_id(request)))


async def _gone(_: Request, __: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


HANDLERS: dict[Any, Any] = {
    HTTPException: http_error,
    Overloaded: _overloaded,
    HippoError: _failed,
    ClientDisconnect: _gone,
    Exception: _broken,
}
