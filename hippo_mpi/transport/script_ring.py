"""The ranks of a user's script: a group that the script made, or one of ours, with deadlines and a common end.

The script runs on every rank and may end in any way: a rank that dies, raises or leaves while another waits for it ends
all of them, with a line that names it.

Knows ranks. Must not know models.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import socket
import sys
import threading
from abc import abstractmethod
from collections.abc import Iterator
from types import TracebackType
from typing import NoReturn, Protocol, TypeVar

import mlx.core as mx
import msgspec

from hippo_mpi.errors import DesyncError, HippoError, LaunchError, UserError, interrupted
from hippo_mpi.transport.channel import RingChannel
from hippo_mpi.transport.control import Control
from hippo_mpi.transport.layout import Layout
from hippo_mpi.transport.world import World, connect, control_addresses, detect_launch, end_within

Group = mx.distributed.Group
_M = TypeVar("_M")

_MIN_EXIT_TIMEOUT_S = 10.0  # to wait for the other ranks to end, on a busy machine


class ScriptControl(Control):
    """The control connections of a script's rank."""

    def fail(self, error: HippoError) -> NoReturn:
        """End all ranks with an error; a single rank raises it instead, as there are no others to end."""
        if self.world.size == 1:
            self.idle()
            raise error
        super().fail(error)

    def next_report(self, kind: type[_M], waits: bool = True) -> _M:
        """Return the next message of rank 0; end all ranks if it is of another kind."""
        with self._expecting():
            return super().next_report(kind, waits)

    def gather(self, message: _M) -> list[_M] | None:
        """Return every rank's message on rank 0; end all ranks if one is of another kind."""
        with self._expecting():
            return super().gather(message)

    @contextlib.contextmanager
    def _expecting(self) -> Iterator[None]:
        try:
            yield
        except msgspec.ValidationError as error:
            why = f"ranks are at different calls ({error}): every rank of a script must make the same calls"
            self.fail(DesyncError(why))

    def hang_up(self) -> None:
        """Close all connections, so that a rank that still waits for this one learns that it is gone."""
        self._end_lock.acquire()  # the interpreter ends, perhaps before another failure's line is written: others write it
        self.close()
        for connection in (self._next, self._previous):
            with contextlib.suppress(OSError):  # the other side has closed it first
                connection.shutdown(socket.SHUT_RDWR)


class RingLoop(Protocol):
    """A loop of the script that uses the ring in every turn, on all ranks."""

    @property
    @abstractmethod
    def is_left(self) -> bool:
        """True if the script can't go on with it."""

    @abstractmethod
    def close(self) -> None:
        """End it on this rank; the others do, too."""


class ScriptRing:
    """This rank's connections to the others of a script, made once and shared by all of its models.

    Args:
        world: the ranks.
        start_timeout_s: seconds that ranks wait for each other's connections.
        timeout_s: seconds that a rank may be silent, or all may be without progress, before all end.
    """

    def __init__(self, world: World, start_timeout_s: float, timeout_s: float) -> None:
        self.world = world
        self.control = ScriptControl(world, start_timeout_s, timeout_s)
        self.control.idle()
        self.channel = RingChannel(world, self.control, Layout(world.size))
        self._num_models = 0
        self.open_loop: RingLoop | None = None
        self._pid, self._thread = os.getpid(), threading.current_thread()
        if world.size > 1:
            self._before = sys.excepthook
            sys.excepthook = self._end_all
            atexit.register(self._leave)

    def next_number(self) -> int:
        """Return a number for a model, the same on all ranks, because they set up their models in the same order."""
        self._num_models += 1
        return self._num_models

    def settle(self, own: RingLoop | None = None) -> None:
        """Make the ring free for something that all ranks begin now: end the loop that the script has left.

        Args:
            own: a loop that is to end even if the script could go on with it.

        Raises:
            UserError: the script is inside a loop.
        """
        if threading.current_thread() is not self._thread:
            here, there = threading.current_thread().name, self._thread.name
            self.control.fail(
                LaunchError(f"a model was called in thread {here}: call it from the thread that loaded it, {there}")
            )
        loop = self.open_loop
        if loop is not None and loop is not own and not loop.is_left:
            raise UserError("another LLM is in use: leave the loop over its answers first, or call its close()")
        self.close_loop()

    def close_loop(self) -> None:
        """End the open loop, if there is one."""
        loop, self.open_loop = self.open_loop, None
        if loop is not None:
            loop.close()

    def _end_all(self, kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
        """End every rank because of the exception that ended the script on this one."""
        self._before(kind, error, where)
        if os.getpid() != self._pid:
            return  # a forked child isn't a rank
        if isinstance(error, KeyboardInterrupt):
            self.control.fail(interrupted())
        self.control.fail(HippoError(f"the script raised {kind.__name__}: {' '.join(str(error).split())}"))

    def _leave(self) -> None:
        """End this rank in an orderly way, or with an error line if the others don't end in time."""
        if os.getpid() != self._pid:
            return  # a forked child isn't a rank
        with contextlib.suppress(RuntimeError):  # MLX's: this is another thread than the loop's
            self.close_loop()
        end_s = max(self.control.timeout_s, _MIN_EXIT_TIMEOUT_S)
        end_within(end_s, f"{self.world.name} waited {end_s:.0f} s for the other ranks to end")
        with contextlib.suppress(RuntimeError):  # the receiver is gone, so nobody needs the message
            self.channel.flush()
        self.control.hang_up()
        self.world.group = None  # MPI is finalized when the last reference is dropped


_joined: list[ScriptRing] = []


def join(group: Group | None, start_timeout_s: float, timeout_s: float) -> ScriptRing:
    """Return this script's ring; the first call makes it and waits for the other ranks.

    Args:
        group: from `mx.distributed.init()`; None: the one that the launcher's environment describes.
        start_timeout_s: seconds that ranks wait for each other to start.
        timeout_s: seconds that a rank may be silent, or all may be without progress, before all end.

    Raises:
        LaunchError: the group isn't what the launcher has started, or isn't the one of the first call.
        UserError: the script is inside a loop over an LLM's answers.
        RankError: another rank doesn't answer.
    """
    if _joined:
        world = _joined[0].world
        if group is not None and (group.rank(), group.size()) != (world.rank, world.size):
            raise LaunchError(
                f"this script has already joined as rank {world.rank} of {world.size}, and can't join another group as rank"
                f" {group.rank()} of {group.size()}"
            )
        _joined[0].settle()
        return _joined[0]
    world = connect(detect_launch(), start_timeout_s) if group is None else _world_of(group)
    _joined.append(ScriptRing(world, start_timeout_s, timeout_s))
    return _joined[0]


def _world_of(group: Group) -> World:
    """Return the World of a group that the script has made.

    Raises:
        LaunchError: the group has another size than the launcher's environment says.
    """
    launch = detect_launch()
    if launch.size is not None and launch.size != group.size():
        raise LaunchError(
            f"the launcher started {launch.size} ranks, but this group has {group.size()}: import hippo_mpi before"
            " mx.distributed.init(), or leave the group out"
        )
    host = socket.gethostname()
    if group.size() == 1:
        return World(0, 1, "none", host, ("127.0.0.1",))
    return World(group.rank(), group.size(), launch.backend or "any", host, control_addresses(launch), group)
