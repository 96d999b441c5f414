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

_OF_ONE_REQUEST = {"_take", "_emit", "_queue_compiled", "choose", "read"}
"""Functions in which whatever is raised is one request's error, and ends no rank."""


def _raise(number: int, frame: Any) -> None:
    found = frame
    while found is not None:
        if found.f_code.co_name in _OF_ONE_REQUEST:
            signal.setitimer(signal.ITIMER_REAL, 0.002)  # a little later
            return
        found = found.f_back
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
    exchange = leader.exchange

    def taste(self: Any, step: Any) -> Any:
        for row in step.tokens if step is not None else []:
            if f" {poison} {poison} {poison} " in f" {' '.join(map(str, row))} ":
                os.kill(os.getpid(), signal.SIGKILL)
        return exchange(self, step)

    leader.exchange = taste


if "HIPPO_FRONT" in os.environ:
    if "HIPPO_POISON" in os.environ:
        threading.Thread(target=_die_of, args=[os.environ["HIPPO_POISON"]], daemon=True).start()
    signal.signal(signal.SIGUSR1, _raise)
    signal.signal(signal.SIGALRM, _raise)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})  # threads to come inherit it
    threading.Thread(target=_cut_links, daemon=True).start()

import befalling  # noqa: E402, F401  (beside this file)
import remembered_imports  # noqa: E402, F401  (tests/quick_starts)
