"""Reading requests: the body, within limits, and the model that it names; and working only while the client waits."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from hippo_mpi.engine.grammar_check import MAX_SCHEMA_BYTES
from hippo_mpi.errors import UserError
from hippo_mpi.serving.supervision.catalogue import Catalogue, ServedModel
from hippo_mpi.transport.processes import give_way

_T = TypeVar("_T")
_LONG_BODY_BYTES = 1 << 16
_MAX_DEPTH = 200  # of a body; templates and json.dumps recurse, too, and fail at depths that json.loads still accepts
_TOO_DEEP = f"the body is nested more than {_MAX_DEPTH} levels deep"


@dataclass(frozen=True)
class ApiSettings:
    """The settings and limits of the API.

    Args:
        max_body_bytes: of a request's body.
        body_timeout_s: for a body to arrive.
        max_choices: answers to all prompts of a request.
        max_schema_bytes: of the schemas in a body.
        origins: of web pages that may send requests (CORS).
        hosts: names that the Host header may have; none: any.
        needs_audit: whether requests are refused while the audit log can't be written.
        has_keys: whether clients need a key: then only its key may fetch an answer.
        keep_answers_s: as `stored_s` of `Keeping`.
        reconnect_s: as in `Keeping`.
    """

    max_body_bytes: int = 4 << 20
    body_timeout_s: float = 30.0
    max_choices: int = 128
    max_schema_bytes: int = MAX_SCHEMA_BYTES
    origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    needs_audit: bool = False
    has_keys: bool = False
    keep_answers_s: float = 0.0
    reconnect_s: float = 0.0


async def read_json(request: Request, settings: ApiSettings) -> dict[str, Any]:
    """Return the JSON object in a request's body.

    Raises:
        HTTPException: the body is too large, or too slow.
        UserError: it isn't a JSON object, or is nested too deeply.
        ClientDisconnect: the client went away.
    """
    data = b""
    try:
        async with asyncio.timeout(settings.body_timeout_s):
            async for piece in request.stream():
                data += piece
                if len(data) > settings.max_body_bytes:
                    raise HTTPException(413, f"the body is larger than {settings.max_body_bytes:,} bytes")
    except TimeoutError:
        raise HTTPException(408, f"the body took longer than {settings.body_timeout_s:.0f} s") from None
    try:
        text = data.decode("utf-8-sig")  # json itself would take halves of surrogate pairs, and UTF-16
        body = json.loads(text)
        if "\\u" in text:
            json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise UserError("unpaired surrogate in a string of the body") from None
    except ValueError:
        raise UserError("the body is not JSON in UTF-8") from None
    except RecursionError:
        raise UserError(_TOO_DEEP) from None
    if not isinstance(body, dict):
        raise UserError("the body must be a JSON object")
    if data.count(b"[") + data.count(b"{") > _MAX_DEPTH and _is_deeper(body, _MAX_DEPTH):
        raise UserError(_TOO_DEEP)
    return body


def _is_deeper(value: dict[str, Any] | list[Any], depth: int) -> bool:
    """Return True if lists and objects are nested more than `depth` deep."""
    level = [value]
    for _ in range(depth):
        insides = (one.values() if isinstance(one, dict) else one for one in level)
        level = [one for inside in insides for one in inside if isinstance(one, (dict, list))]
    return bool(level)


def model_of(catalogue: Catalogue, body: dict[str, Any]) -> ServedModel:
    """Return the model that a body names, the first of the catalogue if it names none.

    Raises:
        HTTPException: there is no such model.
    """
    name = body.get("model")
    model = catalogue.first if name is None else catalogue.find(name) if isinstance(name, str) else None
    if model is None:
        names = ", ".join(catalogue.names)
        raise HTTPException(404, f"the model {name!r} does not exist; this server has {names}")
    return model


async def unless_gone(request: Request, wanted: asyncio.Future[_T]) -> _T:
    """Wait for a future and return its result; cancel it if the client goes away.

    Raises:
        ClientDisconnect: the client went away.
    """

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
        with contextlib.suppress(asyncio.CancelledError, Exception):  # else asyncio logs an unretrieved exception
            await wanted


class Tokenizing:
    """Threads that tokenize prompts beside the event loop: a single one for long prompts, one after another.

    A long prompt takes a core for seconds, while ranks of this machine compute; and hundreds of bytes for each token,
    which glibc would keep, in a separate heap for each thread.
    """

    def __init__(self) -> None:
        self._for_long = ThreadPoolExecutor(1, "hippo-tokenizing", give_way)

    async def run(self, request: Request, work: Callable[[], _T]) -> _T:
        """Run `work` in a thread and return its result; the request's content-length decides in which.

        Raises:
            ClientDisconnect: the client of a long request went away meanwhile.
        """
        if int(request.headers.get("content-length", _LONG_BODY_BYTES)) < _LONG_BODY_BYTES:
            return await asyncio.to_thread(work)
        begun = self._for_long.submit(_without_leftovers, work)
        try:
            return await unless_gone(request, asyncio.wrap_future(begun))
        finally:
            begun.cancel()  # directly: cancelling the wrapped future reaches it only later, when it may be running


def _without_leftovers(work: Callable[[], _T]) -> _T:
    """Run `work`, and return the memory that it has freed to the system, which only glibc doesn't do by itself."""
    try:
        return work()
    finally:
        if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):
            ctypes.CDLL(None).malloc_trim(0)
