"""Calls `agent` on a host, through one ssh that stays open; on this machine without ssh."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from hippo_mpi.cluster.asking.facts import Probed
from hippo_mpi.cluster.doctor.checks import diagnose
from hippo_mpi.cluster.hostfile import Host
from hippo_mpi.cluster.programs.find_python import NO_PYTHON, script_of, through_ssh
from hippo_mpi.cluster.setting_up import agent, changes
from hippo_mpi.errors import LaunchError, RankError
from hippo_mpi.transport.ports import THIS_MACHINE
from hippo_mpi.transport.run_key import SSH
from hippo_mpi.units import visible

_MARK = b"hippo-agent-begins"  # what comes before it is what a shell prints at each login
_CONNECT_S = 10
_START_S = 30.0  # to connect, and to find a Python there
_PROMPT_S = 300.0  # for a person to compare a fingerprint and to type a password
_MAX_LINE = 1 << 22
MAX_COMMAND = 100_000
"""Characters of a command that is about to be run; it is shown as a whole."""
CHUNK = 1 << 20
# Neither quotes nor backslashes, so that every login shell passes it on as it is.
_BOOT = "import sys; i = sys.stdin.buffer; exec(i.read(int(i.readline())))"
_MINOR = ".".join(map(str, sys.version_info[:2]))
_FIND = script_of(f'exec "$python" -c "{_BOOT}"')
_MODULES = (changes, agent)


def _program() -> bytes:
    sources = {module.__name__: Path(module.__file__ or "").read_text() for module in _MODULES}
    lines = [
        "import sys, types",
        f"for name, source in {sources!r}.items():",
        "    module = sys.modules[name] = types.ModuleType(name)",
        "    exec(compile(source, name, 'exec'), vars(module))",
        f"sys.stdout.write({_MARK.decode() + chr(10)!r})",
        "sys.stdout.flush()",
        "module.serve()",
    ]
    program = "\n".join(lines).encode()
    return b"%d\n%b" % (len(program), program)


class Session:
    """An agent on a host, from `open` to `close`.

    Args:
        name: of the host, by ssh; 127.0.0.1 is this machine.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.noise = ""
        self.has_new_key = False
        self._agent: subprocess.Popen[bytes] | None = None
        self._read = bytearray()

    def open(self, asks: bool = False) -> None:
        """Start the agent.

        Args:
            asks: whether ssh may ask a person, in this terminal, to trust a fingerprint, and for a password.

        Raises:
            RankError: the host can't be reached, or lets us not in.
            LaunchError: it has no Python.
        """
        if self.name == THIS_MACHINE:
            command = [sys.executable, "-c", _BOOT]
        else:
            ways = ["ssh", "-o", "StrictHostKeyChecking=ask"] if asks else [*SSH, "-o", "LogLevel=ERROR"]
            alive = ["-o", "ServerAliveInterval=3", "-o", "ServerAliveCountMax=3"]
            timeout = ["-o", f"ConnectTimeout={_CONNECT_S}"]
            command = [*ways, "-T", *alive, *timeout, self.name, through_ssh(_FIND)]
        try:
            self._agent = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=None if asks else subprocess.PIPE
            )
        except FileNotFoundError:
            raise LaunchError("ssh isn't installed here") from None
        self._write(_program(), ends_s := time.monotonic() + (_PROMPT_S if asks else _START_S))
        noise = []
        while (line := self._line(ends_s)) != _MARK:
            if line == NO_PYTHON.encode():
                raise LaunchError(
                    f"{self.name} has no Python of 3.8 or later: install Python {_MINOR} there, as this machine has"
                )
            noise.append(line)
        self.noise = b"\n".join(noise).decode(errors="replace")

    def call(self, function: Callable[..., Any], timeout_s: float = 60.0, **arguments: Any) -> Any:
        """Return what a function of `agent` returns on the host.

        Raises:
            LaunchError: it failed there.
            RankError: the connection is lost, or there is no answer in time.
        """
        ends_s = time.monotonic() + timeout_s
        self._write(json.dumps({"call": function.__name__, "arguments": arguments}).encode() + b"\n", ends_s)
        return self._answer(ends_s)

    def send(
        self, function: Callable[..., Any], chunks: Iterable[bytes], timeout_s: float = 600.0, **arguments: Any
    ) -> Any:
        """Call a function that reads a stream, and send that; stop if there is an answer before its end.

        Raises:
            LaunchError, RankError: as in `call`.
        """
        ends_s = time.monotonic() + timeout_s
        self._write(json.dumps({"call": function.__name__, "arguments": arguments}).encode() + b"\n", ends_s)
        try:
            for chunk in chunks:
                if self._has_output():
                    break
                self._write(b"%d\n%b" % (len(chunk), chunk), ends_s)
        except OSError as error:
            raise LaunchError(f"{error.filename or 'a file'} can't be copied: {error.strerror or error}") from None
        self._write(b"0\n", ends_s)
        return self._answer(ends_s)

    def _answer(self, ends_s: float) -> Any:
        line = self._line(ends_s)
        try:
            answer = json.loads(line)
            if "error" not in answer:
                return answer["result"]
            why = visible(answer["error"])
        except (ValueError, TypeError, KeyError, RecursionError):
            raise RankError(f"{self.name} gave an answer that can't be read: {visible(line[:80])}") from None
        raise LaunchError(f"{self.name}: {why}")

    def _has_output(self) -> bool:
        assert self._agent and self._agent.stdout
        return bool(self._read) or bool(select.select([self._agent.stdout], [], [], 0)[0])

    def _write(self, data: bytes, ends_s: float) -> None:
        assert self._agent and self._agent.stdin
        descriptor = self._agent.stdin.fileno()
        os.set_blocking(descriptor, False)
        view = memoryview(data)
        while view:
            if not select.select([], [descriptor], [], max(0.0, ends_s - time.monotonic()))[1]:
                self.close()
                raise RankError(f"{self.name} takes nothing in any more; try again")
            try:
                view = view[os.write(descriptor, view[:CHUNK]) :]
            except BrokenPipeError:
                return  # what is read next says why

    def _line(self, ends_s: float) -> bytes:
        assert self._agent and self._agent.stdout
        while b"\n" not in self._read:
            if not select.select([self._agent.stdout], [], [], max(0.0, ends_s - time.monotonic()))[0]:
                self.close()
                raise RankError(f"{self.name} doesn't answer; is it still on, and in the network? try again")
            data = os.read(self._agent.stdout.fileno(), 1 << 16)
            if not data or len(self._read) > _MAX_LINE:
                raise RankError(self._why_ended())
            self._read += data
        line, _, rest = bytes(self._read).partition(b"\n")
        self._read = bytearray(rest)
        return line.rstrip(b"\r")

    def _why_ended(self) -> str:
        """Return what ssh has said last, with what to do."""
        agent_process, self._agent = self._agent, None
        assert agent_process and agent_process.stdin
        agent_process.stdin.close()
        lines = agent_process.stderr.read(1 << 16).decode(errors="replace").splitlines() if agent_process.stderr else []
        status = agent_process.wait()
        if agent_process.stderr is None:
            return f"no way into {self.name}: ssh has ended with status {status}, and says above why; the same command tries again"
        last = next((line.strip() for line in reversed(lines) if line.strip()), f"ssh ended with status {status}")
        for finding in diagnose([Probed(Host(self.name), error=last)], ["ssh-refused", "ssh-host-key"]):
            return f"{finding.check} on {self.name}: {visible(finding.found.rstrip('.'))}; {finding.fix}"
        return f"{self.name}: {visible(last)}"

    def close(self) -> None:
        """End the agent."""
        if self._agent is None:
            return
        for stream in (self._agent.stdin, self._agent.stdout, self._agent.stderr):
            if stream:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        try:
            self._agent.wait(2)
        except subprocess.TimeoutExpired:
            self._agent.kill()
            self._agent.wait()
        self._agent = None

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()
