"""Introduces the ranks to each other: who they are, where they are reached, and that they belong to the same run.

What they say goes once over the data plane, which has no authentication of its own. After that, every control
connection begins with a proof from both sides (`meeting.py`).
"""

from __future__ import annotations

import contextlib
import hmac
import os
import secrets
import socket
from dataclasses import dataclass

import mlx.core as mx
import msgspec
import numpy as np

from hippo_mpi.environment import CONTROL, RUN_KEY
from hippo_mpi.errors import LaunchError, RankError
from hippo_mpi.transport.run_key import given_key
from hippo_mpi.transport.world import MAX_ADDRESSES, World

_INTRODUCTION_BYTES = 512 + 32 * MAX_ADDRESSES


@dataclass(frozen=True)
class Contact:
    """A rank, as the others know it.

    Args:
        host: its name.
        pid: of its process, on that host.
        places: addresses and ports at which its control sockets listen, the one beside its data first.
    """

    host: str
    pid: int
    places: tuple[tuple[str, int], ...]

    def places_from(self, world: World) -> tuple[tuple[str, int], ...]:
        """Return where a rank calls this one: on one host, by loopback, unless it listens on certain addresses only."""
        if self.host == world.host and world.backend != "ring":
            return (("127.0.0.1", self.places[0][1]),)
        return self.places


class _Introduction(msgspec.Struct, frozen=True):
    """What a rank says of itself, with a proof of the key that it was given; rank 0 says the key itself if there is none."""

    contact: Contact
    proof: str = ""
    key: str = ""


def listen(world: World, stack: contextlib.ExitStack) -> list[socket.socket]:
    """Return sockets at which the other ranks call; the stack closes them.

    Raises:
        LaunchError: an address isn't this host's.
    """
    listeners = []
    for address in world.addresses if world.backend == "ring" else [""]:
        try:
            listeners.append(stack.enter_context(socket.create_server((address, 0), backlog=world.size + 1)))
        except OSError as error:
            raise LaunchError(f"{world.name} can't listen on {address}: {error.strerror} ({CONTROL})") from None
    return listeners


def places_of(world: World, listeners: list[socket.socket]) -> list[tuple[str, int]]:
    """Return the addresses and ports at which a rank with these listeners is reached."""
    ports = [listener.getsockname()[1] for listener in listeners]
    return list(zip(world.addresses, ports if len(ports) > 1 else ports * len(world.addresses), strict=True))


def introduce(world: World, places: list[tuple[str, int]]) -> tuple[bytes, list[Contact]]:
    """Exchange who the ranks are, and where their control sockets listen.

    Ranks that were given a key in their environment prove it to each other: each signs what it says together with fresh
    random bytes of all ranks, so that no earlier message can be replayed. Otherwise rank 0 makes a new key for all.

    Args:
        world: this rank.
        places: where it listens.

    Returns:
        The key of the run, and the contacts of all ranks.

    Raises:
        RankError: a rank is lost, has no key, or has another one.
    """
    me = Contact(world.host, os.getpid(), tuple(places))
    given, nonces = given_key(), b"".join(_all_gather(world, secrets.token_bytes(32)))
    mine = (
        _Introduction(me, proof=_signature(given, nonces, world.rank, me))
        if given
        else _Introduction(me, key=secrets.token_hex(16))
    )
    introductions = [
        msgspec.json.decode(data.rstrip(), type=_Introduction)
        for data in _all_gather(world, msgspec.json.encode(mine).ljust(_INTRODUCTION_BYTES))
    ]
    for rank, other in enumerate(introductions) if given else ():
        if not hmac.compare_digest(other.proof, _signature(given, nonces, rank, other.contact)):
            raise RankError(f"{world.name}: rank {rank} ({other.contact.host}) doesn't have this run's key ({RUN_KEY})")
    if not given and not introductions[0].key:
        raise RankError(f"{world.name} has no key ({RUN_KEY}), but rank 0 ({introductions[0].contact.host}) has one")
    return given or bytes.fromhex(introductions[0].key), [other.contact for other in introductions]


def _signature(key: bytes, nonces: bytes, rank: int, contact: Contact) -> str:
    return hmac.new(key, nonces + msgspec.json.encode([rank, contact]), "sha256").hexdigest()


def _all_gather(world: World, data: bytes) -> list[bytes]:
    """Return every rank's bytes, which must have the same length, by rank."""
    gathered = mx.distributed.all_gather(mx.array(list(data), dtype=mx.uint8)[None], group=world.group)
    try:
        mx.eval(gathered)
    except RuntimeError as error:
        raise RankError(f"lost a rank while exchanging addresses: {error}") from None
    return [bytes(np.array(row)) for row in gathered]
