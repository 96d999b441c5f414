"""Connections as clients may misuse them: a real server over real sockets, in this process."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from hippo_mpi.cluster.top.server_answers import fetch_status
from hippo_mpi.errors import UserError
from hippo_mpi.serve import make_parser
from hippo_mpi.serving import server_status
from hippo_mpi.serving.addresses import is_loopback, is_untrusted, network_of, url_of, url_to_ask
from hippo_mpi.serving.api import connections
from hippo_mpi.serving.api.http_server import HttpSettings, listen, serve_http
from hippo_mpi.serving.logs import ANNOUNCEMENTS
from hippo_mpi.serving.supervision.request_broker import RequestBroker

HEAD = b"Host: localhost\r\n\r\n"


class Running:
    """An application that is served: where, and what its requests have met."""

    def __init__(self) -> None:
        self.url, self.port = "", 0
        self.gone = threading.Event()
        self.begun = threading.Event()

    def connect(self, receive_bytes: int | None = None) -> socket.socket:
        client = socket.socket()
        if receive_bytes:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        client.connect(("127.0.0.1", self.port))
        client.settimeout(20)
        return client

    def app(self) -> Starlette:
        async def wait(request: Request) -> Response:
            self.begun.set()
            while (await request.receive())["type"] != "http.disconnect":
                pass
            self.gone.set()
            return Response()

        async def flood(_: Request) -> Response:
            async def pieces() -> Any:
                try:
                    self.begun.set()
                    while True:
                        yield b"x" * 10_000
                        await asyncio.sleep(0)
                finally:
                    self.gone.set()

            return StreamingResponse(pieces())

        async def size(request: Request) -> Response:
            return JSONResponse(len(await request.body()))

        async def who(request: Request) -> Response:
            return PlainTextResponse(request.client.host if request.client else "")

        async def ready(_: Request) -> Response:
            return JSONResponse({"ready": False}, 503)

        routes = [
            Route("/wait", wait, methods=["GET", "POST"]),
            Route("/flood", flood),
            Route("/who", who),
            Route("/ready", ready),
        ]
        return Starlette(routes=[*routes, Route("/size", size, methods=["POST"])])


@contextlib.contextmanager
def serving(caplog: pytest.LogCaptureFixture, address: str = "127.0.0.1", **settings: Any) -> Iterator[Running]:
    found, loop = Running(), asyncio.new_event_loop()
    tasks: list[asyncio.Task[None]] = []

    def serve() -> None:
        asyncio.set_event_loop(loop)
        tasks.append(
            loop.create_task(serve_http(found.app(), RequestBroker(4, "m"), HttpSettings(address, 0, **settings)))
        )
        with contextlib.suppress(asyncio.CancelledError):
            loop.run_until_complete(tasks[0])

    with caplog.at_level("INFO", ANNOUNCEMENTS):
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        ends = time.monotonic() + 10
        while not (lines := [line for line in caplog.messages if line.startswith("listening on ")]):
            assert time.monotonic() < ends and thread.is_alive()
            time.sleep(0.01)
    found.url = lines[-1].removeprefix("listening on ")
    found.port = int(found.url.rpartition(":")[2])
    try:
        yield found
    finally:
        loop.call_soon_threadsafe(tasks[0].cancel)
        thread.join(10)
        caplog.clear()


@pytest.mark.parametrize("behind", [b"", b"GET /who HTTP/1.1\r\n" + HEAD], ids=["alone", "with a request behind it"])
@pytest.mark.parametrize("at_once", [True, False], ids=["in one piece", "later"])
@pytest.mark.parametrize("head", [HEAD, b"Upgrade: h2c\r\nConnection: upgrade\r\n" + HEAD], ids=["plain", "upgrade"])
def test_a_client_that_goes_is_seen_to_go(
    caplog: pytest.LogCaptureFixture, behind: bytes, at_once: bool, head: bytes
) -> None:
    with serving(caplog) as running, running.connect() as client:
        asked = b"GET /wait HTTP/1.1\r\n" + head
        client.sendall(asked + behind if at_once else asked)
        assert running.begun.wait(10)
        if not at_once:
            client.sendall(behind)
        client.close()
        assert running.gone.wait(5)


def test_requests_that_are_sent_ahead_are_answered_in_turn(caplog: pytest.LogCaptureFixture) -> None:
    def post(length: int) -> bytes:
        return b"POST /size HTTP/1.1\r\nContent-Length: %d\r\n%s" % (length, HEAD) + b"x" * length

    with serving(caplog) as running, running.connect() as client:
        for pieces in (
            [post(3) + post(200) + post(7)],
            [post(3), post(200), post(7)],
            [post(3) + post(200)[:90], post(200)[90:] + post(7)],
        ):
            for piece in pieces:
                client.sendall(piece)
                time.sleep(0.01)
            told = b""
            while told.count(b"\r\n\r\n") < 3 or not told.endswith(b"\r\n\r\n7"):
                told += client.recv(4096)
            assert [part.split(b"HTTP/1.1")[0] for part in told.split(b"\r\n\r\n")[1:]] == [b"3", b"200", b"7"]


def test_more_than_is_kept_of_requests_ahead(caplog: pytest.LogCaptureFixture) -> None:
    with serving(caplog) as running, running.connect() as client:
        client.sendall(b"GET /wait HTTP/1.1\r\n" + HEAD)
        assert running.begun.wait(10)
        with contextlib.suppress(ConnectionError):
            client.sendall(b"x" * (1 << 20))
        assert running.gone.wait(5)


@pytest.mark.slow
def test_a_client_that_never_reads(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its stream is ended; one that reads slowly isn't."""
    monkeypatch.setattr(connections, "UNREAD_S", 1.0)
    monkeypatch.setattr(connections, "_POLL_INTERVAL_S", 0.1)
    with serving(caplog) as running, running.connect(1 << 16) as client:
        client.sendall(b"GET /flood HTTP/1.1\r\n" + HEAD)
        ends = time.monotonic() + 2.0
        while time.monotonic() < ends:
            assert client.recv(40_000)
            time.sleep(0.02)
        assert not running.gone.is_set()
        assert running.gone.wait(5)
        client.settimeout(5)
        with contextlib.suppress(ConnectionError):
            while client.recv(1 << 16):
                pass


def test_connections_that_only_lie_there(caplog: pytest.LogCaptureFixture) -> None:
    """The longest silent gives way to a new one; those with a request don't, and then a new one is told so."""
    with serving(caplog, max_connections=8) as running, contextlib.ExitStack() as clients:
        silent = [clients.enter_context(running.connect()) for _ in range(30)]
        assert httpx.get(f"{running.url}/who").text == "127.0.0.1"
        assert silent[0].recv(100) == b""
        for number in range(4):  # half of all, as they come from one address
            busy = clients.enter_context(running.connect())
            running.begun.clear()
            busy.sendall(b"GET /wait HTTP/1.1\r\n" + HEAD)
            assert running.begun.wait(5), number
        refused = httpx.get(f"{running.url}/who")
        assert refused.status_code == 503 and "too many connections" in refused.json()["error"]["message"]
        busy.close()
        assert running.gone.wait(5)
        assert httpx.get(f"{running.url}/who").status_code == 200


def test_only_named_proxies_say_for_whom_they_ask(caplog: pytest.LogCaptureFixture) -> None:
    forwarded = {"X-Forwarded-For": "203.0.113.9"}
    with serving(caplog) as running:
        assert httpx.get(f"{running.url}/who", headers=forwarded).text == "127.0.0.1"
    with serving(caplog, proxies=("127.0.0.0/8",), max_connections=8) as running, contextlib.ExitStack() as clients:
        assert httpx.get(f"{running.url}/who", headers=forwarded).text == "203.0.113.9"
        busy = [clients.enter_context(running.connect()) for _ in range(6)]  # of many clients: more than half of all
        for one in busy:
            one.sendall(b"GET /wait HTTP/1.1\r\n" + HEAD)
        assert httpx.get(f"{running.url}/who").status_code == 200


def test_ipv6(caplog: pytest.LogCaptureFixture) -> None:
    try:
        listen("::1", 0).close()
    except Exception as error:
        if not socket.has_ipv6 or "assign requested address" in str(error):
            pytest.skip("this machine has no IPv6")
        raise
    with serving(caplog, "::1") as running:
        assert running.url.startswith("http://[::1]:")
        assert httpx.get(f"{running.url}/who").text == "::1"


def test_addresses() -> None:
    assert network_of("10.0.0.1") == network_of("::ffff:10.0.0.1") == "10.0.0.1" and network_of("a name") == "a name"
    assert network_of("fd00::2:3:4:5") == network_of("fd00::1") != network_of("fd00:0:0:1::1")
    assert all(map(is_loopback, ("127.0.0.1", "127.8.0.1", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "example.org", "")))
    assert url_of("::1", 80, True) == "https://[::1]:80"
    assert (
        url_to_ask("https://0.0.0.0:80") == "https://127.0.0.1:80" and url_to_ask("http://[::]:80") == "http://[::1]:80"
    )
    assert url_to_ask("http://10.0.0.1:80") == "http://10.0.0.1:80"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One that this machine has signed itself, and its private key."""
    cert, key = (tmp_path_factory.mktemp("tls") / name for name in ("cert.pem", "key.pem"))
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=hippo", "-addext",
         "subjectAltName=IP:127.0.0.1,DNS:localhost", "-out", cert, "-keyout", key],
        check=True, capture_output=True,
    )  # fmt: skip
    return cert, key


def test_encrypted(
    caplog: pytest.LogCaptureFixture, certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who trusts the certificate is named by SSL_CERT_FILE; who doesn't is told so."""
    cert, key = certificate
    with serving(caplog, certfile=cert, keyfile=key, max_connections=4) as running:
        assert running.url.startswith("https://127.0.0.1:")
        with pytest.raises(UserError, match=r"doesn't answer: .*certificate.* \(set SSL_CERT_FILE"):
            server_status.show([running.url])
        with pytest.raises(openai.APIConnectionError) as refused:
            openai.OpenAI(base_url=running.url, api_key="none", max_retries=0).models.list()
        assert is_untrusted(refused.value)
        monkeypatch.setenv("SSL_CERT_FILE", str(cert))
        assert httpx.get(f"{running.url}/who").text == "127.0.0.1"
        assert fetch_status(running.url) == {"ready": False}
        with running.connect() as plain, contextlib.suppress(ConnectionError):
            plain.sendall(b"GET /who HTTP/1.1\r\n" + HEAD)
            assert b"200" not in plain.recv(100)
        with contextlib.ExitStack() as clients:  # that never shake hands
            silent = [clients.enter_context(running.connect()) for _ in range(90)]
            assert silent[-1].recv(1) == b"", "turned away"
            silent[0].settimeout(0.1)
            with pytest.raises(TimeoutError):
                silent[0].recv(1)
        ends, told = time.monotonic() + 10, ""
        while not told and time.monotonic() < ends:  # their descriptors are given back
            with contextlib.suppress(httpx.TransportError):
                told = httpx.get(f"{running.url}/who").text
        assert told == "127.0.0.1"


def test_files_of_a_certificate(certificate: tuple[Path, Path], tmp_path: Path) -> None:
    cert, key = map(str, certificate)
    locked = str(tmp_path / "locked.pem")
    subprocess.run(["openssl", "pkey", "-in", key, "-aes256", "-passout", "pass:x", "-out", locked], check=True)
    for options, line in (
        (["--ssl-keyfile", key], "--ssl-keyfile needs --ssl-certfile"),
        (["--ssl-certfile", "nowhere.pem"], "--ssl-certfile nowhere.pem can't be used: No such file"),
        (["--ssl-certfile", cert], f"--ssl-certfile {cert} can't be used: "),
        (["--ssl-certfile", key, "--ssl-keyfile", key], "can't be used: "),
        (["--ssl-certfile", cert, "--ssl-keyfile", locked], "has a password"),
    ):
        with pytest.raises(UserError, match=line):
            HttpSettings.from_options(make_parser().read(options))
    found = HttpSettings.from_options(make_parser().read(["--ssl-certfile", cert, "--ssl-keyfile", key]))
    assert (found.certfile, found.keyfile, found.proxies) == (*certificate, ())
    found = HttpSettings.from_options(make_parser().read(["--trusted-proxy", "10.0.0.7", "fd00::1/64"]))
    assert found.proxies == ("10.0.0.7/32", "fd00::/64")
