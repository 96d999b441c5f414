"""Endpoints for earlier requests: an answer, or the rest of its stream, by its id, as long as it is kept."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from hippo_mpi.errors import FieldError, HippoError, UserError
from hippo_mpi.protocols.anthropic_messages import MESSAGES, messages_error
from hippo_mpi.protocols.openai_answers import error_object
from hippo_mpi.protocols.openai_requests import CHAT
from hippo_mpi.protocols.openai_responses import RESPONSES
from hippo_mpi.serving.api.exchange import Exchange, Reader
from hippo_mpi.serving.api.exchanges import Exchanges
from hippo_mpi.serving.api.questions import ID_PREFIXES, AnswerWriter, Question, read_question, response_of
from hippo_mpi.serving.api.request_bodies import unless_gone
from hippo_mpi.serving.supervision.catalogue import Catalogue, ServedModel

_Endpoint = Callable[[Request], Awaitable[Response]]
_StreamOf = Callable[[Exchange, Reader, AnswerWriter, int, Callable[[], None]], Response]
_LAST_EVENT = "last-event-id"


class _NotKept(HippoError):
    """An answer that doesn't exist, or belongs to another key: clients don't learn which."""


class KeptEndpoints:
    """GET and DELETE of answers that were requested with POST, and the cancellation of those in the background.

    Args:
        exchanges: that have the answers.
        catalogue: of the models.
        owner_of: returns the key id of a request.
        stream: returns a response with the events of an exchange, for a reader, after the event with this number; the
            last argument is called at their end.
    """

    def __init__(
        self,
        exchanges: Exchanges,
        catalogue: Catalogue,
        owner_of: Callable[[Request], str],
        stream: _StreamOf,
    ) -> None:
        self._exchanges, self._catalogue, self._owner_of, self._stream = exchanges, catalogue, owner_of, stream

    def routes(self, guarded: Callable[[_Endpoint], _Endpoint]) -> list[Route]:
        """Return the routes; `guarded` wraps an endpoint in a check of the API key."""

        def named(url: str, work: Callable[[Request, Exchange], Awaitable[Response]]) -> _Endpoint:
            async def call(request: Request) -> Response:
                try:
                    return await work(request, await self._find(url, request))
                except _NotKept as error:
                    body = error_object(str(error), "invalid_request_error", "not_found")
                    return JSONResponse(messages_error(error, "not_found_error") if url == MESSAGES else body, 404)

            return guarded(call)

        routes = [Route(f"{RESPONSES}/{{id}}/cancel", named(RESPONSES, self._cancel), methods=["POST"])]
        for url in ID_PREFIXES:
            routes.append(Route(f"{url}/{{id}}", named(url, self._get)))
            routes.append(Route(f"{url}/{{id}}", named(url, self._delete), methods=["DELETE"]))
        return routes

    async def _find(self, url: str, request: Request) -> Exchange:
        name = request.path_params["id"]
        exchange = await self._exchanges.find(name, self._owner_of(request))
        if exchange is None or exchange.record.url != url or self._catalogue.find(exchange.record.model) is None:
            why = "it may have expired" if self._exchanges.can_keep else "this server keeps none without --journal"
            raise _NotKept(f"no answer with id {name[:80]!r}: {why}")
        return exchange

    async def _get(self, request: Request, exchange: Exchange) -> Response:
        """Return the answer, or with `stream=true` its events after `starting_after` or Last-Event-ID."""
        question, model = await self._question(exchange)
        after = _starting_after(request)
        reader = self._exchanges.reader(exchange)
        if after is not None:
            writer = question.writer(exchange.record, model.tokenizer)
            return self._stream(exchange, reader, writer, after, lambda: None)
        if question.url == RESPONSES:
            return JSONResponse(_response(question, exchange, reader, model))
        with reader:
            outputs = await unless_gone(request, asyncio.ensure_future(_all(reader)))
        return JSONResponse(question.writer(exchange.record, model.tokenizer).whole(outputs))

    async def _delete(self, _: Request, exchange: Exchange) -> Response:
        await self._exchanges.delete(exchange)
        name, url = exchange.record.id, exchange.record.url
        kind = "chat.completion.deleted" if url == CHAT else "response" if url == RESPONSES else "deleted"
        return JSONResponse({"id": name, "object": kind, "deleted": True})

    async def _cancel(self, request: Request, exchange: Exchange) -> Response:
        if not exchange.record.is_background:
            raise UserError("only background responses can be cancelled: others end when their client disconnects")
        self._exchanges.abort(exchange)
        await exchange.settle()
        question, model = await self._question(exchange)
        return JSONResponse(_response(question, exchange, self._exchanges.reader(exchange), model))

    async def _question(self, exchange: Exchange) -> tuple[Question, ServedModel]:
        record = exchange.record
        model = self._catalogue.find(record.model)
        assert model is not None  # _find has checked that
        await asyncio.to_thread(lambda: model.tokenizer)  # loads it, if it isn't yet, beside the event loop
        return read_question(record.url, record.body, model.defaults, self._exchanges.can_keep), model


def _response(question: Question, exchange: Exchange, reader: Reader, model: ServedModel) -> dict[str, Any]:
    """Return the response object of an answer in its present state."""
    response = response_of(question, exchange.record, model.tokenizer)
    try:
        outputs = [output for _, output in reader.outputs_so_far()]
    except HippoError as error:
        return response.failed(error)
    return response.whole(outputs) if outputs and outputs[-1].finish_reason else response.so_far(outputs)


def _starting_after(request: Request) -> int | None:
    """Return the number of the last event that a client has, or -1 for none; None: it doesn't want events."""
    query, last = request.query_params, request.headers.get(_LAST_EVENT)
    wants_stream = query.get("stream", "false")
    if wants_stream not in ("true", "false"):
        raise FieldError("stream", f"stream must be true or false, not {wants_stream!r}")
    given = query.get("starting_after", last)
    if wants_stream == "false" and last is None:
        if "starting_after" in query:
            raise FieldError("starting_after", "starting_after needs stream=true")
        return None
    if given is None:
        return -1
    if not given.isdecimal() or len(given) > 9:
        raise FieldError("starting_after", f"starting_after must be the number of an event, not {given[:80]!r}")
    return int(given)


async def _all(reader: Reader) -> list[Any]:
    return [output async for output in reader.outputs()]
