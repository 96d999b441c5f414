"""Rank 0's side of serving: take requests from the front, step the engine, send the outputs back."""

from __future__ import annotations

import queue
import socket
import threading
import time

import msgspec

from hippo_mpi.engine.engine import Engine, unexpected
from hippo_mpi.engine.messages import ErrorMessage, OutputMessage
from hippo_mpi.engine.request import RequestOutput
from hippo_mpi.errors import HippoError, RankError
from hippo_mpi.parallel.timeline import Timeline
from hippo_mpi.serving.supervision.messages import (
    Add,
    Beat,
    Begun,
    Order,
    Ready,
    Refused,
    Report,
    Taking,
    Waiting,
    line_of,
    read_order,
)
from hippo_mpi.transport.control import Control

BEAT_S = 0.5


class RankService:
    """Rank 0's end of the connection to the front. It beats from the start, while the model is being loaded."""

    def __init__(self, connection: socket.socket, control: Control) -> None:
        self._connection, self._control = connection, control
        self._inbox: queue.Queue[Order | None] = queue.Queue()
        self._write_lock = threading.Lock()
        self._engine: Engine | None = None
        for work, name in ((self._read, "hippo-front"), (self._beat, "hippo-beat")):
            threading.Thread(target=work, name=name, daemon=True).start()

    def run(self, engine: Engine, ready: Ready, timeline: Timeline) -> None:
        """Answer requests until the front is gone."""
        self._engine = engine
        engine.on_begin = lambda numbers: self._tell(Begun(numbers))
        engine.on_wait = lambda number: self._tell(Waiting(number))
        self._tell(ready)
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
                self._tell(*map(_report, outputs))

    def _take(self, engine: Engine, order: Order | None) -> bool:
        """Carry out an order of the front; return False if the front is gone."""
        if order is None:
            return False
        if not isinstance(order, Add):
            engine.abort(order.request_id)
            return True
        request = order.request
        self._tell(Taking(request.id))
        try:
            engine.add(request)
        except HippoError as error:
            self._tell(Refused(request.id, ErrorMessage.of(error)))
        except Exception as error:  # this request's: others go on
            self._tell(Refused(request.id, ErrorMessage.of(unexpected(request.id, error))))
        self._tell(Taking(None))
        self._control.progress("taking requests")
        return True

    def _tell(self, *reports: Report) -> None:
        lines = b"".join(map(line_of, reports))
        try:
            with self._write_lock:
                self._connection.sendall(lines)
        except OSError as error:
            self._inbox.put(None)
            raise RankError(f"lost the connection to the front: {error}") from None

    def _read(self) -> None:
        with self._connection.makefile("rb") as lines:
            try:
                for line in lines:
                    self._inbox.put(read_order(line))
            except (OSError, msgspec.DecodeError):
                pass  # gone in the middle of a line
        self._inbox.put(None)

    def _beat(self) -> None:
        """Report twice a second that this process lives, and whether the ranks make progress."""
        while True:
            time.sleep(BEAT_S)
            try:
                waiting = self._engine.num_waiting if self._engine else 0
                self._tell(Beat(self._control.statuses(), waiting, self._control.stalled_s))
            except RankError:
                return


def _report(output: RequestOutput) -> Report:
    if output.error is not None:
        return Refused(output.request_id, ErrorMessage.of(output.error))
    return OutputMessage.of(output)
