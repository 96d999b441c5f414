"""Ranks that are parts of one process: real connections and watch threads, and ends that are noted instead."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import NoReturn

import pytest

from hippo_mpi.errors import HippoError
from hippo_mpi.transport import control
from hippo_mpi.transport.control import Control
from hippo_mpi.transport.handshake import Contact
from hippo_mpi.transport.pulse import Activity
from hippo_mpi.transport.rank_messages import RankMessage
from hippo_mpi.transport.world import World

TIMEOUT_S = 60.0  # nothing here lasts so long: tests move what was noted into the past instead
LATE_S = TIMEOUT_S + 1
HANG_S = 30.0
_BEAT_S, _SPEED = 0.02, 40


def _exit(code: int) -> NoReturn:
    raise SystemExit(code)  # the end of a thread


class Rank(Control):
    """A rank whose end closes its connections, and is noted: the line that it printed, and its status."""

    def __init__(self, world: World) -> None:
        self.end: tuple[str | None, int] | None = None
        self.lines: list[str | None] = []
        self._is_ending, self._end_noted = threading.Lock(), threading.Event()
        self._is_over = False
        super().__init__(world, HANG_S, TIMEOUT_S)

    def _leave(self, line: str | None, code: int) -> NoReturn:
        if self._is_over:  # a process that has ended says nothing any more
            raise SystemExit(code)
        self.lines.append(line)
        try:
            super()._leave(line, code)
        except SystemExit:
            if self.end is None:
                self.end = line, code
            self.die()
            self._end_noted.set()
            raise

    def _send(self, rank: int, message: RankMessage) -> None:
        if not self._is_over:
            super()._send(rank, message)

    def die(self) -> None:
        """End as by a SIGKILL."""
        self._is_over = True
        self.own_status = self._end_thread
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _end_thread(self) -> NoReturn:
        raise SystemExit(0)

    @property
    def connections(self) -> list[socket.socket]:
        if self.world.size == 1:
            return []
        return [self._next, self._previous, *(reader._connection for reader in self._readers.values())]

    def awaits(self, doing: str) -> None:
        """Note that the main thread waits for another rank."""
        self.progress(doing, Activity.WAITING)

    @property
    def doing(self) -> str:
        return self._pulse.doing

    def await_end(self) -> tuple[str | None, int]:
        assert self._end_noted.wait(HANG_S), f"{self.world.name} hangs"
        assert self.end is not None
        return self.end

    def fail_beside(self, error: HippoError) -> None:
        """In a thread, as that ends with it."""
        threading.Thread(target=self.fail, args=[error], daemon=True).start()

    def send_raw(self, data: bytes) -> None:
        """Send bytes to rank 0, or of rank 0 to rank 1, if it is there."""
        connection = self._star.get(0 if self.world.rank else 1)
        if connection is not None:
            with contextlib.suppress(OSError):
                connection.sendall(data)

    def fall_silent(self) -> None:
        """Stop as by a SIGSTOP, if it hasn't ended meanwhile."""
        stopped = threading.Event()

        def wait() -> None:
            stopped.set()
            while not self._is_over:
                time.sleep(_BEAT_S)
            raise SystemExit(0)

        self.own_status = wait
        wait_until(lambda: stopped.is_set() or self._is_over, f"{self.world.name} doesn't stop")

    def age_word_of(self, rank: int) -> None:
        """Let a rank's last beat be older than may be."""
        self._peers[rank].beat_at -= LATE_S

    def age_progress(self, seconds: float = LATE_S) -> None:
        self._moved_at -= seconds

    def heard(self, rank: int, what: Callable[[control.Peer], bool]) -> None:
        """Wait until a rank has said something."""
        wait_until(lambda: what(self._peers[rank]), f"{self.world.name} didn't hear it of rank {rank}")


def wait_until(is_true: Callable[[], bool], complaint: str) -> None:
    ends_s = time.monotonic() + HANG_S
    while not is_true():
        assert time.monotonic() < ends_s, complaint
        time.sleep(_BEAT_S / 8)


def some_beats() -> None:
    """Time enough for every watch thread to look around."""
    time.sleep(4 * _BEAT_S)


Make = Callable[[int], list[Rank]]


@contextlib.contextmanager
def worlds(monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """A function that makes a world of so many ranks. In the end no thread and no descriptor of theirs is left."""
    fds, threads = len(os.listdir("/proc/self/fd")), set(threading.enumerate())
    hasty = SimpleNamespace(monotonic=time.monotonic, sleep=lambda seconds: time.sleep(seconds / _SPEED))
    patches = {"BEAT_S": _BEAT_S, "time": hasty, "_LAST_WORDS_S": 0.05, "deadline": lambda *_: contextlib.nullcontext()}
    for name, value in patches.items():
        monkeypatch.setattr(control, name, value)
    monkeypatch.setattr(os, "_exit", _exit)
    tell = threading.excepthook
    monkeypatch.setattr(threading, "excepthook", lambda what: None if what.exc_type is SystemExit else tell(what))
    made: list[Rank] = []

    def make(size: int) -> list[Rank]:
        met, contacts = threading.Barrier(size), dict[int, Contact]()

        def introduce(world: World, places: list[tuple[str, int]]) -> tuple[bytes, list[Contact]]:
            contacts[world.rank] = Contact(world.host, 0, tuple(places))
            met.wait(HANG_S)
            return b"key", [contacts[rank] for rank in range(size)]

        def join(rank: int) -> None:
            found[rank] = Rank(World(rank, size, "ring", f"h{rank}", ("127.0.0.1",)))

        monkeypatch.setattr(control, "introduce", introduce)
        found: dict[int, Rank] = {}
        joining = [threading.Thread(target=join, args=[rank]) for rank in range(size)]
        for thread in joining:
            thread.start()
        for thread in joining:
            thread.join()
        ranks = [found[rank] for rank in range(size)]
        made.extend(ranks)
        return ranks

    yield make
    for rank in made:
        rank.die()
    wait_until(lambda: threads >= set(threading.enumerate()), "a thread is left")
    for rank in made:
        for connection in rank.connections:
            connection.close()
    assert len(os.listdir("/proc/self/fd")) == fds
