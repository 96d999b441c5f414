"""The HTTP side: OpenAI's endpoints, and Anthropic's, over a Front. Starlette does the protocol.

Knows bodies and answers. Must not know how ranks are started.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from hippo_mpi.engine.request import RequestOutput, SamplingParams
from hippo_mpi.errors import FieldError, UserError
from hippo_mpi.serving.api.about_endpoints import AboutEndpoints
from hippo_mpi.serving.api.access import Access
from hippo_mpi.serving.api.audit_log import AuditLog, digest, key_id
from hippo_mpi.serving.api.completion_stream import StreamOptions, completion_chunks
from hippo_mpi.serving.api.event_stream import EventStream
from hippo_mpi.serving.api.http_errors import HANDLERS
from hippo_mpi.serving.api.metrics import Metrics
from hippo_mpi.serving.api.request_bodies import ApiSettings, model_of, read_json, unless_gone
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

_MOST_CHOICES = 16
_MOST_ANSWERS = 128  # to all prompts of a request


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
        self._settings, self._audit = settings, audit
        self._about = AboutEndpoints(front, catalogue, access, metrics)

    def app(self) -> Starlette:
        def guarded(endpoint: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
            async def call(request: Request) -> Response:
                self._access.check_key(request)
                return await endpoint(request)

            return call

        about = self._about
        found = Starlette(
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

    async def _submit(self, asked: Sequence[tuple[list[int], SamplingParams]], model: ServedModel) -> list[Answer]:
        """Ask for all or nothing. A model that isn't loaded and wouldn't fit is refused while the present one stays."""
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

    async def _load_model(self, request: Request) -> Response:
        """Hot-swap: answered when the model is there."""
        model = model_of(self._catalogue, await read_json(request, self._settings))
        if self._front.machines:
            await self._catalogue.plan(model, self._front.machines)
        await unless_gone(request, asyncio.ensure_future(self._front.load(model.name)))
        return JSONResponse({"model": model.name, "state": self._front.state})

    async def _tokenize(self, request: Request) -> Response:
        body = await read_json(request, self._settings)
        model = model_of(self._catalogue, body)
        asked = read_body(CHAT if "messages" in body else COMPLETION, body, model.defaults)
        tokens, _ = await self._prepare(asked, model)
        return JSONResponse({"tokens": tokens, "count": len(tokens)})

    async def _count(self, request: Request) -> Response:
        """Anthropic's /tokenize."""
        body = await read_json(request, self._settings)
        model = model_of(self._catalogue, body)
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
        body = await read_json(request, self._settings)
        model = model_of(self._catalogue, body)
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
            found = await unless_gone(request, asyncio.gather(*(_all(answer) for answer in answers)))
        finally:
            end()
        for choice, outputs in zip(choices, found, strict=True):
            for output in outputs:
                choice.take(output)
        return JSONResponse(answer_object(head, choices))

    async def _speak(self, dialect: _Dialect, request: Request) -> Response:
        """One answer, in the words of another API."""
        self._access.count_request(request)
        body = await read_json(request, self._settings)
        model = model_of(self._catalogue, body)
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
            (outputs,) = await unless_gone(request, asyncio.gather(_all(answers[0])))
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
        given = {k: v for k, v in asdict(asked.sampling).items() if v != getattr(model.defaults, k)}
        prompt = "".join(model.tokenizer.decode(prompt) for prompt in prompts)
        record: dict[str, Any] = {
            "id": name,
            "key": key_id(key) if key else None,
            "model": model.name,
            "endpoint": request.url.path,
            "parameters": given,
            "prompt_tokens": num_read,
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
