"""Whether a grammar can be compiled, asked of a process that can be ended.

llguidance compiles in native code that heeds nobody. Its own limits don't bound it: a schema of 17 patterns in an allOf,
less than 1 kB, takes it many minutes, and one of 10,000 properties seconds.
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
_LIMIT_S = 5.0  # a schema of 500 properties takes 0.03
_PATIENCE = 4  # times that, until a busy machine has given a process so much time
_AT_ONCE = 2  # processes: one that takes long doesn't keep others waiting
_MOST_REMEMBERED = 1024  # grammars, by their digests
_LOOK_S = 0.05
_DIE_S = 2.0
_NOT_HELD_TO = ('Unimplemented keys: ["uniqueItems"]', "Unknown format: ")
"""Warnings of llguidance that are only logged: a list may then say something twice (every set[...] of Python has such a
schema), and a text's format, which JSON Schema itself takes for a remark if it is unknown, isn't looked at."""


class GrammarCheck:
    """Checks grammars, each text once.

    Args:
        max_bytes: of a grammar, which is little more than its schemas.
        limit_s: seconds of CPU time that one may take.
    """

    def __init__(self, max_bytes: int = MAX_SCHEMA_BYTES, limit_s: float = _LIMIT_S) -> None:
        self._max_bytes, self._limit_s = max_bytes, limit_s
        self._lock = threading.Lock()
        self._found: OrderedDict[bytes, list[str]] = OrderedDict()  # what is wrong, by grammar
        self._idle: list[subprocess.Popen[bytes]] = []
        self._threads = ThreadPoolExecutor(_AT_ONCE, "hippo-grammars")

    async def check_beside(self, field: str, grammar: str) -> None:
        """As `check`, beside the event loop. Cancelled, it ends the process that is at work on it."""
        is_gone = threading.Event()
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._threads, lambda: self.check(field, grammar, lambda: not is_gone.is_set()))
        finally:
            is_gone.set()

    def check(self, field: str, grammar: str, is_wanted: Callable[[], bool] = lambda: True) -> None:
        """Return if llguidance takes a grammar.

        Args:
            field: of a body that it is from.
            is_wanted: asked now and then; once it says no, nothing is told.

        Raises:
            FieldError: the grammar is too long, takes too long, or is wrong.
            RankError: this machine has no room for another process.
        """
        if (size := len(grammar.encode("utf-8", "surrogatepass"))) > self._max_bytes:
            raise FieldError(
                field,
                f"{field}: the schema has {size:,} bytes; at most {self._max_bytes:,} are taken (--max-schema-bytes)",
            )
        key = hashlib.sha256(grammar.encode("utf-8", "surrogatepass")).digest()
        with self._lock:
            found = self._found.get(key)
        if found is None:
            found = self._ask(grammar, is_wanted)
            if found is None:
                return
            self._remember(key, found)
        for mistake in found:
            if not mistake.startswith(_NOT_HELD_TO):
                raise FieldError(field, f"{field}: {mistake}")
            _note_not_held_to(mistake[:100])

    def _remember(self, key: bytes, found: list[str]) -> None:
        with self._lock:
            self._found[key] = found
            if len(self._found) > _MOST_REMEMBERED:
                self._found.popitem(last=False)

    def _ask(self, grammar: str, is_wanted: Callable[[], bool]) -> list[str] | None:
        """What is wrong with a grammar, a line each; None if nobody wants to know any more."""
        worker = self._worker()
        found: bytes | None = None
        try:
            ends_s = time.monotonic() + _PATIENCE * self._limit_s
            found = _exchange(worker, json.dumps(grammar).encode() + b"\n", ends_s, is_wanted)
        finally:  # one that owes an answer must not be asked again
            if found and found.endswith(b"\n"):
                with self._lock:
                    self._idle.append(worker)
            else:
                _end(worker)
        if found and found.endswith(b"\n"):
            return [" ".join(mistake.split())[:300] for mistake in json.loads(found)]
        if not is_wanted():
            return None
        if found is None or worker.returncode == -signal.SIGXCPU:
            return [f"the schema takes longer than {self._limit_s:g} s to compile: make it simpler"]
        return [f"llguidance fails on the schema (status {worker.returncode})"]

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
            raise RankError(f"a schema can't be checked: {error}") from None
        assert worker.stdin is not None
        os.set_blocking(worker.stdin.fileno(), False)
        return worker


def _exchange(
    worker: subprocess.Popen[bytes], line: bytes, ends_s: float, is_wanted: Callable[[], bool]
) -> bytes | None:
    """Write a line to a process and return the one that it answers, or less if it has ended or nobody wants it; None if
    time is up."""
    assert worker.stdin is not None and worker.stdout is not None
    source, sink, found = worker.stdout.fileno(), worker.stdin.fileno(), b""
    ready = select.poll()  # select knows no descriptors above 1023
    ready.register(source, select.POLLIN)
    ready.register(sink, select.POLLOUT)
    while is_wanted():
        if time.monotonic() > ends_s:
            return None
        for descriptor, _ in ready.poll(_LOOK_S * 1000):
            if descriptor == source:
                piece = os.read(source, 1 << 16)
                found += piece
                if not piece or found.endswith(b"\n"):
                    return found
                continue
            try:
                line = line[os.write(sink, line[: 1 << 16]) :]
            except BrokenPipeError:  # it has ended, which its output says
                line = b""
            if not line:
                ready.unregister(sink)
    return found


def _end(worker: subprocess.Popen[bytes]) -> None:
    """End a process if it hasn't by itself; one that can't be killed is left."""
    worker.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        worker.wait(_DIE_S)
    for pipe in (worker.stdin, worker.stdout):
        assert pipe is not None
        with contextlib.suppress(OSError):
            pipe.close()


@lru_cache(maxsize=64)  # once
def _note_not_held_to(warning: str) -> None:
    logging.getLogger(__name__).warning("a schema has what answers can't be held to. %s", warning)
