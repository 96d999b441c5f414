"""Endpoints about the server itself: its version, its state and its models.

They know the front and the catalogue, and must not know how requests are answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from msgspec import to_builtins
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from hippo_mpi.engine.request import SamplingParams
from hippo_mpi.serving.api.access import Access
from hippo_mpi.serving.api.metrics import Metrics
from hippo_mpi.serving.api.openapi import openapi_object
from hippo_mpi.serving.api.request_bodies import model_of
from hippo_mpi.serving.supervision.answer import Overloaded
from hippo_mpi.serving.supervision.catalogue import Catalogue
from hippo_mpi.serving.supervision.request_broker import RequestBroker

_DEEP_TIMEOUT_S = 10.0  # for a token to come
_POLL_INTERVAL_S = 0.02


class AboutEndpoints:
    """The endpoints, as methods from a request to its response."""

    def __init__(self, broker: RequestBroker, catalogue: Catalogue, access: Access, metrics: Metrics) -> None:
        self._broker, self._catalogue, self._access, self._metrics = broker, catalogue, access, metrics
        self._started = datetime.now(UTC)

    async def introduce(self, _: Request) -> Response:
        """Answer with the server's name and version, and where its API is."""
        introduction = {"name": "Hippo MPI", "version": version("hippo-mpi"), "api": "/v1", "openapi": "/openapi.json"}
        return JSONResponse(introduction)

    async def health(self, request: Request) -> Response:
        """Answer that this process lives; with `deep=1`, which needs a key, whether ranks generate tokens.

        Raises:
            HTTPException: `deep=1` comes without a key.
        """
        if request.query_params.get("deep", "0") in ("0", "false"):
            return JSONResponse({"status": "ok"})
        self._access.check_key(request)
        if why := await self._why_no_token():
            return JSONResponse({"status": "failed", "why": why}, 503)
        return JSONResponse({"status": "ok"})

    async def _why_no_token(self) -> str:
        """Wait for the next token, of a request of our own or of any other; return "" or why none has come."""
        broker, began_s = self._broker, time.monotonic()
        if not broker.is_ready:
            return broker.state
        own = None
        with contextlib.suppress(Overloaded):
            own = broker.submit([0], SamplingParams(max_tokens=1), broker.model)
        try:
            while broker.heard_s < began_s:
                if why := broker.why_stuck:
                    return why
                if time.monotonic() - began_s > _DEEP_TIMEOUT_S:
                    return (
                        f"no token within {_DEEP_TIMEOUT_S:.0f} s; requests running or waiting: {broker.num_requests}"
                    )
                await asyncio.sleep(_POLL_INTERVAL_S)
        finally:
            if own is not None:
                broker.abort(own)
        return ""

    async def ready(self, request: Request) -> Response:
        """Answer with the server's state, with status 503 if it isn't ready; clients with a key also see the ranks."""
        broker = self._broker
        status = broker.status()
        if broker.about is not None and self._access.has_key(request):  # hosts and memory are for holders of a key only
            about, now = broker.about, broker.beat.ranks
            status |= {"model": broker.model, "max_context": about.max_context, "ranks": to_builtins(about.ranks)}
            status |= {"now": [to_builtins(rank) or {} for rank in now], "silent_hosts": broker.silent_hosts}
        return JSONResponse(status, 200 if status["ready"] else 503)

    async def metrics(self, _: Request) -> Response:
        """Answer with the metrics in Prometheus' text format."""
        return Response(generate_latest(self._metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def describe(self, _: Request) -> Response:
        """Answer with the OpenAPI description of this server."""
        return JSONResponse(openapi_object(self._catalogue.names))

    async def models(self, _: Request) -> Response:
        """Answer with the catalogue, in a form that suits OpenAI's and Anthropic's clients."""
        models = [self._model_object(name) for name in self._catalogue.names]
        ends = {"has_more": False, "first_id": models[0]["id"], "last_id": models[-1]["id"]}
        return JSONResponse({"object": "list", "data": models, **ends})

    async def model(self, request: Request) -> Response:
        """Answer with one model of the catalogue.

        Raises:
            HTTPException: there is no such model.
        """
        name = model_of(self._catalogue, {"model": request.path_params["model"]}).name
        return JSONResponse(self._model_object(name))

    def _model_object(self, name: str) -> dict[str, Any]:
        # A model that isn't loaded yet may get a shorter context than it asks for.
        about = self._broker.about if name == self._broker.model else None
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
