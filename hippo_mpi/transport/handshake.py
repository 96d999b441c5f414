"""How ranks find each other's control sockets, and prove that they belong to one run.

Addresses and what proves them travel over the data plane, once; then every connection begins with a proof.
"""

from __future__ import annotations

import hmac
import json
import os
import secrets
import socket
from typing import Any

import mlx.core as mx
import numpy as np

from hippo_mpi.environment import RUN_KEY
from hippo_mpi.errors import RankError
from hippo_mpi.transport.frames import framed, read_frame
from hippo_mpi.transport.world import World

_CARD_BYTES = 512


def introduce(world: World, port: int) -> tuple[bytes, list[dict[str, Any]]]:
    """Exchange addresses over the data plane, which knows no authentication.

    Ranks that were given a key in their environment prove it to each other: each signs its address and what the others
    have just made up, so that nothing that was heard before can be said again. Otherwise rank 0's key becomes everyone's.
    """
    me = {"host": world.host, "address": world.address, "port": port, "pid": os.getpid()}
    given, made_up = os.environ.get(RUN_KEY, "").encode(), b"".join(_all_gather(world, secrets.token_bytes(32)))
    secret = {"proof": _signature(given, made_up, world.rank, me)} if given else {"key": secrets.token_hex(16)}
    cards = [
        json.loads(data.rstrip())
        for data in _all_gather(world, json.dumps({**me, **secret}).encode().ljust(_CARD_BYTES))
    ]
    for rank, card in enumerate(cards) if given else ():
        signed = {name: card[name] for name in me}
        if not hmac.compare_digest(str(card.get("proof")), _signature(given, made_up, rank, signed)):
            raise RankError(f"{world.name}: rank {rank} ({card['host']}) doesn't know this run's key ({RUN_KEY})")
    if not given and "key" not in cards[0]:
        raise RankError(f"{world.name} has no key ({RUN_KEY}), but rank 0 ({cards[0]['host']}) has")
    return given or bytes.fromhex(cards[0]["key"]), cards


def _signature(key: bytes, made_up: bytes, rank: int, card: dict[str, Any]) -> str:
    return hmac.new(key, made_up + json.dumps([rank, card], sort_keys=True).encode(), "sha256").hexdigest()


def _all_gather(world: World, data: bytes) -> list[bytes]:
    """Every rank's bytes, all of one length, by rank."""
    gathered = mx.distributed.all_gather(mx.array(list(data), dtype=mx.uint8)[None], group=world.group)
    try:
        mx.eval(gathered)
    except RuntimeError as error:
        raise RankError(f"lost a rank while exchanging addresses: {error}") from None
    return [bytes(np.array(row)) for row in gathered]


def _proof(key: bytes, kind: str, rank: int) -> str:
    return hmac.new(key, f"hippo {kind} {rank}".encode(), "sha256").hexdigest()


def dial(who: dict[str, Any], world: World, key: bytes, kind: str, timeout_s: float) -> socket.socket:
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


def answer(
    listener: socket.socket, key: bytes, world: World, names: list[str]
) -> tuple[socket.socket, tuple[str, int]]:
    """Accept one connection and tell who it is; ("", -1) for a stranger."""
    try:
        connection, _ = listener.accept()
    except TimeoutError:
        raise RankError(f"{world.name} waited in vain for control connections of {', '.join(names)}") from None
    connection.settimeout(5.0)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        hello = json.loads(read_frame(connection) or b"{}")
        kind, rank = str(hello.get("kind")), int(hello.get("rank", -1))
        known = hmac.compare_digest(str(hello.get("proof")), _proof(key, kind, rank))
    except (OSError, ValueError, AttributeError):
        known = False
    connection.settimeout(None)
    return connection, (kind, rank) if known else ("", -1)
