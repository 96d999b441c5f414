"""The transport over MPI, the same test on every rank; mpi4py speaks on a communicator of its own beside it."""

from __future__ import annotations

import random

import mlx.core as mx
import pytest

from hippo_mpi.transport.channel import RingChannel
from hippo_mpi.transport.control import Control
from hippo_mpi.transport.world import World

pytestmark = pytest.mark.mpi(min_size=2)
DTYPES = [mx.float32, mx.bfloat16, mx.int8, mx.uint32, mx.bool_]


def arrays(seed: int) -> list[mx.array]:
    """Some arrays, of any dtype, some of them empty; the same for the same seed."""
    rng = random.Random(seed)
    mx.random.seed(seed)
    made = []
    for _ in range(rng.randrange(1, 4)):
        shape = [rng.randrange(0 if rng.random() < 0.1 else 1, 40) for _ in range(rng.randrange(1, 4))]
        made.append((mx.random.uniform(shape=shape) * 100).astype(rng.choice(DTYPES)))
    mx.eval(made)
    return made


def test_world_is_whole(world: World) -> None:
    from mpi4py import MPI

    own = MPI.COMM_WORLD.Dup()
    assert (own.rank, own.size) == (world.rank, world.size)
    assert own.allreduce(1) == world.size
    own.Free()


def test_messages_arrive_as_they_were_sent(world: World, channel: RingChannel) -> None:
    """Every rank sends to the next one and receives from the one before, all at once."""
    before = (world.rank - 1) % world.size
    for number in range(60):
        channel.send(str(number).encode(), arrays(1000 * world.rank + number))
        message = channel.receive()
        message.wait()
        assert message.header == str(number).encode()
        expected = arrays(1000 * before + number)
        assert [(a.shape, a.dtype) for a in message.arrays] == [(a.shape, a.dtype) for a in expected]
        for a, b in zip(message.arrays, expected, strict=True):
            assert mx.array_equal(a, b).item()
    channel.flush()


def test_large_messages_both_ways_at_once(world: World, channel: RingChannel) -> None:
    """One stream for sends and receives would deadlock above the eager limit."""
    for _ in range(3):
        payload = mx.full((16 << 20,), world.rank, mx.uint8)
        mx.eval(payload)
        channel.send(b"large", [payload])
        message = channel.receive()
        message.wait()
        assert message.arrays[0][0].item() == (world.rank - 1) % world.size
    channel.flush()


def test_reports_are_gathered_and_shared(world: World, control: Control) -> None:
    found = control.gather({"rank": world.rank})
    assert found == ([{"rank": r} for r in range(world.size)] if world.rank == 0 else None)
    assert control.share({"answer": 42} if world.rank == 0 else None, dict[str, int]) == {"answer": 42}
