"""The HTTP side: OpenAI's endpoints, and Anthropic's, over a Front. Starlette does the protocol.

Knows bodies and answers. Must not know how ranks are started.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from typing import Any, TypeVar

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from hippo_mpi.engine.request import RequestOutput, SamplingParams
from hippo_mpi.errors import FieldError, UserError
from hippo_mpi.serving.api.access import Access
from hippo_mpi.serving.api.audit_log import AuditLog, key_id
from hippo_mpi.serving.api.audit_record import EndedRequest, request_record
from hippo_mpi.serving.api.completion_stream import StreamOptions, completion_chunks
from hippo_mpi.serving.api.event_stream import EventStream
from hippo_mpi.serving.api.http_errors import HANDLERS
from hippo_mpi.serving.api.metrics import Metrics
from hippo_mpi.serving.api.openapi import openapi_object
from hippo_mpi.serving.api.request_ids import REQUEST_ID_HEADERS, RequestIds, request_id
from hippo_mpi.serving.api.request_log import Answered, RequestLog
from hippo_mpi.serving.protocols.anthropic_messages import (
    COUNT_TOKENS,
    MESSAGES,
    MessageAnswer,
    count_body,
    read_messages_body,
)
from hippo_mpi.serving.protocols.openai_answers import AnswerHead, Choice, answer_object
from hippo_mpi.serving.protocols.openai_requests import CHAT, COMPLETION, Asked, read_body, read_prompts
from hippo_mpi.serving.protocols.openai_responses import RESPONSES, ResponseAnswer, read_responses_body
from hippo_mpi.serving.protocols.openai_sampling import boolean
from hippo_mpi.serving.supervision.catalogue import Catalogue, ServedModel
from hippo_mpi.serving.supervision.front import Answer, Front

_T = TypeVar("_T")
_MOST_CHOICES = 16
_MOST_ANSWERS = 128  # to all prompts of a request


@dataclass(frozen=True)
class ApiSettings:
    """What the API allows.

    Args:
        max_body_bytes, body_timeout_s: of a request's body.
        origins: of pages in browsers that may ask (CORS).
        needs_audit: whether requests are refused while they can't be written down.
    """

    max_body_bytes: int = 4 << 20
    body_timeout_s: float = 30.0
    origins: tuple[str, ...] = ()
    needs_audit: bool = False


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
        self._started = datetime.now(UTC)

    def app(self) -> Starlette:
        def guarded(endpoint: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
            async def call(request: Request) -> Response:
                self._access.check_key(request)
                return await endpoint(request)

            return call

        found = Starlette(
            routes=[
                Route("/", self._introduce),
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
                CORSMiddleware,
                allow_origins=self._settings.origins,
                allow_methods=["*"],
                allow_headers=["*"],
                expose_headers=REQUEST_ID_HEADERS,
            )
        found.add_middleware(RequestIds)
        found.add_middleware(RequestLog, key_of=self._access.key_of)
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

    async def _submit(self, asked: Sequence[tuple[list[int], SamplingParams]], model: ServedModel) -> list[Answer]:
        """Ask for all or nothing. A model that isn't loaded and wouldn't fit is refused while the present one stays."""
        if self._settings.needs_audit and self._audit and not self._audit.is_writable():
            raise HTTPException(503, "the audit log can't be written, and this server answers nothing without it")
        if model.name != self._front.model and self._front.machines:
            await self._catalogue.plan(model, self._front.machines)
        answers: list[Answer] = []
        try:
            for prompt, sampling in asked:
                answers.append(self._front.submit(prompt, sampling, model.name))
        except UserError:
            for answer in answers:
                self._front.abort(answer)
            raise
        return answers

    # ---- the endpoints

    async def _introduce(self, _: Request) -> Response:
        """Say what this is, to whom looks whether it is there."""
        found = {"name": "Hippo MPI", "version": version("hippo-mpi"), "api": "/v1", "openapi": "/openapi.json"}
        return JSONResponse(found)

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
        """The catalogue, as OpenAI's and as Anthropic's clients read it."""
        found = [self._model_object(name) for name in self._catalogue.names]
        ends = {"has_more": False, "first_id": found[0]["id"], "last_id": found[-1]["id"]}
        return JSONResponse({"object": "list", "data": found, **ends})

    async def _model(self, request: Request) -> Response:
        return JSONResponse(self._model_object(self._model_of({"model": request.path_params["model"]}).name))

    def _model_object(self, name: str) -> dict[str, Any]:
        about = (
            self._front.about if name == self._front.model else None
        )  # what isn't loaded may get less than it asks for
        return {
            "id": name,
            "object": "model",
            "type": "model",
            "display_name": name,
            "created": int(self._started.timestamp()),
            "created_at": self._started.isoformat(timespec="seconds"),
            "owned_by": "hippo-mpi",
            "max_model_len": about.max_context if about else None,
        }

    async def _tokenize(self, request: Request) -> Response:
        body = await self._body(request)
        model = self._model_of(body)
        asked = read_body(CHAT if "messages" in body else COMPLETION, body, model.defaults)
        tokens, _ = await self._prepare(asked, model)
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
        is_stream = _is_stream(body)
        options = StreamOptions.read(body.get("stream_options"), is_stream)
        count = _num_choices(body)
        every = read_prompts(request.url.path, body, model.defaults)
        if is_stream and every[0].echo:
            raise FieldError("echo", "echo must be false here, with stream: true")
        if count * len(every) > _MOST_ANSWERS:
            raise FieldError(
                "prompt", f"n times the number of prompts is at most {_MOST_ANSWERS}, not {count * len(every)}"
            )
        wanted = [(asked, *await self._prepare(asked, model)) for asked in every]
        asked_once = [
            (prompt, replace(once, seed=None if once.seed is None else once.seed + index))
            for _, prompt, once in wanted
            for index in range(count)
        ]
        answers = await self._submit(asked_once, model)
        url = request.url.path
        head = AnswerHead(url, model.name, f"{'chatcmpl' if url == CHAT else 'cmpl'}-{request_id(request)}")
        end = partial(self._end, request, head.id, every[0], answers, model)
        choices = [
            Choice(asked, prompt, model.tokenizer, len(once.forced))
            for asked, prompt, once in wanted
            for _ in range(count)
        ]
        if is_stream:
            chunks = completion_chunks(head, [answer.outputs() for answer in answers], choices, options)
            return EventStream(chunks, end, partial(self._front.why_waiting, model.name))
        try:
            found = await _unless_gone(request, asyncio.gather(*(_all(answer) for answer in answers)))
        finally:
            end()
        for choice, outputs in zip(choices, found, strict=True):
            for output in outputs:
                choice.take(output)
        return JSONResponse(answer_object(head, choices))

    async def _speak(self, dialect: _Dialect, request: Request) -> Response:
        """One answer, in the words of another API."""
        self._access.count_request(request)
        body = await self._body(request)
        model = self._model_of(body)
        is_stream = _is_stream(body)
        asked = dialect.read(body, model.defaults)
        prompt, sampling = await self._prepare(asked, model)
        answers = await self._submit([(prompt, sampling)], model)
        name = f"{dialect.prefix}_{request_id(request)}"
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
        prompts = list({id(answer.request.prompt): answer.request.prompt for answer in answers}.values())
        num_read = sum(map(len, prompts))
        self._access.count_tokens(request, num_read + made)
        request.state.answered = Answered(name, model.name, answers)
        if self._audit is None:
            return
        key = self._access.key_of(request)
        given = {id(one.request.prompt): [*one.request.prompt, *one.request.sampling.forced] for one in answers}
        told = [(one.timings.token_ids[len(one.request.sampling.forced) :], one.outcome) for one in answers]
        key_name, endpoint = key_id(key) if key else None, request.url.path
        ended = EndedRequest(name, key_name, endpoint, asked.sampling, list(given.values()), told)
        self._audit.write(request_record(self._audit, ended, model))


def _is_stream(body: dict[str, Any]) -> bool:
    """Whether the answer is to be streamed; taken out of the body."""
    value = body.pop("stream", None)
    return value is not None and boolean("stream", value)


def _num_choices(body: dict[str, Any]) -> int:
    """How many answers there are to be to each prompt; taken out of the body."""
    given = body.pop("n", None)
    count = 1 if given is None else given
    if type(count) is not int or not 1 <= count <= _MOST_CHOICES:
        raise FieldError("n", f"n must be a whole number from 1 to {_MOST_CHOICES}, not {count!r}")
    if body.get("best_of") == count:  # all of them are told, so nothing is to be chosen
        del body["best_of"]
    return count


async def _all(answer: Answer) -> list[RequestOutput]:
    return [output async for output in answer.outputs()]


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
