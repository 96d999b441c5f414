"""The HTTP side: OpenAI's endpoints, and Anthropic's, over a Front. Starlette does the protocol.

Knows bodies and answers. Must not know how ranks are started.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, TypeVar

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from hippo_mpi.engine.request import RequestOutput, SamplingParams
from hippo_mpi.errors import RankError, UserError
from hippo_mpi.serving.api.access import Access, key_of
from hippo_mpi.serving.api.audit_log import AuditLog, digest, key_id
from hippo_mpi.serving.api.event_stream import EventStream
from hippo_mpi.serving.api.http_errors import HANDLERS, error_of
from hippo_mpi.serving.api.metrics import Metrics
from hippo_mpi.serving.api.openapi import openapi_object
from hippo_mpi.serving.api.request_log import Answered
from hippo_mpi.serving.protocols.anthropic_messages import (
    COUNT_TOKENS,
    MESSAGES,
    MessageAnswer,
    count_body,
    read_messages_body,
)
from hippo_mpi.serving.protocols.openai_answers import (
    Choice,
    answer_object,
    chunk_object,
    first_fields,
    usage_chunk,
)
from hippo_mpi.serving.protocols.openai_requests import CHAT, COMPLETION, Asked, read_body
from hippo_mpi.serving.protocols.openai_responses import RESPONSES, ResponseAnswer, read_responses_body
from hippo_mpi.serving.supervision.catalogue import Catalogue, ServedModel
from hippo_mpi.serving.supervision.front import Answer, Front

_T = TypeVar("_T")
_MOST_CHOICES = 16


@dataclass(frozen=True)
class ApiSettings:
    """What the API allows.

    Args:
        max_body_bytes, body_timeout_s: of a request's body.
        origins: of pages in browsers that may ask (CORS).
    """

    max_body_bytes: int = 4 << 20
    body_timeout_s: float = 30.0
    origins: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Dialect:
    """Another API's words: its bodies, its answers, and how its ids begin."""

    read: Callable[[dict[str, Any], SamplingParams], Asked]
    answer: type[MessageAnswer] | type[ResponseAnswer]
    prefix: str


_ANTHROPIC = _Dialect(read_messages_body, MessageAnswer, "msg")
_RESPONSES = _Dialect(read_responses_body, ResponseAnswer, "resp")


class Api:
    """The endpoints."""

    def __init__(
        self,
        front: Front,
        catalogue: Catalogue,
        access: Access,
        settings: ApiSettings,
        metrics: Metrics,
        audit: AuditLog | None = None,
    ) -> None:
        self._front, self._catalogue, self._access = front, catalogue, access
        self._settings, self._metrics, self._audit = settings, metrics, audit

    def app(self) -> Starlette:
        def guarded(endpoint: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
            async def call(request: Request) -> Response:
                self._access.check_key(request)
                return await endpoint(request)

            return call

        found = Starlette(
            routes=[
                Route("/health", self._health),
                Route("/ready", self._ready),
                Route("/metrics", guarded(self._show_metrics)),
                Route("/openapi.json", guarded(self._describe)),
                Route("/admin/model", guarded(self._load_model), methods=["POST"]),
                Route("/v1/models", guarded(self._models)),
                Route("/v1/models/{model:path}", guarded(self._model)),
                Route("/tokenize", guarded(self._tokenize), methods=["POST"]),
                Route(CHAT, guarded(self._answer), methods=["POST"]),
                Route(COMPLETION, guarded(self._answer), methods=["POST"]),
                Route(MESSAGES, guarded(partial(self._speak, _ANTHROPIC)), methods=["POST"]),
                Route(COUNT_TOKENS, guarded(self._count), methods=["POST"]),
                Route(RESPONSES, guarded(partial(self._speak, _RESPONSES)), methods=["POST"]),
            ],
            exception_handlers=HANDLERS,
        )
        if self._settings.origins:
            found.add_middleware(
                CORSMiddleware, allow_origins=self._settings.origins, allow_methods=["*"], allow_headers=["*"]
            )
        return found

    # ---- what is asked

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
        return body

    def _model_of(self, body: dict[str, Any]) -> ServedModel:
        name = body.get("model")
        found = self._catalogue.first if name is None else self._catalogue.find(name) if isinstance(name, str) else None
        if found is None:
            names = ", ".join(self._catalogue.names)
            raise HTTPException(404, f"the model {name!r} does not exist; this server has {names}")
        return found

    async def _submit(self, prompt: list[int], sampling: Sequence[SamplingParams], model: ServedModel) -> list[Answer]:
        """Ask for all or nothing. A model that isn't loaded and wouldn't fit is refused while the present one stays."""
        if model.name != self._front.model and self._front.machines:
            await self._catalogue.plan(model, self._front.machines)
        answers: list[Answer] = []
        try:
            for one in sampling:
                answers.append(self._front.submit(prompt, one, model.name))
        except UserError:
            for answer in answers:
                self._front.abort(answer)
            raise
        return answers

    # ---- the endpoints

    async def _health(self, _: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _ready(self, request: Request) -> Response:
        front = self._front
        status = front.status()
        if front.about is not None and self._access.has_key(request):  # hosts and memory are nobody else's business
            status |= {"model": front.model, "max_context": front.about.max_context, "ranks": front.about.ranks}
            status |= {"now": front.beat.get("ranks", []), "silent_hosts": front.silent_hosts}
        return JSONResponse(status, 200 if front.is_ready else 503)

    async def _show_metrics(self, _: Request) -> Response:
        return Response(generate_latest(self._metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def _describe(self, _: Request) -> Response:
        return JSONResponse(openapi_object(self._catalogue.names))

    async def _load_model(self, request: Request) -> Response:
        """Hot-swap: answered when the model is there."""
        model = self._model_of(await self._body(request))
        if self._front.machines:
            await self._catalogue.plan(model, self._front.machines)
        await _unless_gone(request, asyncio.ensure_future(self._front.load(model.name)))
        return JSONResponse({"model": model.name, "state": self._front.state})

    async def _models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_model_object(name) for name in self._catalogue.names]})

    async def _model(self, request: Request) -> Response:
        return JSONResponse(_model_object(self._model_of({"model": request.path_params["model"]}).name))

    async def _tokenize(self, request: Request) -> Response:
        body = await self._body(request)
        model = self._model_of(body)
        url = CHAT if "messages" in body else COMPLETION
        given = {name: body[name] for name in ("messages", "prompt") if name in body}
        tokens, _ = await self._prepare(read_body(url, given, model.defaults), model)
        return JSONResponse({"tokens": tokens, "count": len(tokens)})

    async def _count(self, request: Request) -> Response:
        """Anthropic's /tokenize."""
        body = await self._body(request)
        model = self._model_of(body)
        tokens, _ = await self._prepare(count_body(body, model.defaults), model)
        return JSONResponse({"input_tokens": len(tokens)})

    async def _prepare(self, asked: Asked, model: ServedModel) -> tuple[list[int], SamplingParams]:
        """Tokens of the prompt, and how they are to be answered."""
        if model.arguments.modes:
            asked = asked.within(await asyncio.to_thread(lambda: model.modes))
        system = [{"role": "system", "content": model.system_prompt}] if model.system_prompt else []
        return await asyncio.to_thread(lambda: asked.prepare(model.tokenizer, model.chat_format, system))

    async def _answer(self, request: Request) -> Response:
        self._access.count_request(request)
        body = await self._body(request)
        model = self._model_of(body)
        is_stream = _boolean(body.pop("stream", None), "stream")
        wants_usage = _wants_usage(body.get("stream_options"), is_stream)
        count = body.pop("n", None)
        count = 1 if count is None else count
        if type(count) is not int or not 1 <= count <= _MOST_CHOICES:
            raise UserError(f"n must be a whole number from 1 to {_MOST_CHOICES}, not {count!r}")
        asked = read_body(request.url.path, body, model.defaults)
        prompt, once = await self._prepare(asked, model)
        sampling = [replace(once, seed=None if once.seed is None else once.seed + index) for index in range(count)]
        answers = await self._submit(prompt, sampling, model)
        name = f"{'chatcmpl' if asked.url == CHAT else 'cmpl'}-{secrets.token_hex(12)}"
        end = partial(self._end, request, name, asked, answers, model)
        choices = [Choice(asked, prompt, model.tokenizer) for _ in answers]
        if is_stream:
            chunks = _chunks(asked, model.name, name, answers, choices, wants_usage)
            return EventStream(chunks, end, partial(self._front.why_waiting, model.name))
        try:
            found = await _unless_gone(request, asyncio.gather(*(_all(answer) for answer in answers)))
        finally:
            end()
        for choice, outputs in zip(choices, found, strict=True):
            for output in outputs:
                choice.take(output)
        return JSONResponse(answer_object(model.name, name, choices))

    async def _speak(self, dialect: _Dialect, request: Request) -> Response:
        """One answer, in the words of another API."""
        self._access.count_request(request)
        body = await self._body(request)
        model = self._model_of(body)
        is_stream = _boolean(body.pop("stream", None), "stream")
        asked = dialect.read(body, model.defaults)
        prompt, sampling = await self._prepare(asked, model)
        answers = await self._submit(prompt, [sampling], model)
        name = f"{dialect.prefix}_{secrets.token_hex(12)}"
        written = dialect.answer(asked, model.name, name, prompt, model.tokenizer)
        end = partial(self._end, request, name, asked, answers, model)
        if is_stream:
            events = written.events(answers[0].outputs())
            return EventStream(events, end, partial(self._front.why_waiting, model.name))
        try:
            (outputs,) = await _unless_gone(request, asyncio.gather(_all(answers[0])))
        finally:
            end()
        return JSONResponse(written.whole(outputs))

    def _end(self, request: Request, name: str, asked: Asked, answers: Sequence[Answer], model: ServedModel) -> None:
        """A request has ended, or its client has gone away: free its places, count it, and write it down."""
        for answer in answers:
            self._front.abort(answer)
        made = sum(len(answer.timings.token_ids) for answer in answers)
        self._access.count_tokens(request, len(answers[0].request.prompt) + made)
        request.state.answered = Answered(name, model.name, answers)
        if self._audit is None:
            return
        key = key_of(request)
        given = {k: v for k, v in asdict(asked.sampling).items() if v != getattr(model.defaults, k)}
        prompt = model.tokenizer.decode(answers[0].request.prompt)
        record: dict[str, Any] = {
            "id": name,
            "key": key_id(key) if key else None,
            "model": model.name,
            "endpoint": request.url.path,
            "parameters": given,
            "prompt_tokens": len(answers[0].request.prompt),
            "prompt_digest": digest(prompt),
            "choices": [],
        }
        for answer in answers:
            text = model.tokenizer.decode(answer.timings.token_ids)
            choice = {"tokens": len(answer.timings.token_ids), "outcome": answer.outcome, "digest": digest(text)}
            record["choices"].append({**choice, **({"text": text} if self._audit.has_text else {})})
        if self._audit.has_text:
            record["prompt"] = prompt
        self._audit.write(record)


def _model_object(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "hippo-mpi"}


async def _all(answer: Answer) -> list[RequestOutput]:
    return [output async for output in answer.outputs()]


async def _chunks(
    asked: Asked,
    model: str,
    name: str,
    answers: Sequence[Answer],
    choices: Sequence[Choice],
    wants_usage: bool,
) -> AsyncIterator[bytes]:
    """Server-sent events: every output as it comes, whichever choice it is of."""
    told: asyncio.Queue[tuple[int, RequestOutput | UserError | RankError]] = asyncio.Queue()
    tasks = [asyncio.ensure_future(_pass_on(index, answer, told)) for index, answer in enumerate(answers)]
    try:
        for index in range(len(answers)):
            yield _event(chunk_object(asked, model, name, index, first_fields(asked)))
        running = len(answers)
        while running:
            index, output = await told.get()
            if isinstance(output, Exception):
                yield _event(error_of(output))
                return
            yield _event(chunk_object(asked, model, name, index, choices[index].take(output)))
            running -= output.finish_reason is not None
        if wants_usage:
            yield _event(usage_chunk(asked, model, name, choices))
        yield b"data: [DONE]\n\n"
    finally:  # also when the client has gone away
        for task in tasks:
            task.cancel()


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
