"""For ranks that are to fail: Python imports this at its start where PYTHONPATH leads here.

SIGUSR1: the main thread raises, wherever it is. SIGUSR2: all of the rank's network connections are cut.
HIPPO_POISON: a token; rank 0 is killed by a step over three of these in a row.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from typing import Any


def _raise(*_: object) -> None:
    raise RuntimeError("a fault, as was asked for")


def _cut_links() -> None:
    while True:
        signal.sigwait({signal.SIGUSR2})
        for name in os.listdir("/proc/self/fd"):
            with suppress(OSError), socket.socket(fileno=os.dup(int(name))) as link:
                if link.family == socket.AF_INET:
                    link.shutdown(socket.SHUT_RDWR)


def _die_of(poison: str) -> None:
    while not hasattr(worker := sys.modules.get("hippo_mpi.parallel.worker"), "Follower"):  # its last class
        time.sleep(0.01)
    leader: Any = worker.Leader  # type: ignore[union-attr]
    collect = leader.collect

    def taste(self: Any, plan: Any, tokens: list[list[int]]) -> Any:
        if any(f" {poison} {poison} {poison} " in f" {' '.join(map(str, row))} " for row in tokens):
            os.kill(os.getpid(), signal.SIGKILL)
        return collect(self, plan, tokens)

    leader.collect = taste


if "HIPPO_FRONT" in os.environ:
    if "HIPPO_POISON" in os.environ:
        threading.Thread(target=_die_of, args=[os.environ["HIPPO_POISON"]], daemon=True).start()
    signal.signal(signal.SIGUSR1, _raise)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})  # threads to come inherit it
    threading.Thread(target=_cut_links, daemon=True).start()

import befalling  # noqa: E402, F401  (beside this file)
