"""The ranks of somebody's script: a group that the script made, or ours, with deadlines and an end for all.

The script runs on every rank and may end as it likes. What becomes of the others then: a rank that dies, raises or leaves
while another waits for it ends them all, with a line that names it.

Knows ranks. Must not know models.
"""

from __future__ import annotations

import atexit
import contextlib
import socket
import sys
from types import TracebackType
from typing import NoReturn

import mlx.core as mx

from hippo_mpi.errors import HippoError, LaunchError, interrupted
from hippo_mpi.transport.channel import RingChannel
from hippo_mpi.transport.control import Control
from hippo_mpi.transport.layout import Layout
from hippo_mpi.transport.world import World, connect, detect_launch, end_within, own_address

Group = mx.distributed.Group

_LEAST_END_S = 10.0  # for the other ranks to end, on a busy machine


class ScriptControl(Control):
    """The control connections of a script. Alone, what fails is raised: there is nobody to end."""

    def fail(self, error: HippoError) -> NoReturn:
        if self.world.size == 1:
            self.idle()
            raise error
        super().fail(error)

    def hang_up(self) -> None:
        """Leave for good: a rank that still waits for this one learns that it has gone."""
        self.close()
        for connection in (self._next, self._previous):
            with contextlib.suppress(OSError):  # the other side has gone first
                connection.shutdown(socket.SHUT_RDWR)


class ScriptRing:
    """This rank of a script, joined once for all of its models.

    Args:
        world: the ranks.
        start_timeout_s: how long ranks wait for each other's connections.
        timeout_s: how long a rank may be silent, or all of them get nothing done, before all end.
    """

    def __init__(self, world: World, start_timeout_s: float, timeout_s: float) -> None:
        self.world = world
        self.control = ScriptControl(world, start_timeout_s, timeout_s)
        self.control.idle()
        self.channel = RingChannel(world, self.control, Layout(world.size))
        self._num_models = 0
        if world.size > 1:
            self._before = sys.excepthook
            sys.excepthook = self._end_all
            atexit.register(self._leave)

    def next_number(self) -> int:
        """Return a number for a model, the same on all ranks: they join their models in the same order."""
        self._num_models += 1
        return self._num_models

    def _end_all(self, kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
        """End every rank with the exception that has ended this one's script."""
        self._before(kind, error, where)
        if isinstance(error, KeyboardInterrupt):
            self.control.fail(interrupted())
        self.control.fail(HippoError(f"the script raised {kind.__name__}: {' '.join(str(error).split())}"))

    def _leave(self) -> None:
        """End this rank in order, or with a line if others never end."""
        end_s = max(self.control.timeout_s, _LEAST_END_S)
        end_within(end_s, f"{self.world.name} waited {end_s:.0f} s for the other ranks to end")
        with contextlib.suppress(RuntimeError):  # whoever was to take it has gone, and nobody waits for it
            self.channel.flush()
        self.control.hang_up()
        self.world.group = None  # MPI is finalised when the last reference goes


_joined: list[ScriptRing] = []


def join(group: Group | None, start_timeout_s: float, timeout_s: float) -> ScriptRing:
    """Return this script's ring; the first call makes it, and has every rank wait for the others.

    Args:
        group: from `mx.distributed.init()`; None: the one that the launcher's environment describes.
        start_timeout_s: how long ranks wait for each other to start.
        timeout_s: how long a rank may be silent, or all of them get nothing done, before all end.

    Raises:
        LaunchError: the group isn't what the launcher has started, or isn't the one of the first call.
        RankError: another rank doesn't answer.
    """
    if _joined:
        world = _joined[0].world
        if group is not None and (group.rank(), group.size()) != (world.rank, world.size):
            raise LaunchError(
                f"this script has joined as rank {world.rank} of {world.size}, and can't join another group as rank"
                f" {group.rank()} of {group.size()}"
            )
        return _joined[0]
    world = connect(detect_launch(), start_timeout_s) if group is None else _world_of(group)
    _joined.append(ScriptRing(world, start_timeout_s, timeout_s))
    return _joined[0]


def _world_of(group: Group) -> World:
    """Describe a group that somebody else has made."""
    launch = detect_launch()
    if launch.size is not None and launch.size != group.size():
        raise LaunchError(
            f"the launcher started {launch.size} ranks, but this group has {group.size()}: import hippo_mpi before"
            " mx.distributed.init(), or leave the group out"
        )
    host = socket.gethostname()
    if group.size() == 1:
        return World(0, 1, "none", host, "127.0.0.1")
    address = launch.address or own_address(launch)
    return World(group.rank(), group.size(), launch.backend or "any", host, address, group)
