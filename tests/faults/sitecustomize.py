"""For ranks that are to fail: Python imports this at its start where PYTHONPATH leads here.

SIGUSR1: the main thread raises, wherever it is. SIGUSR2: all of the rank's network connections are cut.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from contextlib import suppress


def _raise(*_: object) -> None:
    raise RuntimeError("a fault, as was asked for")


def _cut_links() -> None:
    while True:
        signal.sigwait({signal.SIGUSR2})
        for name in os.listdir("/proc/self/fd"):
            with suppress(OSError), socket.socket(fileno=os.dup(int(name))) as link:
                if link.family == socket.AF_INET:
                    link.shutdown(socket.SHUT_RDWR)


if "HIPPO_FRONT" in os.environ:
    signal.signal(signal.SIGUSR1, _raise)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})  # threads to come inherit it
    threading.Thread(target=_cut_links, daemon=True).start()

import befalling  # noqa: E402, F401  (beside this file)
