"""The HTTP side: OpenAI's endpoints, and Anthropic's, over a Front. Starlette does the protocol.

Knows bodies and answers. Must not know how ranks are started.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from http import HTTPStatus
from typing import Any, TypeVar

from mlx_lm.tokenizer_utils import TokenizerWrapper
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from hippo_mpi.engine.request import RequestOutput, SamplingParams
from hippo_mpi.engine.text import ChatFormat
from hippo_mpi.errors import RankError, UserError
from hippo_mpi.serving.anthropic_protocol import (
    MESSAGES,
    message_events,
    message_object,
    messages_error,
    read_messages_body,
)
from hippo_mpi.serving.audit_log import AuditLog, digest
from hippo_mpi.serving.front import Answer, Front, Overloaded
from hippo_mpi.serving.metrics import Metrics
from hippo_mpi.serving.openai_answers import (
    Choice,
    answer_object,
    chunk_object,
    error_object,
    first_fields,
    usage_chunk,
)
from hippo_mpi.serving.openai_protocol import CHAT, COMPLETION, Asked, read_body
from hippo_mpi.serving.responses_protocol import RESPONSES, read_responses_body, response_events, response_object

_T = TypeVar("_T")
_MOST_CHOICES = 16
_RETRY_AFTER_S = 2


@dataclass(frozen=True)
class ApiSettings:
    """What the API allows.

    Args:
        model: the name that requests may give, and answers carry.
        keys: one of them must come with every request but /health and /ready; none: everybody may ask.
        defaults: for what a request leaves open.
        system_prompt: for chats that bring none of their own.
        max_body_bytes, body_timeout_s: of a request's body.
    """

    model: str
    keys: tuple[str, ...]
    defaults: SamplingParams
    system_prompt: str | None = None
    max_body_bytes: int = 4 << 20
    body_timeout_s: float = 30.0


@dataclass(frozen=True)
class _Dialect:
    """Another API's words: its bodies, its objects, its events, and how its ids begin."""

    read: Callable[[dict[str, Any], SamplingParams], Asked]
    whole: Callable[[Asked, str, str, list[RequestOutput], TokenizerWrapper], dict[str, Any]]
    events: Callable[[Asked, str, str, AsyncIterator[RequestOutput], TokenizerWrapper], AsyncIterator[bytes]]
    prefix: str


_ANTHROPIC = _Dialect(read_messages_body, message_object, message_events, "msg")
_RESPONSES = _Dialect(read_responses_body, response_object, response_events, "resp")


class Api:
    """The endpoints."""

    def __init__(
        self,
        front: Front,
        tokenizer: TokenizerWrapper,
        chat_format: ChatFormat,
        settings: ApiSettings,
        metrics: Metrics,
        audit: AuditLog | None = None,
    ) -> None:
        self._front, self._tokenizer, self._format = front, tokenizer, chat_format
        self._settings, self._metrics, self._audit = settings, metrics, audit

    def app(self) -> Starlette:
        def guarded(endpoint: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
            async def call(request: Request) -> Response:
                self._check_key(request)
                return await endpoint(request)

            return call

        return Starlette(
            routes=[
                Route("/health", self._health),
                Route("/ready", self._ready),
                Route("/metrics", guarded(self._show_metrics)),
                Route("/v1/models", guarded(self._models)),
                Route("/v1/models/{model:path}", guarded(self._model)),
                Route("/tokenize", guarded(self._tokenize), methods=["POST"]),
                Route(CHAT, guarded(self._answer), methods=["POST"]),
                Route(COMPLETION, guarded(self._answer), methods=["POST"]),
                Route(MESSAGES, guarded(partial(self._speak, _ANTHROPIC)), methods=["POST"]),
                Route(RESPONSES, guarded(partial(self._speak, _RESPONSES)), methods=["POST"]),
            ],
            exception_handlers={
                HTTPException: _http_error,
                Overloaded: _overloaded,
                UserError: _failed,
                RankError: _failed,
                ClientDisconnect: _gone,
            },
        )

    # ---- who may ask, and what

    def _check_key(self, request: Request) -> None:
        if not self._settings.keys:
            return
        given = _key_of(request).encode()
        # Every key is compared, in constant time, so that how long it takes says nothing.
        known = [hmac.compare_digest(given, key.encode()) for key in self._settings.keys]
        if not any(known):
            raise HTTPException(401, "this server needs an API key: Authorization: Bearer KEY")

    async def _body(self, request: Request) -> dict[str, Any]:
        """The JSON object in a request's body, within the limits."""
        data = b""
        try:
            async with asyncio.timeout(self._settings.body_timeout_s):
                async for piece in request.stream():
                    data += piece
                    if len(data) > self._settings.max_body_bytes:
                        raise HTTPException(413, f"the body is larger than {self._settings.max_body_bytes:,} bytes")
        except TimeoutError:
            raise HTTPException(408, f"the body took longer than {self._settings.body_timeout_s:.0f} s") from None
        try:
            body = json.loads(data)
        except (ValueError, RecursionError):
            raise UserError("the body is not JSON") from None
        if not isinstance(body, dict):
            raise UserError("the body must be a JSON object")
        model = body.get("model")
        if model is not None and model != self._settings.model:
            raise HTTPException(404, f"the model {model!r} does not exist; this server has {self._settings.model!r}")
        return body

    # ---- the endpoints

    async def _health(self, _: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _ready(self, _: Request) -> Response:
        front = self._front
        status = {"ready": front.is_ready, "state": front.state, "requests": front.num_requests}
        if front.about is not None and not self._settings.keys:  # hosts and memory are nobody else's business
            status |= {"max_context": front.about.max_context, "ranks": front.about.ranks}
        return JSONResponse(status, 200 if front.is_ready else 503)

    async def _show_metrics(self, _: Request) -> Response:
        return Response(generate_latest(self._metrics.registry), media_type=CONTENT_TYPE_LATEST)

    def _model_object(self) -> dict[str, Any]:
        return {"id": self._settings.model, "object": "model", "created": 0, "owned_by": "hippo-mpi"}

    async def _models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model_object()]})

    async def _model(self, request: Request) -> Response:
        if request.path_params["model"] != self._settings.model:
            raise HTTPException(404, f"the model {request.path_params['model']!r} does not exist")
        return JSONResponse(self._model_object())

    async def _tokenize(self, request: Request) -> Response:
        body = await self._body(request)
        url = CHAT if "messages" in body else COMPLETION
        given = {name: body[name] for name in ("messages", "prompt") if name in body}
        tokens = await self._encode(read_body(url, given, self._settings.defaults))
        return JSONResponse({"tokens": tokens, "count": len(tokens)})

    async def _encode(self, asked: Asked) -> list[int]:
        prompt = self._settings.system_prompt
        system = [{"role": "system", "content": prompt}] if prompt else []
        return await asyncio.to_thread(asked.encode, self._tokenizer, self._format, system)

    async def _answer(self, request: Request) -> Response:
        body = await self._body(request)
        is_stream = _boolean(body.pop("stream", None), "stream")
        wants_usage = _wants_usage(body.get("stream_options"), is_stream)
        count = body.pop("n", None)
        count = 1 if count is None else count
        if type(count) is not int or not 1 <= count <= _MOST_CHOICES:
            raise UserError(f"n must be a whole number from 1 to {_MOST_CHOICES}, not {count!r}")
        asked = read_body(request.url.path, body, self._settings.defaults)
        prompt = await self._encode(asked)
        answers: list[Answer] = []
        try:
            for index in range(count):
                seed = asked.sampling.seed
                sampling = replace(asked.sampling, seed=None if seed is None else seed + index)
                answers.append(self._front.submit(prompt, sampling))
        except UserError:
            for answer in answers:
                self._front.abort(answer)
            raise
        name = f"{'chatcmpl' if asked.url == CHAT else 'cmpl'}-{secrets.token_hex(12)}"
        end = partial(self._end, request, name, asked, answers)
        choices = [Choice(asked, prompt, self._tokenizer) for _ in answers]
        if is_stream:
            return _EventStream(self._events(asked, name, answers, choices, wants_usage), end)
        try:
            found = await _unless_gone(request, asyncio.gather(*(_all(answer) for answer in answers)))
        finally:
            end()
        for choice, outputs in zip(choices, found, strict=True):
            for output in outputs:
                choice.take(output)
        return JSONResponse(answer_object(self._settings.model, name, choices))

    async def _speak(self, dialect: _Dialect, request: Request) -> Response:
        """One answer, in the words of another API."""
        body = await self._body(request)
        is_stream = _boolean(body.pop("stream", None), "stream")
        asked = dialect.read(body, self._settings.defaults)
        answer = self._front.submit(await self._encode(asked), asked.sampling)
        name, model = f"{dialect.prefix}_{secrets.token_hex(12)}", self._settings.model
        end = partial(self._end, request, name, asked, [answer])
        if is_stream:
            return _EventStream(dialect.events(asked, model, name, answer.outputs(), self._tokenizer), end)
        try:
            (outputs,) = await _unless_gone(request, asyncio.gather(_all(answer)))
        finally:
            end()
        return JSONResponse(dialect.whole(asked, model, name, outputs, self._tokenizer))

    async def _events(
        self,
        asked: Asked,
        name: str,
        answers: Sequence[Answer],
        choices: Sequence[Choice],
        wants_usage: bool,
    ) -> AsyncIterator[bytes]:
        """Server-sent events: every output as it comes, whichever choice it is of."""
        model = self._settings.model
        told: asyncio.Queue[tuple[int, RequestOutput | UserError | RankError]] = asyncio.Queue()
        tasks = [asyncio.ensure_future(_pass_on(index, answer, told)) for index, answer in enumerate(answers)]
        try:
            for index in range(len(answers)):
                yield _event(chunk_object(asked, model, name, index, first_fields(asked)))
            running = len(answers)
            while running:
                index, output = await told.get()
                if isinstance(output, Exception):
                    yield _event(_error_of(output))
                    return
                yield _event(chunk_object(asked, model, name, index, choices[index].take(output)))
                running -= output.finish_reason is not None
            if wants_usage:
                yield _event(usage_chunk(asked, model, name, [answer.timings for answer in answers]))
            yield b"data: [DONE]\n\n"
        finally:  # also when the client has gone away
            for task in tasks:
                task.cancel()

    def _end(self, request: Request, name: str, asked: Asked, answers: Sequence[Answer]) -> None:
        """A request has ended, or its client has gone away: free its places, and write it down."""
        for answer in answers:
            self._front.abort(answer)
        if self._audit is None:
            return
        key = _key_of(request)
        given = {k: v for k, v in asdict(asked.sampling).items() if v != getattr(self._settings.defaults, k)}
        prompt = self._tokenizer.decode(answers[0].request.prompt)
        record: dict[str, Any] = {
            "id": name,
            "key": digest(key)[:16] if key else None,
            "model": self._settings.model,
            "endpoint": request.url.path,
            "parameters": given,
            "prompt_tokens": len(answers[0].request.prompt),
            "prompt_digest": digest(prompt),
            "choices": [],
        }
        for answer in answers:
            text = self._tokenizer.decode(answer.timings.token_ids)
            choice = {"tokens": len(answer.timings.token_ids), "outcome": answer.outcome, "digest": digest(text)}
            record["choices"].append({**choice, **({"text": text} if self._audit.has_text else {})})
        if self._audit.has_text:
            record["prompt"] = prompt
        self._audit.write(record)


def _key_of(request: Request) -> str:
    headers = request.headers
    return headers.get("x-api-key") or headers.get("authorization", "").removeprefix("Bearer ")


class _EventStream(StreamingResponse):
    """Server-sent events; `end` is called when they have ended, or the client has gone away, even before the first."""

    def __init__(self, events: AsyncIterator[bytes], end: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._end = end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._end()


async def _all(answer: Answer) -> list[RequestOutput]:
    return [output async for output in answer.outputs()]


async def _pass_on(
    index: int, answer: Answer, told: asyncio.Queue[tuple[int, RequestOutput | UserError | RankError]]
) -> None:
    try:
        async for output in answer.outputs():
            told.put_nowait((index, output))
    except (UserError, RankError) as error:
        told.put_nowait((index, error))


async def _unless_gone(request: Request, wanted: asyncio.Future[_T]) -> _T:
    """Wait for an answer as long as the client does."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    watch = asyncio.ensure_future(gone())
    try:
        both: set[asyncio.Future[Any]] = {wanted, watch}
        await asyncio.wait(both, return_when="FIRST_COMPLETED")
        if not wanted.done():
            raise ClientDisconnect
        return wanted.result()
    finally:
        watch.cancel()
        wanted.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):  # it is looked at, or asyncio complains
            await wanted


def _event(found: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(found)}\n\n".encode()


def _boolean(value: Any, name: str) -> bool:
    if value not in (None, True, False) or type(value) not in (bool, type(None)):
        raise UserError(f"{name} must be true or false, not {value!r}")
    return bool(value)


def _wants_usage(options: Any, is_stream: bool) -> bool:
    if options is None:
        return False
    if not is_stream or not isinstance(options, dict) or not set(options) <= {"include_usage"}:
        raise UserError('stream_options must be {"include_usage": true or false}, with stream: true')
    return _boolean(options.get("include_usage"), "include_usage")


# ---- errors, in the shape of the endpoint


def _error_of(error: Exception) -> dict[str, Any]:
    kind = "invalid_request_error" if isinstance(error, UserError) else "server_error"
    return error_object(str(error), kind)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if request.url.path == MESSAGES:
        kind = {401: "authentication_error", 404: "not_found_error"}.get(error.status_code, "invalid_request_error")
        return JSONResponse(messages_error(Exception(error.detail), kind), error.status_code, error.headers)
    code = {401: "invalid_api_key", 404: "model_not_found"}.get(error.status_code)
    code = None if error.detail == HTTPStatus(error.status_code).phrase else code  # Starlette's own: no such route
    found = error_object(str(error.detail), "invalid_request_error", code)
    return JSONResponse(found, error.status_code, error.headers)


async def _overloaded(request: Request, error: Exception) -> Response:
    found = error_object(f"{error}; try again later", "rate_limit_error", "rate_limit_exceeded")
    if request.url.path == MESSAGES:
        found = messages_error(error, "rate_limit_error")
    return JSONResponse(found, 429, {"Retry-After": str(_RETRY_AFTER_S)})


async def _failed(request: Request, error: Exception) -> Response:
    found = messages_error(error) if request.url.path == MESSAGES else _error_of(error)
    return JSONResponse(found, 400 if isinstance(error, UserError) else 503)


async def _gone(_: Request, __: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it
