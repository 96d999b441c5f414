"""Programs of ours on hosts, each through one ssh that stays open: Python source goes in, lines of JSON go both ways.

Nothing is left on the host, and nothing outlives us there: a program ends with its standard input, or when that has
said nothing for a while. This machine's runs without ssh.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hippo_mpi.cluster.hostfile import Host
from hippo_mpi.cluster.programs.far_end import SILENCE_S
from hippo_mpi.cluster.programs.find_python import NO_PYTHON, script_of, through_ssh
from hippo_mpi.errors import RankError
from hippo_mpi.transport.ports import THIS_MACHINE
from hippo_mpi.transport.run_key import SSH
from hippo_mpi.units import visible

_MARK = "hippo-program-begins"  # what comes before is what a shell prints at each login
_PACKAGE = "hippo_mpi.cluster"
# Reads modules, by their names, from the first line, and runs them in this order; the last one is the program.
_READER = (
    "import json, sys, types; [exec(source, vars(sys.modules.setdefault(name, types.ModuleType(name))))"
    " for name, source in json.loads(sys.stdin.readline())]"
)
_MAX_LINE_BYTES = 1 << 20
_MAX_GREETING_LINES = 1000
_MAX_ERROR_BYTES = 4096
_BEAT_S = SILENCE_S / 5
_END_S = 2.0


class HostLost(RankError):
    """A host on which a program couldn't be started, or doesn't answer any more."""


class HostProgram:
    """A program on a host.

    Args:
        host: where it runs.
        hear: told of lines that answer no question.
    """

    def __init__(self, host: Host, hear: Callable[[dict[str, Any]], None] = lambda message: None) -> None:
        self.host = host
        self._hear = hear
        self._numbers = itertools.count()
        self._asked: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._why_lost = ""
        self._process: asyncio.subprocess.Process | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._errors = bytearray()

    async def start(self, module: str, timeout_s: float) -> None:
        """Start it.

        Args:
            module: of hippo_mpi.cluster, with a function `main`.
            timeout_s: for the host to let us in, and to start a Python.

        Raises:
            HostLost: it doesn't.
        """
        try:
            self._process = await asyncio.create_subprocess_exec(
                *_command(self.host, timeout_s), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                limit=_MAX_LINE_BYTES, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise HostLost(f"{self.host.ssh}: {error.strerror}") from None
        self._tasks.append(asyncio.create_task(self._collect_errors()))
        try:
            async with asyncio.timeout(timeout_s):
                await self._await_python()
                self._write(_modules(module))
        except TimeoutError:
            raise HostLost(f"{self.host.ssh}: no answer within {timeout_s:.0f} s") from None
        self._tasks += [asyncio.create_task(self._read_answers()), asyncio.create_task(self._beat())]

    async def ask(self, timeout_s: float, **question: Any) -> dict[str, Any]:
        """Return the program's answer.

        Raises:
            HostLost: there is none in time.
            OSError: the program couldn't do it; says why.
        """
        number = next(self._numbers)
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._asked[number] = answer
        try:
            if self._why_lost:
                raise HostLost(self._why_lost)
            self._write({"id": number, **question})
            async with asyncio.timeout(timeout_s):
                found = await answer
        except TimeoutError:
            raise HostLost(f"{self.host.ssh} hasn't answered within {timeout_s:.0f} s{self._last_error()}") from None
        finally:
            del self._asked[number]
        if isinstance(why := found.get("error"), str):
            raise OSError(visible(why))
        return found

    @property
    def why_lost(self) -> str:
        """Why it has ended; empty while it runs."""
        return self._why_lost

    async def await_loss(self, timeout_s: float) -> bool:
        """Wait so long for the end of the program, which was started; return whether it has ended."""
        return bool((await asyncio.wait([self._tasks[1]], timeout=timeout_s))[0])

    async def close(self, patience_s: float = _END_S) -> None:
        """End the program, and what else ssh has started for it; `patience_s` before each harder way."""
        for task in self._tasks[1:]:
            task.cancel()
        await asyncio.gather(*self._tasks[1:], return_exceptions=True)
        if self._process is None:
            return
        assert self._process.stdin is not None
        self._process.stdin.close()
        ended = asyncio.create_task(self._await_end(self._process))
        for signal_number in (signal.SIGTERM, signal.SIGKILL):
            if (await asyncio.wait([ended], timeout=patience_s))[0]:
                break
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal_number)
        await asyncio.wait([ended], timeout=patience_s)
        for task in (ended, *self._tasks):
            task.cancel()

    async def _await_end(self, process: asyncio.subprocess.Process) -> None:
        """Wait until a process is gone; asyncio sees that only once all it has printed was read."""
        assert process.stdout is not None
        while await process.stdout.read(_MAX_LINE_BYTES):
            pass
        await process.wait()

    def _write(self, message: Any) -> None:
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.write(json.dumps(message).encode() + b"\n")

    async def _await_python(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        for _ in range(_MAX_GREETING_LINES):
            line = (await _line_of(self._process.stdout)).strip()
            if line == _MARK.encode():
                return
            if line == NO_PYTHON.encode():
                raise HostLost(f"{self.host.ssh} has no Python of 3.8 or later")
            if not line and self._process.stdout.at_eof():
                await asyncio.wait(self._tasks[:1], timeout=_END_S)
                raise HostLost(f"{self.host.ssh} lets nobody in{self._last_error()}")
        raise HostLost(f"{self.host.ssh} prints too much at each login")

    async def _read_answers(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        while line := await _line_of(self._process.stdout):
            try:
                message = json.loads(line)
                number, answer = message.get("id"), message.get("answer")
            except (ValueError, AttributeError, RecursionError):
                continue
            if isinstance(number, int) and isinstance(answer, dict) and number in self._asked:
                if not self._asked[number].done():
                    self._asked[number].set_result(answer)
            elif number is None:
                self._hear(message)
        await asyncio.wait(self._tasks[:1], timeout=_END_S)
        self._why_lost = f"{self.host.ssh} is lost{self._last_error()}"
        self._tasks[-1].cancel()  # the beat
        for one in self._asked.values():
            if not one.done():
                one.set_exception(HostLost(self._why_lost))

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(_BEAT_S)
            assert self._process is not None and self._process.stdin is not None
            self._process.stdin.write(b"\n")

    async def _collect_errors(self) -> None:
        assert self._process is not None and self._process.stderr is not None
        while data := await self._process.stderr.read(_MAX_ERROR_BYTES):
            self._errors += data
            del self._errors[:-_MAX_ERROR_BYTES]

    def _last_error(self) -> str:
        lines = [line.strip() for line in self._errors.decode(errors="replace").splitlines() if line.strip()]
        return f": {visible(lines[-1])}" if lines else ""


async def _line_of(stream: asyncio.StreamReader) -> bytes:
    """Return a line; empty at the end, or if it is longer than any that we expect."""
    try:
        return await stream.readline()
    except (ValueError, OSError):
        return b""


def _command(host: Host, timeout_s: float) -> Sequence[str]:
    """Return the command that starts the first Python there is, the ranks' own first, without a file or a heredoc."""
    is_here = host.ssh == THIS_MACHINE
    first = sys.executable if is_here or not host.python else host.python
    script = script_of(f'echo {_MARK}; exec "$python" -u -c "{_READER}"', first)
    if is_here:
        return ["sh", "-c", script]
    connect_s = max(1, int(timeout_s / 2))
    options = ("-T", "-o", f"ConnectTimeout={connect_s}", "-o", "LogLevel=ERROR")
    return [*SSH, *options, host.ssh, through_ssh(script)]


def _modules(module: str) -> list[tuple[str, str]]:
    """Return the source of a program, with what it shares with others before it, and its start behind it."""
    cluster = Path(__file__).parents[1]
    names = ["programs.far_end", module]
    sources = [(f"{_PACKAGE}.{name}", (cluster / f"{name.replace('.', '/')}.py").read_text()) for name in names]
    return [*sources, ("hippo_program", f"from {_PACKAGE}.{module} import main\nmain()")]
