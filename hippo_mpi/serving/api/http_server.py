"""The HTTP server: uvicorn, with limits for connections, until a signal comes."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import ssl
import threading
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette

from hippo_mpi.config.serve_options import ServeOptions
from hippo_mpi.errors import UserError
from hippo_mpi.serving.addresses import url_of
from hippo_mpi.serving.api.connections import Connections, Listener, room_for_connections
from hippo_mpi.serving.api.http_protocol import HttpProtocol
from hippo_mpi.serving.logs import ANNOUNCEMENTS
from hippo_mpi.serving.supervision.answer import ServerEnding
from hippo_mpi.serving.supervision.request_broker import RequestBroker

_log = logging.getLogger(__name__)
_announcements = logging.getLogger(ANNOUNCEMENTS)
_KEEP_ALIVE_S = 30
_MOST_HEADER_BYTES = 32 << 10
_SEND_BYTES = 128 << 10  # that the kernel holds of an answer which isn't read; left alone it takes megabytes


@dataclass(frozen=True)
class HttpSettings:
    """Where to listen, and for whom.

    Args:
        certfile, keyfile: of the server (PEM); none: nothing is encrypted.
        proxies: addresses and networks that may say for whom they ask (X-Forwarded-For).
        max_connections: at once.
    """

    address: str
    port: int
    certfile: Path | None = None
    keyfile: Path | None = None
    proxies: tuple[str, ...] = ()
    max_connections: int = 1000

    @classmethod
    def from_options(cls, options: ServeOptions) -> HttpSettings:
        """Read what the command line says.

        Raises:
            UserError: the certificate can't be used.
        """
        if options.ssl_keyfile and not options.ssl_certfile:
            raise UserError("--ssl-keyfile needs --ssl-certfile")
        if options.ssl_certfile:
            _check_certificate(options.ssl_certfile, options.ssl_keyfile)
        proxies = tuple(options.trusted_proxy)
        return cls(
            options.address, options.port, options.ssl_certfile, options.ssl_keyfile, proxies, options.max_connections
        )


def _check_certificate(certfile: Path, keyfile: Path | None) -> None:
    def refuse() -> str:
        raise UserError(f"the private key for --ssl-certfile {certfile} has a password: remove it (openssl pkey)")

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certfile, keyfile, refuse)
    except OSError as error:  # also of OpenSSL
        files = f"--ssl-certfile {certfile}" + (f" and --ssl-keyfile {keyfile}" if keyfile else "")
        raise UserError(f"{files} can't be used: {error.strerror or error}") from None


def listen(address: str, port: int) -> socket.socket:
    """Raise a UserError if the address can't be listened on."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        listener = socket.create_server((address, port), family=family, backlog=256)
    except OSError as error:
        raise UserError(f"can't listen on {address}:{port}: {error.strerror}") from None
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BYTES)  # connections inherit it
    return listener


async def serve_http(app: Starlette, broker: RequestBroker, settings: HttpSettings) -> None:
    """Serve until a signal comes; then clients are told, in words.

    Raises:
        UserError: the address can't be listened on.
    """
    most = room_for_connections(settings.max_connections)
    listener = Listener(listen(settings.address, settings.port), most)
    connections = Connections(most, settings.proxies)
    protocol: Any = partial(HttpProtocol, open_connections=connections)
    config = uvicorn.Config(
        app, http=protocol, ws="none", lifespan="off", log_config=None,
        timeout_keep_alive=_KEEP_ALIVE_S, timeout_graceful_shutdown=2,
        h11_max_incomplete_event_size=_MOST_HEADER_BYTES,
        proxy_headers=bool(settings.proxies), forwarded_allow_ips=list(settings.proxies),
        ssl_certfile=settings.certfile, ssl_keyfile=settings.keyfile,
    )  # fmt: skip
    url = url_of(settings.address, listener.getsockname()[1], settings.certfile is not None)
    _announcements.info("listening on %s", url)
    beside = [asyncio.ensure_future(_announce(broker)), asyncio.ensure_future(connections.watch())]
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises them again when it has ended
            signal.signal(number, lambda *_: None)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup has it
            signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))
    server = uvicorn.Server(config)
    beside.append(asyncio.ensure_future(_end_answers(server, broker)))
    try:
        await server.serve([listener])
    finally:
        for task in beside:
            task.cancel()


async def _end_answers(server: uvicorn.Server, broker: RequestBroker) -> None:
    while not server.should_exit:
        await asyncio.sleep(0.1)
    _log.info("shutting down; requests running or waiting: %d", broker.num_requests)
    broker.fail_all(ServerEnding("the server is shutting down"))


async def _announce(broker: RequestBroker) -> None:
    while not broker.is_ready:
        await asyncio.sleep(0.1)
    _announcements.info("ready")
