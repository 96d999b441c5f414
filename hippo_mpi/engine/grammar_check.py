"""Checks in a separate process, which can be killed, that a grammar can be compiled.

llguidance compiles in native code that can't be interrupted. Its own limits don't bound the time: a schema of 17
patterns in an allOf, less than 1 kB, takes it many minutes, and one of 10,000 properties seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

from hippo_mpi.errors import FieldError, RankError

MAX_SCHEMA_BYTES = 128 << 10
_CPU_LIMIT_S = 5.0  # a schema of 500 properties takes 0.03
_WALL_TIME_FACTOR = 8  # times the CPU limit, as a busy machine takes longer to give a process of low priority so much
_MAX_PROCESSES = 2  # so that one slow grammar doesn't keep others waiting
_MAX_REMEMBERED = 1024  # grammars, by their digests
_POLL_INTERVAL_S = 0.05  # between looks at whether the answer is still wanted
_KILL_TIMEOUT_S = 2.0  # for a killed process to be gone
_NOT_HELD_TO = ('Unimplemented keys: ["uniqueItems"]', "Unknown format: ")
"""Warnings of llguidance that are only logged: lists may then have duplicates (every set[...] of Python has such a
schema), and a string's format isn't enforced (JSON Schema itself treats an unknown one as an annotation)."""


class GrammarCheck:
    """Checks grammars, each text once; safe to use from several threads.

    Args:
        max_bytes: largest grammar, which is little more than its schemas.
        limit_s: seconds of CPU time that compiling one may take.
    """

    def __init__(self, max_bytes: int = MAX_SCHEMA_BYTES, limit_s: float = _CPU_LIMIT_S) -> None:
        self._max_bytes, self._limit_s = max_bytes, limit_s
        self._lock = threading.Lock()
        self._mistakes: OrderedDict[bytes, list[str]] = OrderedDict()  # by digest of a grammar
        self._idle: list[subprocess.Popen[bytes]] = []
        self._threads = ThreadPoolExecutor(_MAX_PROCESSES, "hippo-grammars")

    async def check_beside(self, field: str, grammar: str) -> None:
        """Run `check` in a thread beside the event loop; cancelling it kills the process that does the work."""
        is_gone = threading.Event()
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._threads, lambda: self.check(field, grammar, lambda: not is_gone.is_set()))
        finally:
            is_gone.set()

    def check(self, field: str, grammar: str, is_wanted: Callable[[], bool] = lambda: True) -> None:
        """Check that llguidance accepts a grammar.

        Args:
            field: the request field that the grammar comes from, for messages.
            grammar: llguidance's JSON form.
            is_wanted: polled while waiting; once it returns False, the check is abandoned and nothing is raised.

        Raises:
            FieldError: the grammar is too long, takes too long, or is wrong.
            RankError: no process can be started on this machine.
        """
        if (size := len(grammar.encode("utf-8", "surrogatepass"))) > self._max_bytes:
            raise FieldError(
                field,
                f"{field}: the schema has {size:,} bytes; the maximum is {self._max_bytes:,} (--max-schema-bytes)",
            )
        key = hashlib.sha256(grammar.encode("utf-8", "surrogatepass")).digest()
        with self._lock:
            mistakes = self._mistakes.get(key)
        if mistakes is None:
            mistakes = self._ask(grammar, is_wanted)
            if mistakes is None:
                return
            self._remember(key, mistakes)
        for mistake in mistakes:
            if not mistake.startswith(_NOT_HELD_TO):
                raise FieldError(field, f"{field}: {mistake}")
            _note_not_held_to(mistake[:100])

    def _remember(self, key: bytes, mistakes: list[str]) -> None:
        with self._lock:
            self._mistakes[key] = mistakes
            if len(self._mistakes) > _MAX_REMEMBERED:
                self._mistakes.popitem(last=False)

    def _ask(self, grammar: str, is_wanted: Callable[[], bool]) -> list[str] | None:
        """Return a grammar's mistakes, one line each; None if the answer isn't wanted any more."""
        worker = self._worker()
        answer: bytes | None = None
        try:
            ends_s = time.monotonic() + _WALL_TIME_FACTOR * self._limit_s
            answer = _exchange(worker, json.dumps(grammar).encode() + b"\n", ends_s, is_wanted)
        finally:  # a worker that still owes an answer must not be asked again
            if answer and answer.endswith(b"\n"):
                with self._lock:
                    self._idle.append(worker)
            else:
                _end(worker)
        if answer and answer.endswith(b"\n"):
            return [" ".join(mistake.split())[:300] for mistake in json.loads(answer)]
        if not is_wanted():
            return None
        if answer is None or worker.returncode == -signal.SIGXCPU:
            return [f"compiling the schema takes longer than {self._limit_s:g} s: simplify it"]
        return [f"llguidance failed on the schema (exit status {worker.returncode})"]

    def _worker(self) -> subprocess.Popen[bytes]:
        with self._lock:
            while self._idle:
                if (worker := self._idle.pop()).poll() is None:
                    return worker
        command = [sys.executable, "-m", "hippo_mpi.engine.grammar_worker", f"{self._limit_s:g}"]
        try:  # it ends when its standard input does
            worker = subprocess.Popen(
                command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
        except OSError as error:
            raise RankError(f"can't check schemas: {error}") from None
        assert worker.stdin is not None
        os.set_blocking(worker.stdin.fileno(), False)
        return worker


def _exchange(
    worker: subprocess.Popen[bytes], line: bytes, ends_s: float, is_wanted: Callable[[], bool]
) -> bytes | None:
    """Write a line to a process and return the line that it answers.

    Returns:
        Less than a line if the process has ended or the answer isn't wanted any more; None if time is up.
    """
    assert worker.stdin is not None and worker.stdout is not None
    source, sink, answer = worker.stdout.fileno(), worker.stdin.fileno(), b""
    ready = select.poll()  # select knows no descriptors above 1023
    ready.register(source, select.POLLIN)
    ready.register(sink, select.POLLOUT)
    while is_wanted():
        if time.monotonic() > ends_s:
            return None
        for descriptor, _ in ready.poll(_POLL_INTERVAL_S * 1000):
            if descriptor == source:
                piece = os.read(source, 1 << 16)
                answer += piece
                if not piece or answer.endswith(b"\n"):
                    return answer
                continue
            try:
                line = line[os.write(sink, line[: 1 << 16]) :]
            except BrokenPipeError:  # it has ended, which reading its output will show
                line = b""
            if not line:
                ready.unregister(sink)
    return answer


def _end(worker: subprocess.Popen[bytes]) -> None:
    """Kill a process if it hasn't ended; give up on one that can't be killed."""
    worker.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        worker.wait(_KILL_TIMEOUT_S)
    for pipe in (worker.stdin, worker.stdout):
        assert pipe is not None
        with contextlib.suppress(OSError):
            pipe.close()


@lru_cache(maxsize=64)  # logs each warning once
def _note_not_held_to(warning: str) -> None:
    logging.getLogger(__name__).warning("part of a schema isn't enforced: %s", warning)
