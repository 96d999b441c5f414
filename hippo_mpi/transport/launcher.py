"""Living under mlx.launch: its standard input and its death."""

from __future__ import annotations

import os
import queue
import stat
import sys
import threading

from hippo_mpi.transport.world import World

_SILENCE_S = 1.0


class Launcher:
    """Standard input, shared with whoever started us.

    mlx.launch gives its ranks a pipe and copies its own input to all of them, but never passes on its end; when
    the pipe itself ends, mlx.launch is gone, and so must be its ranks. Elsewhere the input is just the input.
    """

    def __init__(self, world: World) -> None:
        self._chunks: queue.Queue[bytes] = queue.Queue()
        self._pending = b""
        self._is_pipe = bool({"MLX_HOSTFILE", "MLX_IBV_DEVICES"} & set(os.environ)) and stat.S_ISFIFO(
            os.fstat(0).st_mode
        )
        if self._is_pipe:
            threading.Thread(target=self._pump, args=(world,), name="hippo-stdin", daemon=True).start()

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
                if world.rank == 0:
                    os.write(2, b"error: the launcher is gone\n")
                os._exit(3)
            if world.rank == 0:
                self._chunks.put(data)
