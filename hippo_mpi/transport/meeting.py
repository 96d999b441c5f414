"""Connects the ranks' control sockets. Each side proves to the other that it knows the key of the run.

A rank may be reachable at several addresses, of which a caller knows only that one or another is the right one: another
machine may have the same address in the caller's network. So it calls all of them at once, and takes the first that
answers with a proof. The called rank believes the caller's proof, which is for that connection only.

Three frames of JSON: the caller's `_Call`, the called rank's `_Answer`, and the caller's proof.
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
import socket
import threading
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import msgspec

from hippo_mpi.errors import RankError
from hippo_mpi.transport.frames import LENGTH, framed

Caller = tuple[str, int]
"""What a connection is for, and the rank that calls."""
_T = TypeVar("_T")
_HELLO_TIMEOUT_S, _MAX_HELLO_BYTES = 5.0, 4096
_MAX_CALLERS = 100  # that haven't proved yet who they are
_RETRY_S = 0.1


class _Call(msgspec.Struct, frozen=True):
    kind: str
    rank: int
    nonce: str


class _Answer(msgspec.Struct, frozen=True):
    nonce: str
    proof: str


class Meeting:
    """Calls other ranks, and is called by others, until all connections of this rank are there.

    Args:
        key: of the run.
        rank: this rank.
        names: of all ranks, for messages.
    """

    def __init__(self, key: bytes, rank: int, names: Sequence[str]) -> None:
        self._key, self._rank, self._names = key, rank, names
        self._callers: dict[asyncio.Task[None], socket.socket] = {}  # which haven't proved yet who they are
        self._found: dict[Caller, socket.socket] = {}
        self._expected: set[Caller] = set()
        self._all_found = asyncio.Event()

    async def meet(
        self,
        listeners: Sequence[socket.socket],
        calls: Mapping[str, tuple[int, Sequence[tuple[str, int]]]],
        expected: set[Caller],
        timeout_s: float,
    ) -> tuple[dict[str, socket.socket], dict[Caller, socket.socket]]:
        """Make and take all connections.

        Args:
            listeners: the sockets at which others call.
            calls: for each kind of connection, the rank to call, and its places.
            expected: who will call.
            timeout_s: seconds until all connections must be there.

        Returns:
            The connections to those that were called, by kind, and to those that have called.

        Raises:
            RankError: a rank can't be reached, or doesn't call in time.
        """
        self._expected = expected
        accepting = [asyncio.create_task(self._accept(listener)) for listener in listeners]
        calling = {
            kind: asyncio.create_task(self._call(kind, rank, places, timeout_s))
            for kind, (rank, places) in calls.items()
        }
        try:
            called = await asyncio.gather(*calling.values(), self._await_callers(timeout_s))
        except RankError:
            for connection in (*await _end([*calling.values()]), *self._found.values()):
                connection.close()
            raise
        finally:
            await _end([*accepting, *self._callers])
        made = dict(zip(calling, filter(None, called), strict=True))
        for connection in (*made.values(), *self._found.values()):
            connection.setblocking(True)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return made, self._found

    # ---- calling

    async def _call(self, kind: str, rank: int, places: Sequence[tuple[str, int]], timeout_s: float) -> socket.socket:
        """Return the connection to the first place that proves to be that rank's.

        Raises:
            RankError: none does in time.
        """
        tries = [asyncio.create_task(self._try(kind, place)) for place in places]
        chosen, problem = None, f"no answer within {timeout_s:.0f} s"
        try:
            async with asyncio.timeout(timeout_s):
                for trying in asyncio.as_completed(tries):
                    try:
                        connection, proof = await trying
                        await asyncio.get_running_loop().sock_sendall(connection, framed(proof))
                        chosen = connection
                        return chosen
                    except OSError as error:
                        problem = str(error)
        except TimeoutError:
            pass
        finally:
            for connection, _ in await _end(tries):
                if connection is not chosen:
                    connection.close()
        where = ", ".join(f"{address}:{port}" for address, port in places)
        raise RankError(f"no control connection to {self._names[rank]} at {where}: {problem}")

    async def _try(self, kind: str, place: tuple[str, int]) -> tuple[socket.socket, bytes]:
        """Return a connection to a place that has proved whose it is, and the proof to send there.

        Raises:
            OSError: it can't be reached, or isn't a rank of this run.
        """
        loop, connection = asyncio.get_running_loop(), socket.socket()
        try:
            connection.setblocking(False)
            await loop.sock_connect(connection, place)
            call = _Call(kind, self._rank, secrets.token_hex(16))
            await loop.sock_sendall(connection, framed(msgspec.json.encode(call)))
            answer = msgspec.json.decode(await _read(connection), type=_Answer)
            if not hmac.compare_digest(answer.proof.encode(), self._proof("answer", call, answer.nonce)):
                raise ConnectionRefusedError("the process there is not a rank of this run")
            return connection, self._proof("call", call, answer.nonce)
        except BaseException as error:
            connection.close()
            if isinstance(error, msgspec.MsgspecError):
                raise ConnectionRefusedError("the process there is not a rank") from None
            raise

    # ---- being called

    async def _await_callers(self, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                if self._expected:
                    await self._all_found.wait()
        except TimeoutError:
            missing = sorted({rank for _, rank in self._expected - self._found.keys()})
            late = ", ".join(self._names[rank] for rank in missing)
            raise RankError(
                f"{self._names[self._rank]} got no control connections from {late} within {timeout_s:.0f} s"
            ) from None

    async def _accept(self, listener: socket.socket) -> None:
        """Let everybody in who connects. None holds up another, and the oldest who hasn't proved anything gives way."""
        listener.setblocking(False)
        while True:
            try:
                connection, _ = await asyncio.get_running_loop().sock_accept(listener)
            except OSError:  # such as too many open files
                await asyncio.sleep(_RETRY_S)
                continue
            if len(self._callers) >= _MAX_CALLERS:
                oldest = next(iter(self._callers))
                del self._callers[oldest]
                oldest.cancel()
            self._callers[asyncio.create_task(self._admit(connection))] = connection

    async def _admit(self, connection: socket.socket) -> None:
        """Keep the connection of a caller that is expected and proves who it is in time; close any other."""
        keeps, task = False, asyncio.current_task()
        assert task is not None
        try:
            async with asyncio.timeout(_HELLO_TIMEOUT_S):
                who = await self._identify(connection)
            if who in self._expected and who not in self._found:
                self._found[who], keeps = connection, True
                if self._found.keys() == self._expected:
                    self._all_found.set()
        except (OSError, TimeoutError, msgspec.MsgspecError):
            pass  # a stranger, or a caller that has chosen another of our addresses
        finally:
            self._callers.pop(task, None)
            if not keeps:
                connection.close()

    async def _identify(self, connection: socket.socket) -> Caller:
        """Return who calls, after proofs of both sides.

        Raises:
            OSError: it is a stranger.
        """
        call, nonce = msgspec.json.decode(await _read(connection), type=_Call), secrets.token_hex(16)
        answer = _Answer(nonce, self._proof("answer", call, nonce).decode())
        await asyncio.get_running_loop().sock_sendall(connection, framed(msgspec.json.encode(answer)))
        if not hmac.compare_digest(await _read(connection), self._proof("call", call, nonce)):
            raise ConnectionRefusedError("it doesn't have this run's key")
        return call.kind, call.rank

    def _proof(self, side: str, call: _Call, nonce: str) -> bytes:
        said = msgspec.json.encode([f"hippo {side}", call, nonce])
        return hmac.new(self._key, said, "sha256").hexdigest().encode()


async def _read(connection: socket.socket) -> bytes:
    """Return the data of one frame, and read no byte beyond it.

    Raises:
        OSError: the connection is closed, or the frame is too long.
    """
    (length,) = LENGTH.unpack(await _read_exactly(connection, LENGTH.size))
    if length > _MAX_HELLO_BYTES:
        raise ConnectionRefusedError(f"the process there is not a rank (it announced {length:,} bytes)")
    return await _read_exactly(connection, length)


async def _read_exactly(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = await asyncio.get_running_loop().sock_recv(connection, count - len(data))
        if not piece:
            raise ConnectionResetError("the connection was closed")
        data += piece
    return data


async def _end(tasks: Sequence[asyncio.Task[_T]]) -> list[_T]:
    """Cancel tasks, wait until they have ended, and return the results of those that had one."""
    for task in tasks:
        task.cancel()
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    return [result for result in ended if not isinstance(result, BaseException)]


def in_own_thread(work: Coroutine[Any, Any, _T]) -> _T:
    """Run a coroutine to its end, in a thread of its own: a script that calls us may itself be in an event loop."""
    found: Future[_T] = Future()

    def run() -> None:
        try:
            found.set_result(asyncio.run(work))
        except BaseException as error:
            found.set_exception(error)

    threading.Thread(target=run, name="hippo-meeting", daemon=True).start()
    return found.result()
