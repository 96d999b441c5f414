"""Rank 0's side of serving: takes requests from the front, steps the engine, tells what comes out."""

from __future__ import annotations

import json
import queue
import socket
import threading
import time
from dataclasses import asdict
from typing import Any

from hippo_mpi.engine.engine import Engine, unexpected
from hippo_mpi.engine.request import RequestOutput
from hippo_mpi.errors import HippoError, RankError
from hippo_mpi.parallel.timeline import Timeline
from hippo_mpi.serving.supervision.rank_link import About, error_object, line_of, output_object, read_request
from hippo_mpi.transport.control import Control

BEAT_S = 0.5


class RankService:
    """The conversation with the front over `connection`; it begins with beats, while the model is being loaded."""

    def __init__(self, connection: socket.socket, control: Control) -> None:
        self._connection, self._control = connection, control
        self._inbox: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._write_lock = threading.Lock()
        self._engine: Engine | None = None
        for work, name in ((self._read, "hippo-front"), (self._beat, "hippo-beat")):
            threading.Thread(target=work, name=name, daemon=True).start()

    def run(self, engine: Engine, about: About, timeline: Timeline) -> None:
        """Answer requests until the front is gone."""
        self._engine = engine
        engine.on_begin = lambda numbers: self._tell(line_of(begun=numbers))
        self._tell(line_of(ready=asdict(about)))
        while True:
            if engine.is_idle:
                timeline.pause()
                self._control.idle()
                if not self._take(engine, self._inbox.get()):
                    return
                self._control.progress("taking requests")
            while not self._inbox.empty():
                if not self._take(engine, self._inbox.get()):
                    return
            outputs = engine.step()
            if outputs:
                self._tell(b"".join(map(_line, outputs)))

    def _take(self, engine: Engine, message: dict[str, Any] | None) -> bool:
        """Do what the front says; False when it is gone."""
        if message is None:
            return False
        if "abort" in message:
            engine.abort(message["abort"])
            return True
        request = read_request(message["add"])
        self._tell(line_of(taking=request.id))
        try:
            engine.add(request)
        except HippoError as error:
            self._tell(line_of(refused=request.id, **error_object(error)))
        except Exception as error:  # this request's: others go on
            self._tell(line_of(refused=request.id, **error_object(unexpected(request.id, error))))
        self._tell(line_of(taking=None))
        self._control.progress("taking requests")
        return True

    def _tell(self, lines: bytes) -> None:
        try:
            with self._write_lock:
                self._connection.sendall(lines)
        except OSError as error:
            self._inbox.put(None)
            raise RankError(f"the front is gone: {error}") from None

    def _read(self) -> None:
        with self._connection.makefile("rb") as lines:
            try:
                for line in lines:
                    self._inbox.put(json.loads(line))
            except (OSError, ValueError):
                pass  # gone in the middle of a line
        self._inbox.put(None)

    def _beat(self) -> None:
        """Tell that this process lives, and what the watchdog knows of whether it gets on."""
        while True:
            time.sleep(BEAT_S)
            try:
                waiting = self._engine.num_waiting if self._engine else 0
                beat = {"ranks": self._control.statuses(), "waiting": waiting, "stalled_s": self._control.stalled_s}
                self._tell(line_of(beat=beat))
            except RankError:
                return


def _line(output: RequestOutput) -> bytes:
    if output.error is not None:
        return line_of(refused=output.request_id, **error_object(output.error))
    return line_of(output=output_object(output))
