"""MLX must initialise MPI before pytest-mpi imports mpi4py: run with mpirun -n 2 python -m pytest tests/mpi --with-mpi."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from hippo_mpi.transport.channel import RingChannel
from hippo_mpi.transport.control import Control
from hippo_mpi.transport.layout import Layout
from hippo_mpi.transport.world import World, connect, detect_launch

if "OMPI_COMM_WORLD_SIZE" in os.environ:
    _world = connect(detect_launch(), 30.0)
    _control = Control(_world, 30.0, 30.0)


@pytest.fixture(scope="session")
def world() -> World:
    if "OMPI_COMM_WORLD_SIZE" not in os.environ:
        pytest.skip("needs mpirun: mpirun -n 2 python -m pytest tests/mpi --with-mpi")
    return _world


@pytest.fixture(scope="session")
def control(world: World) -> Iterator[Control]:
    yield _control
    _control.close()
    world.group = None


@pytest.fixture(scope="session")
def channel(world: World, control: Control) -> RingChannel:
    return RingChannel(world, control, Layout(world.size))
