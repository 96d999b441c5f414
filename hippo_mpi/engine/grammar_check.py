"""Whether a grammar can be compiled, asked of a process that can be ended.

llguidance compiles in native code that heeds nobody. Its own limits don't bound it: a schema of 17 patterns in an allOf,
less than 1 kB, takes it many minutes, and one of 10,000 properties seconds.
"""

from __future__ import annotations

import asyncio
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
        assert worker.stdin is not None
        try:
            worker.stdin.write(json.dumps(grammar).encode() + b"\n")
            worker.stdin.flush()
            found = _read_line(worker, time.monotonic() + _PATIENCE * self._limit_s, is_wanted)
        except OSError:
            found = b""
        if found is not None and found.endswith(b"\n"):
            with self._lock:
                self._idle.append(worker)
            return [" ".join(mistake.split())[:300] for mistake in json.loads(found)]
        worker.kill()  # if it hasn't ended by itself
        worker.communicate()
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
            return subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, close_fds=True
            )
        except OSError as error:
            raise RankError(f"a schema can't be checked: {error}") from None


def _read_line(worker: subprocess.Popen[bytes], ends_s: float, is_wanted: Callable[[], bool]) -> bytes | None:
    """A line of a process's output, or less if it has ended or nobody wants it; None if time is up."""
    assert worker.stdout is not None
    descriptor, found = worker.stdout.fileno(), b""
    while is_wanted():
        if time.monotonic() > ends_s:
            return None
        if select.select([descriptor], [], [], _LOOK_S)[0]:
            piece = os.read(descriptor, 1 << 16)
            found += piece
            if not piece or found.endswith(b"\n"):
                break
    return found


@lru_cache(maxsize=64)  # once
def _note_not_held_to(warning: str) -> None:
    logging.getLogger(__name__).warning("a schema has what answers can't be held to. %s", warning)
