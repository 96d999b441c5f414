"""Connects the ranks' control sockets, and lets ranks prove to each other that they belong to the same run.

Addresses and their proofs are exchanged once over the data plane; after that every connection begins with a proof.
"""

from __future__ import annotations

import hmac
import json
import os
import secrets
import select
import socket
import time
from typing import Any

import mlx.core as mx
import numpy as np

from hippo_mpi.environment import RUN_KEY
from hippo_mpi.errors import RankError
from hippo_mpi.transport.frames import FrameReader, framed
from hippo_mpi.transport.run_key import given_key
from hippo_mpi.transport.world import World

_INTRODUCTION_BYTES = 512
_HELLO_TIMEOUT_S, _MAX_HELLO_BYTES = 5.0, 4096
_MAX_CALLERS = 100  # connections that haven't identified themselves yet
_POLL_INTERVAL_S = 0.25  # between looks at the deadlines while nobody calls


def introduce(world: World, port: int) -> tuple[bytes, list[dict[str, Any]]]:
    """Exchange addresses over the data plane, which has no authentication of its own.

    Ranks that were given a key in their environment prove it to each other: each signs its address together with fresh
    random bytes of all ranks, so that no earlier message can be replayed. Otherwise rank 0 makes a new key for all.

    Returns:
        The key of the run, and each rank's host, address, port and process id.

    Raises:
        RankError: a rank is lost, has no key, or has another one.
    """
    me = {"host": world.host, "address": world.address, "port": port, "pid": os.getpid()}
    given, nonces = given_key(), b"".join(_all_gather(world, secrets.token_bytes(32)))
    secret = {"proof": _signature(given, nonces, world.rank, me)} if given else {"key": secrets.token_hex(16)}
    introductions = [
        json.loads(data.rstrip())
        for data in _all_gather(world, json.dumps({**me, **secret}).encode().ljust(_INTRODUCTION_BYTES))
    ]
    for rank, introduction in enumerate(introductions) if given else ():
        signed = {name: introduction[name] for name in me}
        if not hmac.compare_digest(str(introduction.get("proof")), _signature(given, nonces, rank, signed)):
            raise RankError(
                f"{world.name}: rank {rank} ({introduction['host']}) doesn't know this run's key ({RUN_KEY})"
            )
    if not given and "key" not in introductions[0]:
        raise RankError(f"{world.name} has no key ({RUN_KEY}), but rank 0 ({introductions[0]['host']}) has")
    return given or bytes.fromhex(introductions[0]["key"]), introductions


def _signature(key: bytes, nonces: bytes, rank: int, introduction: dict[str, Any]) -> str:
    return hmac.new(key, nonces + json.dumps([rank, introduction], sort_keys=True).encode(), "sha256").hexdigest()


def _all_gather(world: World, data: bytes) -> list[bytes]:
    """Return every rank's bytes, which must have the same length, by rank."""
    gathered = mx.distributed.all_gather(mx.array(list(data), dtype=mx.uint8)[None], group=world.group)
    try:
        mx.eval(gathered)
    except RuntimeError as error:
        raise RankError(f"lost a rank while exchanging addresses: {error}") from None
    return [bytes(np.array(row)) for row in gathered]


def _proof(key: bytes, kind: str, rank: int) -> str:
    return hmac.new(key, f"hippo {kind} {rank}".encode(), "sha256").hexdigest()


def dial(who: dict[str, Any], world: World, key: bytes, kind: str, timeout_s: float) -> socket.socket:
    """Connect to another rank's control socket, and send this rank's proof.

    Args:
        who: the other rank's entry in what `introduce` returned.
        world: this rank.
        key: of the run.
        kind: what the connection is for; part of the proof.
        timeout_s: seconds to wait for the connection.

    Raises:
        RankError: there is no connection in time.
    """
    address = "127.0.0.1" if who["host"] == world.host and world.backend != "ring" else who["address"]
    try:
        connection = socket.create_connection((address, who["port"]), timeout_s)
    except OSError as error:
        raise RankError(f"no control connection to {who['host']} at {address}:{who['port']}: {error}") from None
    connection.settimeout(None)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    hello = json.dumps({"kind": kind, "rank": world.rank, "proof": _proof(key, kind, world.rank)}).encode()
    connection.sendall(framed(hello))
    return connection


def await_callers(
    listener: socket.socket,
    expected: set[tuple[str, int]],
    key: bytes,
    world: World,
    names: list[str],
    timeout_s: float,
) -> dict[tuple[str, int], socket.socket]:
    """Accept connections until all expected ones, by (kind, rank), have proved who they are.

    Other connections are closed. Each caller has a few seconds to identify itself, and none holds up another.

    Args:
        listener: the socket that is dialed.
        expected: (kind, rank) of each connection.
        key: of the run.
        world: this rank.
        names: of all ranks, for messages.
        timeout_s: seconds until all must be there.

    Raises:
        RankError: some are missing after `timeout_s`.
    """
    connections: dict[tuple[str, int], socket.socket] = {}
    callers: dict[socket.socket, tuple[FrameReader, float]] = {}  # with the time until which each may identify itself
    ends_s = time.monotonic() + timeout_s
    try:
        while missing := expected - connections.keys():
            if time.monotonic() > ends_s:
                late = ", ".join(names[rank] for rank in sorted({rank for _, rank in missing}))
                raise RankError(f"{world.name} waited in vain for control connections of {late}")
            for ready in select.select([listener, *callers], [], [], _POLL_INTERVAL_S)[0]:
                if ready is listener:
                    connection, _ = listener.accept()
                    if len(callers) == _MAX_CALLERS:
                        oldest = next(iter(callers))
                        del callers[oldest]
                        oldest.close()
                    callers[connection] = FrameReader(connection, _MAX_HELLO_BYTES), time.monotonic() + _HELLO_TIMEOUT_S
                elif ready in callers and (who := _who(callers[ready][0], key)) is not None:
                    del callers[ready]
                    if who in missing and who not in connections:
                        ready.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                        connections[who] = ready
                    else:
                        ready.close()  # a stranger, or a rank that has connected already
            for late_one in [one for one, (_, until_s) in callers.items() if time.monotonic() > until_s]:
                del callers[late_one]
                late_one.close()
    finally:
        for one in callers:
            one.close()
    return connections


def _who(reader: FrameReader, key: bytes) -> tuple[str, int] | None:
    """Return (kind, rank) of a caller; ("", -1) for a stranger, None until its hello has arrived."""
    try:
        data = reader.read()
        if data is None:
            return None
        hello = json.loads(data)
        kind, rank = str(hello.get("kind")), int(hello.get("rank", -1))
        known = hmac.compare_digest(str(hello.get("proof")), _proof(key, kind, rank))
    except (OSError, ValueError, TypeError, AttributeError):
        return "", -1
    return (kind, rank) if known else ("", -1)
