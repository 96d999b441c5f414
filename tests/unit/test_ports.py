"""Ports that a start holds are nobody else's, but for the rank that is to bind them."""

from __future__ import annotations

import contextlib
import socket

import pytest

from hippo_mpi.errors import LaunchError
from hippo_mpi.transport import ports
from hippo_mpi.transport.ports import HeldPorts


@pytest.fixture
def few_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave room for three starts of two ranks at most, so that they would meet."""
    with HeldPorts(8) as held:
        first = held.first
    monkeypatch.setattr(ports, "FIRST", first)
    monkeypatch.setattr(ports, "LAST", first + 8)


@pytest.mark.usefixtures("few_ports")
def test_starts_at_once_never_share_a_port() -> None:
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(HeldPorts(2)).first for _ in range(2)]
        assert abs(found[0] - found[1]) >= 2


def test_mlx_may_bind_a_held_port() -> None:
    with HeldPorts(1) as held, socket.socket() as ring:
        ring.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as MLX does
        ring.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        ring.bind(("127.0.0.1", held.first))
        ring.listen()


def test_others_may_not() -> None:
    with HeldPorts(1) as held, socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", held.first))


def test_a_port_that_is_let_go_is_free() -> None:
    with HeldPorts(1) as held:
        pass
    with socket.socket() as other:
        other.bind(("127.0.0.1", held.first))


def test_more_ranks_than_a_machine_takes() -> None:
    with pytest.raises(LaunchError, match="30,000 ranks"):
        HeldPorts(30_000)
