"""Start the ranks, notice when they fail, end what is left of them, and start them again on the hosts that answer.

Local ranks are started one by one. On other hosts our starter starts them or, with --backend mpi, mlx.launch's mpirun.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hippo_mpi.cluster.host_checks import linked, reachable
from hippo_mpi.cluster.hostfile import Host, Hostfile
from hippo_mpi.cluster.hosts import installed
from hippo_mpi.cluster.starting.start_plan import START, start_plan
from hippo_mpi.environment import LOG_LINES, STATUS_FILE, TERMINAL
from hippo_mpi.errors import ForeignError, HippoError, UserError
from hippo_mpi.serving.supervision.messages import FRONT, MAX_LINE_BYTES
from hippo_mpi.serving.supervision.request_broker import RequestBroker
from hippo_mpi.transport.ports import HeldPorts, new_loopback
from hippo_mpi.transport.run_key import RunKey
from hippo_mpi.transport.status_file import read_status

_log = logging.getLogger(__name__)
_BACKOFF_S = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0)
_END_S = 3.0
_DIE_S = 2.0  # from SIGKILL: only a process that waits for a device or a network disk takes longer
_LOOK_S = 0.05

# Rows that join or leave a batch are copies of its caches. On Linux MLX asks malloc for each, which gets new pages from
# the system and gives them back at once, unless told to keep them, in huge pages: 1,000 page faults instead of
# 2,400,000, and 0.95 of the time, for 16 prompts of 512 tokens with 64 to answer (86M parameters, one core).
_TUNABLES = "GLIBC_TUNABLES"
_KEEP_MEMORY = ":".join(
    f"glibc.malloc.{name}={value}"
    for name, value in {
        "hugetlb": 1,
        "mmap_threshold": 4 << 30,
        "trim_threshold": 8 << 30,
        "top_pad": 256 << 20,
    }.items()
)


class _Arrived(asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]]):
    """Connections that nobody serves yet; those of a start that is over are closed."""

    is_over = False

    def take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Take a new connection."""
        if self.is_over:
            writer.close()
        else:
            self.put_nowait((reader, writer))

    def close(self) -> None:
        """Close what has come, and what will."""
        self.is_over = True
        while not self.empty():
            self.get_nowait()[1].close()


@dataclass(frozen=True)
class LaunchPlan:
    """How the ranks are started.

    Args:
        words: what every rank runs: the words behind Python's name.
        num_local: ranks on this machine, if there are no others.
        hostfile: where they are, otherwise.
        backend: by which they are joined there.
    """

    words: Sequence[str]
    num_local: int = 0
    hostfile: Hostfile | None = None
    backend: str = "ring"

    @property
    def num_ranks(self) -> int:
        """How many ranks are started."""
        return len(self.hostfile.hosts) if self.hostfile else self.num_local


class RankGroup:
    """The processes of one start, each in a session of its own.

    Args:
        folder: an empty folder for their files.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._status_file = folder, folder / "status"
        self._processes: list[subprocess.Popen[bytes]] = []
        self._ports: HeldPorts | None = None

    def start(self, plan: LaunchPlan, front: Path, key: RunKey) -> None:
        """Start the processes.

        Args:
            plan: how.
            front: path of the socket on which the front listens for rank 0.
            key: of the run.

        Raises:
            OSError: this machine can't start another process; those that run must still be ended.
            LaunchError: this machine has no free ports.
        """
        env = {
            **os.environ,
            FRONT: str(front),
            STATUS_FILE: str(self._status_file),
            **key.environment,
            TERMINAL: str(int(sys.stderr.isatty())),
            LOG_LINES: "1",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
            _TUNABLES: os.environ.get(_TUNABLES, _KEEP_MEMORY),
        }
        if plan.hostfile:
            given = {name: env[name] for name in (FRONT, STATUS_FILE, LOG_LINES, _TUNABLES)}
            self._ports = HeldPorts(sum(max(1, len(host.ips)) for host in plan.hostfile.hosts))
            if plan.backend == "mpi":
                self._start_mpi(plan, env, given | key.passed_on)
            else:
                job = start_plan(plan.hostfile, plan.backend, plan.words, self._ports.first)
                self._start(
                    START, env, replace(job, environment={**job.environment, **given, **key.environment}).encode()
                )
            return
        self._ports = HeldPorts(plan.num_local)
        first, address = self._ports.first, new_loopback()
        ring = self._folder / "ring.json"
        ring.write_text(json.dumps([[f"{address}:{first + rank}"] for rank in range(plan.num_local)]))
        for rank in range(plan.num_local):
            own = {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(ring)}
            self._start([sys.executable, *plan.words], {**env, **own})

    def _start_mpi(self, plan: LaunchPlan, env: dict[str, str], given: dict[str, str]) -> None:
        assert plan.hostfile
        hostfile = self._folder / "hosts.json"
        hostfile.write_text(plan.hostfile.to_json())
        words = [word for name, value in given.items() for word in ("--env", f"{name}={value}")]
        launcher = [installed("mlx.launch"), "--backend", "mpi", "--hostfile", str(hostfile), *words]
        self._start([*launcher, "--", sys.executable, *plan.words], env)

    def _start(self, command: Sequence[str], env: dict[str, str], lifeline: bytes = b"") -> None:
        """Start a process, which lives on while its input is open if it is given some."""
        stdin = subprocess.PIPE if lifeline else subprocess.DEVNULL
        process = subprocess.Popen(list(command), env=env, stdin=stdin, start_new_session=True)
        self._processes.append(process)
        if process.stdin:
            with contextlib.suppress(BrokenPipeError):  # it has ended, which is seen
                process.stdin.write(lifeline)
                process.stdin.flush()

    @property
    def has_ended(self) -> bool:
        """Whether a process has ended."""
        return any(process.poll() is not None for process in self._processes)

    def status(self) -> int | None:
        """Return the exit status of ranks that have ended; None while all run.

        Rank 0 leaves it in a file, since mlx.launch always exits with 0; without one it is that of a process, a bad one
        first.
        """
        if found := read_status(self._status_file):
            return found[0]
        codes = [code for process in self._processes if (code := process.poll()) is not None]
        return max(codes, key=abs, default=None)

    @property
    def last_words(self) -> str:
        """The line in which rank 0 said why it ended; empty if it didn't."""
        found = read_status(self._status_file)
        return found[1] if found else ""

    async def wait(self) -> None:
        """Wait until a process has ended."""
        while not self.has_ended:
            await asyncio.sleep(_LOOK_S)

    async def end(self) -> None:
        """End what still runs: with SIGTERM first, so that a launcher can end other hosts' ranks, then with SIGKILL."""
        try:
            # Stop all first, so that none sees another end and reports that as a failure.
            for number in (signal.SIGSTOP, signal.SIGTERM, signal.SIGCONT):
                self._signal(number)
            await self._await_ends(_END_S)
        finally:  # a launcher's children may outlive it
            self._signal(signal.SIGKILL)
            for left in await self._await_ends(_DIE_S):
                _log.error("rank process %d didn't exit even after SIGKILL: it may wait for a device or a disk", left)
            if self._ports is not None:
                self._ports.close()

    async def _await_ends(self, most_s: float) -> list[int]:
        """Wait for at most so many seconds; return the processes that are left."""
        ends = time.monotonic() + most_s
        while (left := [p.pid for p in self._processes if p.poll() is None]) and time.monotonic() < ends:
            await asyncio.sleep(_LOOK_S)
        return left

    def _signal(self, number: signal.Signals) -> None:
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)


class _LastWords(asyncio.StreamReader):
    """Keeps what rank 0 said before its connection was reset.

    Which requests it had begun decides which are suspected of its death; asyncio's own reader drops what it holds when a
    connection fails.
    """

    def set_exception(self, exc: Exception) -> None:
        _log.debug("rank 0's connection: %s", exc)
        self.feed_eof()


def _open_stream(arrived: _Arrived) -> asyncio.StreamReaderProtocol:
    return asyncio.StreamReaderProtocol(_LastWords(limit=MAX_LINE_BYTES), arrived.take)


class Supervisor:
    """Keeps ranks behind a front.

    Args:
        make_plan: returns how the ranks of a model (its name) are started on some hosts (their numbers; None: all).
        hosts: where ranks may run; none: on this machine only.
        start_s: seconds that rank 0 has to connect after a start.
        silence_s: seconds without a message after which rank 0 counts as lost.
        max_restarts: consecutive rank failures, without progress, that a request survives.
    """

    def __init__(
        self,
        broker: RequestBroker,
        make_plan: Callable[[str, Sequence[int] | None], Awaitable[LaunchPlan]],
        hosts: Sequence[Host],
        start_s: float,
        silence_s: float,
        max_restarts: int,
    ) -> None:
        self._broker, self._make_plan, self._hosts = broker, make_plan, hosts
        self._start_s, self._silence_s, self._max_restarts = start_s, silence_s, max_restarts

    async def run(self) -> None:
        """Keep ranks running until cancelled.

        Raises:
            UserError: the first start failed because of something that was typed or configured.
        """
        broker, failures = self._broker, 0
        while True:
            broker.has_progressed = False
            try:
                why = await self._serve_once()
            except (OSError, HippoError) as error:  # no more processes, memory or ports, a folder or the hub away
                if not broker.num_starts:
                    raise (
                        error if isinstance(error, HippoError) else UserError(f"the ranks can't be started: {error}")
                    ) from None
                why = str(error).partition("\n")[0]
            if why is None:
                failures = 0
                continue
            failures = 1 if broker.has_progressed else failures + 1
            in_vain = f"its ranks failed {failures} times while loading it, most recently: {why}"
            if failures > self._max_restarts and broker.give_up_model(in_vain):
                failures = 0
                continue
            _log.warning("the ranks failed (%s); restarting them", why)
            broker.lose_ranks(why, self._max_restarts)
            broker.take_turn()
            broker.num_restarts += 1
            await asyncio.sleep(_BACKOFF_S[min(failures - 1, len(_BACKOFF_S) - 1)])

    async def _serve_once(self) -> str | None:
        """Run the ranks once; return why they ended, or None if it is another model's turn."""
        # A folder for each start: whoever cleans up /tmp ends this one at most.
        with tempfile.TemporaryDirectory(prefix="hippo-serve-", ignore_cleanup_errors=True) as name:
            folder, arrived = Path(name), _Arrived()
            server = await asyncio.get_running_loop().create_unix_server(
                lambda: _open_stream(arrived), str(folder / "front"), start_serving=False
            )
            group = RankGroup(folder)
            try:
                await server.start_serving()
                key = RunKey()
                group.start(await self._plan(key), folder / "front", key)
                return await self._live(group, arrived)
            finally:
                server.close()
                await group.end()
                arrived.close()

    async def _live(self, group: RankGroup, arrived: _Arrived) -> str | None:
        """Serve with started ranks until they fail (return why) or it is another model's turn (None)."""
        broker = self._broker
        ended, connected = asyncio.ensure_future(group.wait()), asyncio.ensure_future(arrived.get())
        try:
            await asyncio.wait({ended, connected}, return_when="FIRST_COMPLETED", timeout=self._start_s)
        finally:
            if not connected.done():
                connected.cancel()
                ended.cancel()
        if connected.cancelled() or not connected.done():
            return self._why(group) if group.has_ended else f"no rank connected within {self._start_s:.0f} s"
        serving = asyncio.ensure_future(broker.serve_ranks(*connected.result(), self._silence_s))
        try:
            is_turned = await self._until_turn({ended, serving})
            await asyncio.wait({serving}, timeout=_END_S)  # rank 0 may still have something to tell
            if is_turned or not broker.was_ready:  # ranks that were never ready: their exit status says why
                await asyncio.wait({ended}, timeout=_END_S)
        finally:
            ended.cancel()
            serving.cancel()
        if is_turned:
            return None
        if not broker.was_ready and group.has_ended:
            return self._why(group)
        seen = serving.result() if serving.done() and not serving.cancelled() else "a rank exited"
        return group.last_words or seen

    async def _until_turn(self, lives: set[asyncio.Future[Any]]) -> bool:
        """Wait until the ranks fail (False), or it is another model's turn (True)."""
        while True:
            turn = asyncio.ensure_future(self._broker.turn_is_over.wait())
            try:
                await asyncio.wait({*lives, turn}, return_when="FIRST_COMPLETED")
            finally:
                turn.cancel()
            if any(life.done() for life in lives):
                return False
            if self._broker.take_turn():
                return True

    async def _plan(self, key: RunKey) -> LaunchPlan:
        """Plan a start on the hosts that answer.

        The context of the first start is kept, even if less memory is free by now: else answers could not go on. So is
        the layout that as many ranks had chosen: another one could round otherwise, and change a word of them.
        """
        about, living = self._broker.about, None
        if self._hosts:
            found = await reachable(self._hosts)
            if self._broker.num_starts:
                found = await linked(self._hosts, found)
            silent = [host.ssh for index, host in enumerate(self._hosts) if index not in found]
            living = found if silent else None
            self._broker.silent_hosts = silent
            if silent:
                _log.warning("starting without %s: no answer", ", ".join(silent))
        plan = await self._make_plan(self._broker.model, living)
        where = (
            ", ".join(host.ssh for host in plan.hostfile.hosts) if plan.hostfile else f"this machine ({plan.num_local})"
        )
        _log.info("starting the ranks of %s on %s", self._broker.model, where)
        if about is None:
            return plan
        words = ["--max-context", str(about.max_context)]
        if about.layout is not None and len(about.ranks) == plan.num_ranks:
            words += ["--layout", about.layout]
        return replace(plan, words=[*plan.words, *words])

    def _why(self, group: RankGroup) -> str | None:
        """Return what the exit status says of ranks that never became ready.

        At the first start a mistake of the user's or ours ends everything; later one of the user's ends this model's turn
        (None), if there is another model to return to.
        """
        code = group.status()
        if code in (UserError.exit_code, ForeignError.exit_code):  # the next start would end alike
            if not self._broker.num_starts:
                kind = UserError if code == UserError.exit_code else ForeignError
                raise kind("the ranks didn't start; see their error above")
            # A mistake of ours may not come again; nor may what is wrong with a model that could be loaded before, such as
            # a disk that is full now.
            refused = code == UserError.exit_code and self._broker.about is None
            if refused and self._broker.give_up_model("its ranks reject it; see the server's log"):
                return None
        return group.last_words or f"exit status {code}"
