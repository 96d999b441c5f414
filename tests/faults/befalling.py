"""What else may befall a rank, and what processes have; imported by sitecustomize.

In ranks, from SIGRTMIN: 1, all network connections are cut in one direction; 2, they become slow; 3, nothing gets
through, and they stay open; 4, all is well again. In ranks and in the front, 5: what the process has is written down as
$HIPPO_COUNTS/PID.json.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import stat
import struct
import sys
import threading
from collections.abc import Callable
from contextlib import suppress

_SO_MAX_PACING_RATE = 47  # Linux: bytes per second that TCP lets out
_SLOW, _SILENT, _WELL = 20_000, 1, 2**64 - 1


def _pace(rate: int) -> Callable[[socket.socket], None]:
    return lambda link: link.setsockopt(socket.SOL_SOCKET, _SO_MAX_PACING_RATE, struct.pack("Q", rate))


def _befall_links(changes: dict[int, Callable[[socket.socket], None]]) -> None:
    while True:
        change = changes[signal.sigwait(changes)]
        for number in map(int, os.listdir("/proc/self/fd")):
            with suppress(OSError):
                if stat.S_ISSOCK(os.fstat(number).st_mode):
                    with socket.socket(fileno=os.dup(number)) as link:
                        if link.family == socket.AF_INET:
                            change(link)


def _count(*_: object) -> None:
    found = {"threads": threading.active_count()}
    asyncio = sys.modules.get("asyncio")
    if asyncio and (loop := asyncio._get_running_loop()):
        found["tasks"] = len(asyncio.all_tasks(loop))
    for one in gc.get_objects():
        kind = f"{type(one).__module__}.{type(one).__name__}"
        if kind == "hippo_mpi.engine.scheduler.Scheduler":
            slots = one._slots
            dropped = len(slots._drops)  # with the next step
            used = slots._count - len(slots._free) - dropped
            found |= {"slots": used, "dropped": dropped, "kept": len(slots._prefixes._kept)}
            found["at work"] = len(one.running) + one.num_waiting
        elif kind == "hippo_mpi.sharding.slot_caches.SlotCaches":
            found["caches"] = found.get("caches", 0) + len(one._groups)
    path = os.path.join(os.environ["HIPPO_COUNTS"], f"{os.getpid()}.json")
    with open(f"{path}.new", "w") as file:
        json.dump(found, file)
    os.rename(f"{path}.new", path)


if "HIPPO_FRONT" in os.environ and hasattr(signal, "SIGRTMIN"):
    _changes: dict[int, Callable[[socket.socket], None]] = {
        signal.SIGRTMIN + 1: lambda link: link.shutdown(socket.SHUT_WR),
        signal.SIGRTMIN + 2: _pace(_SLOW),
        signal.SIGRTMIN + 3: _pace(_SILENT),
        signal.SIGRTMIN + 4: _pace(_WELL),
    }
    signal.pthread_sigmask(signal.SIG_BLOCK, _changes)  # threads to come inherit it
    threading.Thread(target=_befall_links, args=[_changes], daemon=True).start()
if "HIPPO_COUNTS" in os.environ:
    signal.signal(signal.SIGRTMIN + 5, _count)
