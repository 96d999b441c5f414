"""A host's place, or the hub's, as sync sees it: up to four programs there, which are asked through pipes. Loads no MLX."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from hippo_mpi.cluster.hostfile import Host
from hippo_mpi.cluster.starting.start_plan import quoted
from hippo_mpi.cluster.sync.frames import Data, FrameError, Frames, Header
from hippo_mpi.transport.ports import THIS_MACHINE
from hippo_mpi.transport.run_key import SSH
from hippo_mpi.units import visible

MAX_STREAMS = 4
_SILENCE_S = 30.0  # without a byte; places say something every second
_STALLED_S = 60.0  # in which it says that it goes on, and does nothing
_LAST_WORDS_S = 0.2
_END_S = 2.0  # for a program, from the end of its input to SIGKILL
_SSH_FAILED = 255
_MAX_STDERR_BYTES = 4096
_PLACE = "-m hippo_mpi.cluster.sync.place"
# A cut is seen within 15 s; this cipher is the fastest wherever a processor has AES.
_SETTINGS = "ServerAliveInterval=5 ServerAliveCountMax=3 LogLevel=ERROR Compression=no Ciphers=^aes128-gcm@openssh.com"


class LostError(Exception):
    """A site is out of reach; it says why."""


class RefusalError(Exception):
    """A site can't do what was asked; it says why."""


def command_of(host: Host, words: str = _PLACE, connect_s: float = 10.0) -> list[str]:
    """Return the command that runs a host's Python, by ssh if it is another machine."""
    if host.ssh == THIS_MACHINE:
        return [sys.executable, *words.split()]
    settings = [word for one in _SETTINGS.split() for word in ("-o", one)]
    python = quoted(host.python or sys.executable)
    return [*SSH, "-T", "-o", f"ConnectTimeout={max(1, int(connect_s))}", *settings, host.ssh, f"exec {python} {words}"]


class _Stream:
    """One program."""

    def __init__(self, command: Sequence[str], errand: Header, start_s: float, environment: Mapping[str, str]) -> None:
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
            )
        except OSError as error:
            raise RefusalError(f"{command[0]} can't be started: {error.strerror}") from None
        assert self._process.stdin and self._process.stdout and self._process.stderr
        self._said = bytearray()
        self._reader = threading.Thread(target=self._collect, daemon=True)
        self._reader.start()
        source, sink = self._process.stdout.fileno(), self._process.stdin.fileno()
        try:
            Frames(source, sink, 2 * start_s).await_mark()
            self._frames = Frames(source, sink, _SILENCE_S)
            self._frames.send(errand)
        except FrameError as error:
            why = self.why(error)
            if self._process.returncode in (_SSH_FAILED, *range(-64, 1)):
                raise LostError(why) from None
            raise RefusalError(f"sync can't run there: {why}") from None

    def ask(self, header: Header, data: Data) -> tuple[Header, bytearray]:
        self._frames.send(header, data)
        most, ends_s = 0, time.monotonic() + _STALLED_S
        while True:
            answer, piece = self._frames.receive()
            if not (done := answer.get("goes_on")):
                return answer, piece
            if type(done) is int and done > most:
                most, ends_s = done, time.monotonic() + _STALLED_S
            elif time.monotonic() > ends_s:
                raise FrameError(f"it has done nothing for {_STALLED_S:.0f} s")

    def why(self, error: FrameError) -> str:
        """End the program; return what it, or ssh, said last, or else what is wrong."""
        self.close(at_once=True)
        self._reader.join(_END_S)
        lines = [line for line in self._said.decode(errors="replace").splitlines() if line.strip()]
        return visible(lines[-1]) if lines else str(error)

    def close(self, at_once: bool = False) -> None:
        assert self._process.stdin
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(_LAST_WORDS_S if at_once else _END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _collect(self) -> None:
        assert self._process.stderr
        with contextlib.suppress(OSError, ValueError):
            while line := self._process.stderr.read1():  # type: ignore[attr-defined]
                self._said += line
                del self._said[:-_MAX_STDERR_BYTES]


class Site:
    """A host's place, or the hub's.

    Args:
        name: of the host.
        command: starts a program there.
        errand: what each is told first.
        start_s: to connect, and as long again for a program to be there.
        environment: of the command.
    """

    def __init__(
        self, name: str, command: Sequence[str], errand: dict[str, Any], start_s: float, environment: Mapping[str, str]
    ) -> None:
        self.name, self.lost = name, ""
        self._command, self._errand, self._start_s, self._environment = command, errand, start_s, environment
        self._changed = threading.Condition()
        self._streams: set[_Stream] = set()
        self._idle: list[_Stream] = []
        self._starting, self._most = 0, MAX_STREAMS

    def ask(self, header: Header, data: Data = b"") -> tuple[Header, bytearray]:
        """Ask one of its programs, which is started if none is free; return the answer.

        Raises:
            LostError: the site is out of reach, from now on.
            RefusalError: it can't do that, or can't run at all.
        """
        stream = self._take()
        try:
            answer, piece = stream.ask(header, data)
        except FrameError as error:
            self._lose(LostError(stream.why(error)))
        with self._changed:
            self._idle.append(stream)
            self._changed.notify()
        if "error" in answer:
            raise RefusalError(visible(str(answer["error"])))
        return answer, piece

    def close(self, at_once: bool = False) -> None:
        """End its programs."""
        for stream in [*self._streams]:
            stream.close(at_once)

    def _take(self) -> _Stream:
        while True:
            with self._changed:
                while not self.lost and not self._idle and len(self._streams) + self._starting >= self._most:
                    self._changed.wait()
                if self.lost:
                    raise LostError(self.lost)
                if self._idle:
                    return self._idle.pop()
                self._starting += 1
            try:
                stream = _Stream(self._command, self._errand, self._start_s, self._environment)
            except (LostError, RefusalError) as error:
                stream, failure = None, error
            with self._changed:
                self._starting -= 1
                if stream:
                    self._streams.add(stream)
                    return stream
                self._changed.notify_all()
                if self._streams or self._starting:  # the host doesn't take as many connections: others will do
                    self._most = len(self._streams) + self._starting
                    continue
            self._lose(failure)

    def _lose(self, failure: LostError | RefusalError) -> NoReturn:
        with self._changed:
            self.lost = self.lost or str(failure)
            self._changed.notify_all()
        self.close(at_once=True)
        raise failure
