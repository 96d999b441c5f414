"""Living under mlx.launch: its standard input and its death."""

from __future__ import annotations

import os
import queue
import re
import stat
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn

from hippo_mpi.errors import RankError, print_error
from hippo_mpi.transport.world import World

_SILENCE_S = 1.0
_LOOK_S = 0.5
_FROZEN_LOOKS = 4


class Launcher:
    """Standard input, shared with whoever started us.

    mlx.launch gives its ranks a pipe and copies its own input to all of them, but never passes on its end; when
    the pipe itself ends, mlx.launch is gone, and so must be its ranks. A SIGINT sent to mlx.launch alone ends only
    its main thread, while others keep the pipe open: rank 0, beside it, looks at that thread (on Linux; elsewhere
    the ranks end with the answer). Where no mlx.launch started us, the input is just the input.
    """

    def __init__(self, world: World) -> None:
        self._chunks: queue.Queue[bytes] = queue.Queue()
        self._pending = b""
        self._is_pipe = bool({"MLX_HOSTFILE", "MLX_IBV_DEVICES"} & set(os.environ)) and stat.S_ISFIFO(
            os.fstat(0).st_mode
        )
        if self._is_pipe:
            threading.Thread(target=self._pump, args=(world,), name="hippo-stdin", daemon=True).start()
            if world.rank == 0 and _is_launched_here():
                threading.Thread(target=self._watch, name="hippo-launcher", daemon=True).start()

    def read_all(self) -> str:
        """All of the input. Under mlx.launch it ends with a second of silence after the first text."""
        if not self._is_pipe:
            return sys.stdin.read()
        data = self._chunks.get()
        try:
            while True:
                data += self._chunks.get(timeout=_SILENCE_S)
        except queue.Empty:
            return data.decode(errors="replace")

    def read_line(self) -> str | None:
        """The next line without its end; None at the end of the input."""
        if not self._is_pipe:
            line = sys.stdin.readline()
            return line.rstrip("\n") if line else None
        while b"\n" not in self._pending:
            self._pending += self._chunks.get()
        line_bytes, self._pending = self._pending.split(b"\n", 1)
        return line_bytes.decode(errors="replace")

    def _pump(self, world: World) -> None:
        while True:
            data = os.read(0, 8192)
            if not data:
                _end(world.rank)
            if world.rank == 0:
                self._chunks.put(data)

    def _watch(self) -> None:
        """End when the launcher's main thread, which wakes ten times a second, waits for its threads only."""
        parent, seen, frozen = os.getppid(), "", 0
        while frozen < _FROZEN_LOOKS:
            time.sleep(_LOOK_S)
            try:
                waits_in = Path(f"/proc/{parent}/wchan").read_text()
                status = Path(f"/proc/{parent}/task/{parent}/status").read_text()
            except OSError:
                return  # gone: the pipe says so
            switches = re.findall(r"^voluntary_ctxt_switches:.*", status, re.MULTILINE)[0]
            is_frozen = waits_in.startswith("futex") and switches == seen
            seen, frozen = switches, frozen + 1 if is_frozen else 0
        _end(0)


def _is_launched_here() -> bool:
    try:
        return b"mlx.launch" in Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
    except OSError:  # no /proc, or a launcher that is gone
        return False


def _end(rank: int) -> NoReturn:
    if rank == 0:
        print_error("the launcher is gone")
    os._exit(RankError.exit_code)
