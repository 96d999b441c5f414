"""The HTTP API: OpenAI's and Anthropic's endpoints over a RequestBroker, on top of Starlette.

It knows bodies and answers, and must not know how ranks are started.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from hippo_mpi.engine.grammar_check import GrammarCheck
from hippo_mpi.engine.request import Request as EngineRequest
from hippo_mpi.engine.request import RequestOutput, SamplingParams
from hippo_mpi.errors import FieldError
from hippo_mpi.protocols.anthropic_messages import COUNT_TOKENS, count_body
from hippo_mpi.protocols.openai_requests import CHAT, COMPLETION, GenerationRequest, read_body
from hippo_mpi.serving.api.about_endpoints import AboutEndpoints
from hippo_mpi.serving.api.access import Access
from hippo_mpi.serving.api.audit_log import AuditLog, key_id
from hippo_mpi.serving.api.audit_record import EndedRequest, request_record
from hippo_mpi.serving.api.event_stream import EventStream, numbered
from hippo_mpi.serving.api.exchange import Exchange, Reader
from hippo_mpi.serving.api.exchanges import Exchanges, Keeping
from hippo_mpi.serving.api.gate import Gate
from hippo_mpi.serving.api.http_errors import HANDLERS
from hippo_mpi.serving.api.journal import Journal
from hippo_mpi.serving.api.journal_records import Record
from hippo_mpi.serving.api.kept_endpoints import KeptEndpoints
from hippo_mpi.serving.api.metrics import Metrics
from hippo_mpi.serving.api.questions import ID_PREFIXES, AnswerWriter, Question, read_question, response_of
from hippo_mpi.serving.api.request_bodies import ApiSettings, Tokenizing, model_of, read_json, unless_gone
from hippo_mpi.serving.api.request_ids import REQUEST_ID_HEADERS, RequestIds, request_id
from hippo_mpi.serving.api.request_log import Answered, RequestLog
from hippo_mpi.serving.supervision.catalogue import Catalogue, ServedModel
from hippo_mpi.serving.supervision.request_broker import RequestBroker


class Api:
    """The endpoints of a server.

    Args:
        broker: that answers requests.
        catalogue: the models to choose from.
        access: checks and counts requests.
        settings: limits of the API.
        metrics: what GET /metrics shows.
        audit: the log of ended requests; None: there is none.
        journal: keeps requests and answers; None: nothing is kept.
    """

    def __init__(
        self,
        broker: RequestBroker,
        catalogue: Catalogue,
        access: Access,
        settings: ApiSettings,
        metrics: Metrics,
        audit: AuditLog | None = None,
        journal: Journal | None = None,
    ) -> None:
        self._broker, self._catalogue, self._access = broker, catalogue, access
        self._settings, self._audit = settings, audit
        self._grammars = GrammarCheck(settings.max_schema_bytes)
        self._tokenizing = Tokenizing()
        self._about = AboutEndpoints(broker, catalogue, access, metrics)
        keeping = Keeping(settings.keep_answers_s, settings.reconnect_s)
        self.exchanges = Exchanges(broker, journal, keeping, self._write_audit)
        self._kept = KeptEndpoints(self.exchanges, catalogue, self._owner_of, self._stream)

    def start(self) -> None:
        """Resume the answers that the previous server has left; to be called in the event loop, before clients come."""
        self.exchanges.start(self._catalogue.names)

    def app(self) -> Starlette:
        """Return the ASGI application with all endpoints and middleware."""

        def guarded(endpoint: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
            async def call(request: Request) -> Response:
                self._access.check_key(request)
                return await endpoint(request)

            return call

        about, kept = self._about, self._kept
        answering = [Route(url, guarded(partial(self._answer, url)), methods=["POST"]) for url in ID_PREFIXES]
        application = Starlette(
            routes=[
                Route("/", about.introduce),
                Route("/health", about.health),
                Route("/ready", about.ready),
                Route("/metrics", guarded(about.metrics)),
                Route("/openapi.json", guarded(about.describe)),
                Route("/admin/model", guarded(self._load_model), methods=["POST"]),
                Route("/v1/models", guarded(about.models)),
                Route("/v1/models/{model:path}", guarded(about.model)),
                Route("/tokenize", guarded(self._tokenize), methods=["POST"]),
                Route(COUNT_TOKENS, guarded(self._count), methods=["POST"]),
                *answering,
                *kept.routes(guarded),
            ],
            exception_handlers=HANDLERS,
        )
        application.add_middleware(Gate, self._access, self._settings.hosts, self._settings.origins)
        if self._settings.origins:
            application.add_middleware(
                CORSMiddleware,
                allow_origins=self._settings.origins,
                allow_methods=["*"],
                allow_headers=["*"],
                expose_headers=REQUEST_ID_HEADERS,
            )
        application.add_middleware(RequestIds)
        application.add_middleware(RequestLog, key_of=self._access.key_of)
        return application

    # ---- the endpoints

    async def _load_model(self, request: Request) -> Response:
        """Load another model in place of the present one, and answer when it is ready."""
        self._access.check_admin(request)
        model = model_of(self._catalogue, await read_json(request, self._settings))
        await self._check_fits(model)
        await unless_gone(request, asyncio.ensure_future(self._broker.load(model.name)))
        return JSONResponse({"model": model.name, "state": self._broker.state})

    async def _tokenize(self, request: Request) -> Response:
        self._access.count_request(request)
        body = await read_json(request, self._settings)
        model = model_of(self._catalogue, body)
        asked = read_body(CHAT if "messages" in body else COMPLETION, body, model.defaults)
        tokens, _ = await self._prepare(request, asked, model)
        return JSONResponse({"tokens": tokens, "count": len(tokens)})

    async def _count(self, request: Request) -> Response:
        """Answer with the number of tokens of a prompt, in Anthropic's format."""
        self._access.count_request(request)
        body = await read_json(request, self._settings)
        model = model_of(self._catalogue, body)
        tokens, _ = await self._prepare(request, count_body(body, model.defaults), model)
        return JSONResponse({"input_tokens": len(tokens)})

    async def _answer(self, url: str, request: Request) -> Response:
        """Answer a request for text in the format of its endpoint."""
        self._access.count_request(request)
        body = await read_json(request, self._settings)
        model = model_of(self._catalogue, body)
        salt = self._access.cache_salt(request, body)
        question = read_question(url, body, model.defaults, self.exchanges.can_keep)
        if self._settings.needs_audit and self._audit and not self._audit.is_writable():
            raise HTTPException(503, "the audit log can't be written, and this server requires it (--audit-required)")
        total = self._num_answers(request, question)
        record = await self._record(request, url, body, question, model, salt)
        if model.name != self._broker.model:
            self._access.check_admin(request)
            await self._check_fits(model)
        writer = question.writer(record, model.tokenizer)
        self._access.take_places(request, total - 1)  # the Gate has taken one
        self._access.hold_places(request)
        try:
            exchange = await self.exchanges.open(record, partial(self._note_over, request))
        except BaseException:
            self._access.free_places(request)
            raise
        if question.is_stream:
            reader = self.exchanges.reader(exchange)
            return self._stream(exchange, reader, writer, -1, partial(self._note_left, request, exchange))
        if question.is_background:
            return JSONResponse(response_of(question, exchange.record, model.tokenizer).so_far([]))
        with self.exchanges.reader(exchange) as reader:
            try:
                outputs = await unless_gone(request, asyncio.ensure_future(_all(reader)))
            finally:
                self._note_left(request, exchange)
        return JSONResponse(writer.whole(outputs))

    # ---- what they share

    def _num_answers(self, request: Request, question: Question) -> int:
        """Return how many answers a request asks for.

        Raises:
            FieldError: more than there may be at once.
        """
        total, limit = question.num_choices * len(question.every), self._settings.max_choices
        field, what = ("n", "n") if len(question.every) == 1 else ("prompt", "n times the number of prompts")
        if total > limit:
            raise FieldError(field, f"{what} is at most {limit} (--max-choices), not {total}")
        self._access.check_choices(request, field, total)
        return total

    async def _check_fits(self, model: ServedModel) -> None:
        """Raise a UserError for a model that doesn't fit these machines, while the present one still runs."""
        if self._broker.machines:
            await self._catalogue.beside(partial(model.plan, self._broker.machines))

    async def _prepare(
        self, request: Request, asked: GenerationRequest, model: ServedModel
    ) -> tuple[list[int], SamplingParams]:
        """Return the prompt's tokens and the sampling parameters with which to answer them."""
        if model.options.modes:
            asked = asked.within(await asyncio.to_thread(lambda: model.modes))
        system = [{"role": "system", "content": model.system_prompt}] if model.system_prompt else []
        prompt, sampling = await self._tokenizing.run(
            request, lambda: asked.prepare(model.tokenizer, model.chat_format, system)
        )
        for field, grammar in asked.grammars(sampling):
            await unless_gone(request, asyncio.ensure_future(self._grammars.check_beside(field, grammar)))
        return prompt, sampling

    async def _record(
        self, request: Request, url: str, body: dict[str, Any], question: Question, model: ServedModel, salt: str
    ) -> Record:
        """Return the record of a request, with a seed for each of its answers."""
        prepared = [await self._prepare(request, asked, model) for asked in question.every]
        asked_once = [
            (prompt, replace(once, seed=secrets.randbits(63) if once.seed is None else once.seed + index))
            for prompt, once in prepared
            for index in range(question.num_choices)
        ]
        return Record(
            id=f"{ID_PREFIXES[url]}{request_id(request)}",
            owner=self._owner_of(request),
            key=key_id(key) if (key := self._access.key_of(request)) else None,
            url=url,
            model=model.name,
            created=int(time.time()),
            body=body,
            requests=[EngineRequest(index, *once, cache_salt=salt) for index, once in enumerate(asked_once)],
            is_stream=question.is_stream,
            is_stored=question.is_stored,
            is_background=question.is_background,
        )

    def _owner_of(self, request: Request) -> str:
        """Return the key id that may fetch an answer later; "" if the server needs no keys, and its id is enough."""
        return key_id(self._access.key_of(request)) if self._settings.has_keys else ""

    def _stream(
        self, exchange: Exchange, reader: Reader, writer: AnswerWriter, after: int, end: Callable[[], None]
    ) -> Response:
        """Stream the events of an answer after the one numbered `after`; `end` is called when the stream has ended."""
        events = writer.events(reader.outputs())
        if exchange.journal is not None:
            events = numbered(events, after, lambda: reader.is_cut)
        reader.__enter__()

        def leave() -> None:
            reader.__exit__(None, None, None)
            end()

        return EventStream(events, leave, partial(self._broker.why_waiting, exchange.record.model))

    def _note_left(self, request: Request, exchange: Exchange) -> None:
        """Leave a request's answers for the request log, when its client has them or has gone away."""
        record, answers = exchange.record, list(exchange.answers.values())
        request.state.answered = Answered(record.id, record.model, answers)

    def _note_over(self, request: Request, num_tokens: int) -> None:
        """Free the place and count the tokens of a request whose answers have ended, even after it did."""
        self._access.free_places(request)
        self._access.count_tokens(request, num_tokens)

    def _write_audit(self, exchange: Exchange) -> None:
        """Write the audit record of an exchange whose answers have ended."""
        model = self._catalogue.find(exchange.record.model)
        if self._audit is None or model is None:
            return
        record = exchange.record
        question = read_question(record.url, record.body, model.defaults, self.exchanges.can_keep)
        # With echo, a prompt's tokens after its first are forced as the answer's beginning: they count as prompt.
        given = {id(one.prompt): [*one.prompt, *one.sampling.forced] for one in record.requests}
        answers = []
        for index, one in enumerate(record.requests):
            tokens = [told.token for told in exchange.outputs_of(index) if told.token is not None]
            answers.append((tokens[len(one.sampling.forced) :], exchange.outcome_of(index)))
        ended = EndedRequest(
            record.id, record.key, record.url, question.every[0].sampling, list(given.values()), answers
        )
        self._audit.write(request_record(self._audit, ended, model))


async def _all(reader: Reader) -> list[tuple[int, RequestOutput]]:
    return [output async for output in reader.outputs()]
