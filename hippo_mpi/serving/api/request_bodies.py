"""What comes with a request: its body, within limits, the model that it names, and whether its client is still there."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from hippo_mpi.engine.grammar_check import MAX_SCHEMA_BYTES
from hippo_mpi.errors import UserError
from hippo_mpi.serving.supervision.catalogue import Catalogue, ServedModel

_T = TypeVar("_T")
_LONG_BODY_BYTES = 1 << 16
_MAX_DEPTH = 200  # of a body; templates and json.dumps recurse, and would fail of one that json.loads just bears
_TOO_DEEP = f"the body is nested more than {_MAX_DEPTH} deep"
_NICE = 10


@dataclass(frozen=True)
class ApiSettings:
    """What the API allows.

    Args:
        max_body_bytes, body_timeout_s, max_schema_bytes: of a request's body.
        max_choices: answers to all prompts of a request.
        origins: of pages in browsers that may ask (CORS).
        hosts: names that the server may be called by; none: any.
        needs_audit: whether requests are refused while they can't be written down.
        has_keys: whether clients need a key: then an answer is its key's alone.
        keep_answers_s, reconnect_s: as in `Keeping`.
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
        HTTPException: it is too large, or too slow.
        UserError: it is none.
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
        body = json.loads(data)
        if b"\\u" in data:
            json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise UserError("half of a surrogate pair in a text") from None
    except ValueError:
        raise UserError("the body is not JSON") from None
    except RecursionError:
        raise UserError(_TOO_DEEP) from None
    if not isinstance(body, dict):
        raise UserError("the body must be a JSON object")
    if data.count(b"[") + data.count(b"{") > _MAX_DEPTH and _is_deeper(body, _MAX_DEPTH):
        raise UserError(_TOO_DEEP)
    return body


def _is_deeper(found: dict[str, Any] | list[Any], depth: int) -> bool:
    """True if lists and objects are nested more than so many deep."""
    level = [found]
    for _ in range(depth):
        insides = (one.values() if isinstance(one, dict) else one for one in level)
        level = [one for inside in insides for one in inside if isinstance(one, (dict, list))]
    return bool(level)


def model_of(catalogue: Catalogue, body: dict[str, Any]) -> ServedModel:
    """Return the model that a body names; the first if it names none."""
    name = body.get("model")
    found = catalogue.first if name is None else catalogue.find(name) if isinstance(name, str) else None
    if found is None:
        names = ", ".join(catalogue.names)
        raise HTTPException(404, f"the model {name!r} does not exist; this server has {names}")
    return found


async def unless_gone(request: Request, wanted: asyncio.Future[_T]) -> _T:
    """Wait for an answer as long as the client does.

    Raises:
        ClientDisconnect: it has gone away.
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
        with contextlib.suppress(asyncio.CancelledError, Exception):  # it is looked at, or asyncio complains
            await wanted


class Tokenizing:
    """Does what takes a while for a prompt beside the event loop: for long ones in one thread, one after another.

    Each takes a core for seconds, and ranks of this machine compute meanwhile; and hundreds of bytes for a token, which
    glibc would keep, in a heap for each thread.
    """

    def __init__(self) -> None:
        self._for_long = ThreadPoolExecutor(1, "hippo-tokenizing", _give_way)

    async def run(self, request: Request, work: Callable[[], _T]) -> _T:
        """Return what `work` returns, for a request whose headers tell how long its body is.

        Raises:
            ClientDisconnect: the client of a long one has gone away meanwhile.
        """
        if int(request.headers.get("content-length", _LONG_BODY_BYTES)) < _LONG_BODY_BYTES:
            return await asyncio.to_thread(work)
        begun = self._for_long.submit(_without_leftovers, work)
        try:
            return await unless_gone(request, asyncio.wrap_future(begun))
        finally:
            begun.cancel()  # at once: a wrapped future's end is passed on later, when the thread may have taken it up


def _give_way() -> None:
    """Let ranks have the cores before this thread, where threads have priorities of their own."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)


def _without_leftovers(work: Callable[[], _T]) -> _T:
    """Return what `work` returns, and what it has freed to the system; other C libraries than glibc do so by themselves."""
    try:
        return work()
    finally:
        if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):
            ctypes.CDLL(None).malloc_trim(0)
