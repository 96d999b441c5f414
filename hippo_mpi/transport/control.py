"""The control sockets beside the data: plans, heartbeats, failures.

MLX's receives can't time out and spin while they wait, so each rank keeps plain TCP connections too: one to
the next rank of the ring, on which the announcement of every message travels (an idle rank sleeps on it), and
one to rank 0, on which ranks report, beat and fail. Addresses travel over the data plane, and are proved there.

A watch thread on every rank turns a closed connection, silence, or a lack of progress into one clear line and
the end of the process: whatever the main thread waits for, it can't hang.

Knows ranks and bytes. Must not know models or steps.
"""

from __future__ import annotations

import contextlib
import os
import queue
import select
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NoReturn, TypeVar

import msgspec

from hippo_mpi.errors import ForeignError, HippoError, RankError, UserError, print_error
from hippo_mpi.transport.frames import FrameReader, framed, read_frame
from hippo_mpi.transport.handshake import introduce, listen, places_of
from hippo_mpi.transport.meeting import Meeting, in_own_thread
from hippo_mpi.transport.processes import kill_rank_if_stopped, kill_stopped_ranks
from hippo_mpi.transport.pulse import Activity, Pulse
from hippo_mpi.transport.rank_messages import Beat, Bye, Failure, RankMessage, Report, decode_message, encode
from hippo_mpi.transport.rank_status import RankStatus
from hippo_mpi.transport.world import World, deadline

_M = TypeVar("_M")
BEAT_S = 0.5
_LOOK_S = 0.005
_LAST_WORDS_S = 5.0  # that the end of a process may take, which tells people why
_STALLED_SHARE = 0.25  # of the timeout: after so long without progress people are told, and nothing is ended yet
_SAME_S = 0.5  # what is wrong with options or a model, every rank may find: rank 0 says it first, without a rank's name


@dataclass
class Peer:
    """What rank 0 knows of a rank (other ranks: of rank 0)."""

    name: str
    beat_at: float
    pid: int | None = None  # if it is a process of this host
    progress: int = 0
    doing: str = "starting"
    longest_s: float = 0.0  # its longest step so far
    said_bye: bool = False
    status: RankStatus | None = None  # what it last said of itself


class Control:
    """This rank's control connections, and its watch thread. Without peers (a world of one) nothing is sent.

    Args:
        start_timeout_s: how long ranks wait for each other's connections.
        timeout_s: how long a rank may be silent, or all of them get nothing done, before all end.
    """

    def __init__(self, world: World, start_timeout_s: float, timeout_s: float) -> None:
        self.world, self.timeout_s = world, timeout_s
        self.hosts = [world.host]
        """Names of the ranks' hosts."""
        self._own_name = f"rank {world.rank} ({world.host})"
        self.names = [self._own_name]
        """What the ranks are called in errors."""
        self._reports: queue.Queue[tuple[int, msgspec.Raw]] = queue.Queue()
        self._star: dict[int, socket.socket] = {}
        self._readers: dict[int, FrameReader] = {}
        self._peers: dict[int, Peer] = {}
        self._unconnected: list[int] = []  # processes of ranks of this host that have no star connection to this one
        self._write_lock = threading.Lock()
        self._end_lock = threading.Lock()
        self._pulse = Pulse(timeout_s)
        self._moved_at = time.monotonic()
        self._closing = False
        self.on_end: Callable[[int, str], None] = lambda code, why: None  # told of a bad end
        self.own_status: Callable[[], RankStatus | None] = lambda: None  # asked by the watch thread
        if world.size > 1:
            self._connect(start_timeout_s)
        threading.Thread(target=self._watch, name="hippo-watch", daemon=True).start()

    # ---- what the main thread says about itself

    def progress(self, doing: str, activity: Activity = Activity.OTHER) -> None:
        """Note that something was finished, and what comes next, in words: the deadline starts anew."""
        self._moved_at = time.monotonic()  # first: the watch thread must not see an old time and "not idle"
        self._pulse.progress(doing, activity)

    def idle(self) -> None:
        """Note that nothing is due: no deadline runs until the next `progress`."""
        self._pulse.idle()

    @contextlib.contextmanager
    def pausing(self) -> Iterator[None]:
        """Suspend the deadline inside: people who read what we write may take their time."""
        before = self._pulse.doing, self._pulse.activity
        self.idle()
        try:
            yield
        finally:
            self.progress(*before)

    @contextlib.contextmanager
    def waiting(self, doing: str) -> Iterator[None]:
        """Count what is done inside as no work, though it may use the CPU: MLX spins while it waits."""
        before = self._pulse.doing, self._pulse.activity
        self.progress(doing, Activity.WAITING)
        yield
        self.progress(*before)

    def fail(self, error: HippoError) -> NoReturn:
        """Tell everyone and end this process. Rank 0 prints."""
        line = str(error) if self.world.rank == 0 else f"{self._own_name}: {error}"
        if self.world.rank == 0:
            self._end_all(line, error.exit_code)
        if isinstance(error, UserError):
            time.sleep(_SAME_S)
        self._send(0, Failure(line, error.exit_code))
        time.sleep(2.0)  # rank 0 answers with the end; if it can't, we leave anyway
        is_heard = 0 in self._star and not self._peers[0].said_bye
        self._leave(line if self.world.rank == 1 and not is_heard else None, error.exit_code)  # as _on_failure

    def statuses(self) -> list[RankStatus | None]:
        """Return what every rank said of itself in its last beat, by rank; on rank 0."""
        peers = dict(self._peers)
        return [self.own_status(), *(peers[rank].status for rank in sorted(peers))]

    @property
    def stalled_s(self) -> float:
        """On rank 0, seconds without progress of any rank though something is due; 0 while that may still be a long step."""
        silent_s = time.monotonic() - self._moved_at
        is_long = silent_s > self._patience_s() - self.timeout_s * (1 - _STALLED_SHARE)
        return silent_s if is_long and not self._pulse.is_idle else 0.0

    # ---- reports: small messages between rank 0 and the others, of any type that msgspec knows, such as a dataclass

    def report(self, message: object, to: int = 0) -> None:
        """Send a message to rank `to`."""
        self._send(to, Report(msgspec.Raw(encode(message))))

    def next_report(self, kind: type[_M], waits: bool = True) -> _M:
        """Return the next message of rank 0. The watch thread keeps the deadline.

        Raises:
            queue.Empty: there is none yet, and nobody `waits`.
        """
        return msgspec.json.decode(self._reports.get(block=waits)[1], type=kind)

    def gather(self, message: _M) -> list[_M] | None:
        """Return every rank's message on rank 0, by rank; None elsewhere. The watch thread keeps the deadline."""
        if self.world.rank != 0:
            self.report(message)
            return None
        gathered = {0: message}
        while len(gathered) < self.world.size:
            rank, body = self._reports.get()
            gathered[rank] = msgspec.json.decode(body, type=type(message))
            self.progress("gathering reports")
        return [gathered[rank] for rank in range(self.world.size)]

    def share(self, message: _M | None, kind: type[_M]) -> _M:
        """Return rank 0's message on every rank."""
        if self.world.rank == 0:
            assert message is not None
            for rank in list(self._star):
                self.report(message, rank)
            return message
        return self.next_report(kind)

    def meet(self) -> None:
        """Wait until rank 0 has come here, too."""
        self.share(True if self.world.rank == 0 else None, bool)

    # ---- announcements around the ring

    def announce(self, header: bytes) -> None:
        """Tell the next rank what message comes. Small, so it doesn't block."""
        try:
            self._next.sendall(framed(header))
        except OSError as error:
            self._lost((self.world.rank + 1) % self.world.size, str(error))

    def await_announcement(self) -> bytes:
        """Sleep until the rank before announces a message. The watch thread keeps the deadline."""
        before = (self.world.rank - 1) % self.world.size
        try:
            frame = read_frame(self._previous)
        except OSError as error:
            self._lost(before, str(error))
        if frame is None:
            self._lost(before, "its connection closed")
        return frame

    # ---- the end

    def close(self) -> None:
        """Announce a good end: from now on no closed connection is a failure. Rank 0 calls it first."""
        self._closing = True
        for rank in list(self._star):
            self._send(rank, Bye())

    def part(self) -> None:
        """Hang up; rank 0 waits until all others have, or have ended: it leaves no stopped one behind.

        They don't wait for the system to take their memory back, which takes seconds for a big model. The caller keeps
        the deadline.
        """
        if self.world.rank > 0:
            for connection in list(self._star.values()):
                with contextlib.suppress(OSError):  # rank 0 has hung up
                    connection.shutdown(socket.SHUT_RDWR)
            return
        while self._star:
            time.sleep(_LOOK_S)

    def _connect(self, timeout_s: float) -> None:
        world = self.world
        with contextlib.ExitStack() as stack:
            listeners = listen(world, stack)
            complaint = f"{world.name} waited {timeout_s:.0f} s for the addresses of the other ranks"
            with deadline(timeout_s, complaint):
                key, contacts = introduce(world, places_of(world, listeners))
            self.hosts = [who.host for who in contacts]
            self.names = [f"rank {rank} ({host})" for rank, host in enumerate(self.hosts)]
            successor, predecessor = (world.rank + 1) % world.size, (world.rank - 1) % world.size
            calls = {"ring": (successor, contacts[successor].places_from(world)[:1])}
            if world.rank > 0:
                calls["star"] = 0, contacts[0].places_from(world)
            expected = {("ring", predecessor)}
            expected |= {("star", rank) for rank in range(1, world.size)} if world.rank == 0 else set()
            made, found = in_own_thread(
                Meeting(key, world.rank, self.names).meet(listeners, calls, expected, timeout_s)
            )
        self._next, self._previous = made["ring"], found.pop(("ring", predecessor))
        self._star |= {0: made["star"]} if world.rank > 0 else {rank: one for (_, rank), one in found.items()}
        for connection in (self._next, *self._star.values()):
            _limit_sends(connection, self.timeout_s)
        now = time.monotonic()
        self._readers = {rank: FrameReader(connection) for rank, connection in self._star.items()}
        pids = [who.pid if who.host == world.host else None for who in contacts]
        self._peers = {rank: Peer(self.names[rank], now, pids[rank]) for rank in self._star}
        self._unconnected = [pid for rank, pid in enumerate(pids) if rank not in self._star and pid is not None]

    def _send(self, rank: int, message: RankMessage) -> None:
        data = encode(message)
        connection = self._star.get(rank)
        if connection is None:
            return  # it has closed meanwhile, and the watch thread knows
        try:
            with self._write_lock:
                connection.sendall(framed(data))
        except OSError:
            pass  # the watch thread sees the closed connection and says so

    def _lost(self, rank: int, why: str) -> NoReturn:
        """The main thread lost a ring neighbour: the watch thread knows more, so leave it the word for a while."""
        time.sleep(1.0)
        if self._closing:
            os._exit(0)
        self.fail(RankError(f"lost {self.names[rank]} while {self._pulse.doing}: {why}"))

    # ---- the watch thread

    def _watch(self) -> None:
        try:
            self._watch_peers()
        except Exception as error:  # without this thread there is no deadline
            self.fail(ForeignError.caused_by(error, "the watch thread"))

    def _watch_peers(self) -> NoReturn:
        beat_at = 0.0
        while True:
            readable, _, _ = select.select(list(self._star.values()), [], [], BEAT_S / 2)
            for rank, connection in list(self._star.items()):
                if connection in readable:
                    self._read(rank)
            now = time.monotonic()
            if now - beat_at > BEAT_S:
                beat_at = now
                beat = self._beat()
                for rank in list(self._star):
                    self._send(rank, beat)
            if not self._closing:
                self._check(now)

    def _beat(self) -> Beat:
        """Return what the other ranks hear of this one, which moves the deadline here, too, while it is at work."""
        pulse, works = self._pulse, self._pulse.is_working()
        if works:
            self._moved_at = time.monotonic()
        return Beat(pulse.count, pulse.doing, works, pulse.longest_s, self.own_status())

    def _read(self, rank: int) -> None:
        peer = self._peers[rank]
        try:
            frame = self._readers[rank].read()
        except OSError:
            del self._star[rank]
            if not peer.said_bye and not self._closing:
                self._on_failure(f"{peer.name} died; it was {peer.doing}, and {self._own_name} was {self._pulse.doing}")
            return
        if frame is None:
            return  # a part of one
        peer.beat_at = time.monotonic()
        match decode_message(frame):
            case Beat() as beat:
                if beat.progress != peer.progress or beat.is_working:
                    self._moved_at = time.monotonic()
                peer.progress, peer.doing, peer.status = beat.progress, beat.doing, beat.status
                peer.longest_s = beat.longest_s
            case Report(body):
                self._reports.put((rank, body))
            case Bye():
                peer.said_bye = True
            case Failure(line, code) if self.world.rank == 0:
                self._end_all(line, code)
            case Failure(_, code):
                self._leave(None, code)

    def _check(self, now: float) -> None:
        for peer in self._peers.values():
            silent_s = now - peer.beat_at
            if silent_s > self.timeout_s and not peer.said_bye:
                self._on_failure(
                    f"{peer.name} sent no heartbeat for {silent_s:.1f} s; it was {peer.doing}, and"
                    f" {self._own_name} was {self._pulse.doing}"
                )
        if self.world.rank == 0 and not self._pulse.is_idle and now - self._moved_at > self._patience_s():
            ranks = [f"{self._own_name} is {self._pulse.doing}"]
            ranks += [f"{peer.name} is {peer.doing}" for peer in self._peers.values()]
            self._on_failure(f"no rank made progress for {now - self._moved_at:.0f} s: {'; '.join(ranks)}")

    def _patience_s(self) -> float:
        """Return how long all ranks may get nothing done: a step like the longest so far must not be cut short."""
        longest_s = max([self._pulse.longest_s, *(peer.longest_s for peer in self._peers.values())])
        return self.timeout_s + 2 * longest_s

    def _on_failure(self, line: str) -> None:
        if self.world.rank == 0:
            self._end_all(line, RankError.exit_code)
        # Rank 0 itself is gone: of the others, rank 1 speaks.
        self._leave(line if self.world.rank == 1 else None, RankError.exit_code)

    def _end_all(self, line: str, code: int) -> NoReturn:
        with self._end_lock:  # the first failure is the cause; later ones follow from it
            for rank in list(self._star):
                self._send(rank, Failure(line, code))
            self._leave(line, code)

    def _leave(self, line: str | None, code: int) -> NoReturn:
        """End this process at once: an orderly end would wait in MPI_Finalize for ranks that are gone."""
        last = threading.Timer(_LAST_WORDS_S, os._exit, [code])  # a full pipe, or a full disk, must not hold us up
        last.daemon = True
        last.start()
        killing = threading.Thread(target=self._kill_stopped, daemon=True)
        killing.start()  # beside what is said, of which neither may wait for the other
        if line is not None:
            print_error(
                line, starts_anew=self._pulse.is_idle
            )  # while a person is asked, the cursor is behind the prompt
        with contextlib.suppress(Exception):
            if self.world.rank == 0:
                self.on_end(code, line or "")
            if threading.current_thread() is threading.main_thread():  # elsewhere a full pipe could hold us up
                sys.stdout.flush()
        killing.join()
        os._exit(code)

    def _kill_stopped(self) -> None:
        """Kill ranks of this host that a signal has stopped: a launcher would wait for them for ever."""
        kill_stopped_ranks(os.getppid())
        now = time.monotonic()
        for peer in self._peers.values() if self.world.backend != "mpi" else ():  # mpirun does it, with our exit status
            if peer.pid is not None and now - peer.beat_at > self.timeout_s and not peer.said_bye:
                for pid in (peer.pid, *self._unconnected):  # if rank 0 is stopped, nobody else looks after the others
                    kill_rank_if_stopped(pid)


def _limit_sends(connection: socket.socket, timeout_s: float) -> None:
    """Let a send fail when the other side has taken nothing for so long; receives still wait."""
    whole_s = max(1, round(timeout_s))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", whole_s, 0))
