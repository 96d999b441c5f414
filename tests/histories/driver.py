"""Lets a history happen to a server, and checks that every client was told what it would have been told in peace."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from tests.histories.answers import Lost, Said, listen
from tests.histories.history import Fault, History, Stream, draw_history
from tests.histories.kinds import OTHER, ask_of
from tests.histories.stage import TIMEOUT_S, Stage
from tests.servers import JSON

_BACKOFF_S = (0.0, 1.0, 2.0, 5.0, 10.0)  # before the ranks are started again, failure by failure
_MANY = 4  # times what it takes in peace: prompts are read again, and the machine has others
_AT_ONCE = 8
_PEACE_S = 120.0
_RECOVERS_S = 8.0  # a fault that follows another waits so long for the ranks to be gone
_SEEN_S = 5.0  # until ranks are gone, from when they are known to have failed
_REST_S = 10.0  # until processes are gone, afterwards
_FEW = 6  # connections and tasks that have not quite ended yet
_POOLED = 10  # threads of the front's pools, which begin when they are needed first, and stay


@dataclass
class Outcome:
    """Of one history.

    Args:
        lost, changed: a line per stream.
        late_s: by which the slowest stream missed its deadline; negative: it had so much time left.
        wait_s: the longest for an event of a stream.
        left: processes.
        wrong: what else isn't as it should be.
        counts: what front and ranks have afterwards.
        is_broken: the server is of no use for another history.
    """

    history: History
    lost: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    late_s: float = -float("inf")
    wait_s: float = 0.0
    left: list[int] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    counts: dict[str, dict[str, Any]] = field(default_factory=dict)
    is_broken: bool = False

    @property
    def is_good(self) -> bool:
        return not (self.lost or self.changed or self.left or self.wrong or self.late_s > 0)

    def __str__(self) -> str:
        lines = [*(f"lost: {line}" for line in self.lost), *(f"changed: {line}" for line in self.changed), *self.wrong]
        lines += [f"processes left: {self.left}"] if self.left else []
        lines += [f"late by {self.late_s:.1f} s"] if self.late_s > 0 else []
        return "\n    ".join([str(self.history), *lines])


class Driver:
    """Histories on one stage; what streams say in peace is asked for once."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._peace: dict[tuple[str, int], Said] = {}
        self._first_counts: dict[str, dict[str, Any]] = {}

    def run_seed(self, seed: int, num_streams: int = 8) -> Outcome:
        return self.run(draw_history(seed, num_streams, kinds=self._stage.fault_kinds))

    def run(self, history: History) -> Outcome:
        """Let it happen, wait until all is well again, and check. What went wrong is in the outcome."""
        outcome = Outcome(history)
        try:
            self.ask_in_peace(history.streams)
            self._let_happen(outcome)
            self.await_rest(outcome)
        except (AssertionError, Lost, OSError) as error:  # no use for others any more
            outcome.wrong.append(f"{type(error).__name__}: {error}")
            outcome.is_broken = True
        return outcome

    def _let_happen(self, outcome: Outcome) -> None:
        history, deadline_s, began = outcome.history, self._deadline_s(outcome.history), time.monotonic()
        with ThreadPoolExecutor(len(history.streams) + len(history.faults)) as pool:
            streams = [pool.submit(self._stream, one, began, 2 * deadline_s) for one in history.streams]
            faults = [pool.submit(self.befall, fault, began, outcome) for fault in history.faults]
            for one, found in zip(history.streams, streams, strict=True):
                self._check(one, found, outcome, deadline_s)
            for fault in faults:
                fault.result()

    def await_rest(self, outcome: Outcome) -> None:
        """All is well again: ranks that answer, no request, no process but theirs, nothing kept for nobody."""
        stage = self._stage
        stage.running.await_ready()
        stage.running.await_status(lambda status: status["requests"] == 0)
        ends = time.monotonic() + _REST_S
        while (strays := stage.strays()) and time.monotonic() < ends:
            time.sleep(0.1)
        outcome.left = strays
        outcome.counts = counts = stage.count()
        engine, follower = counts["rank 0"], counts["rank 1"]
        if engine["slots"] != engine["kept"] or engine["at work"]:
            outcome.wrong.append(f"slots that nobody uses: {engine}")
        if follower["caches"] != engine["kept"] + engine["dropped"]:
            outcome.wrong.append(f"rank 1 has caches that rank 0 doesn't know: {follower}, {engine}")
        self._first_counts = self._first_counts or counts
        for name in ("threads", "tasks", "descriptors", "children"):
            before, now = self._first_counts["front"][name], counts["front"][name]
            if now > before + (_POOLED if name == "threads" else _FEW):
                outcome.wrong.append(f"the front has {now} {name}, and had {before}")
        if line := stage.audit_fault():
            outcome.wrong.append(f"the audit log: {line}")

    # ---- streams

    def ask_in_peace(self, streams: Sequence[Stream]) -> None:
        """Learn what they say, of those of which it isn't known yet."""
        missing = sorted({(one.kind, one.variant) for one in streams} - set(self._peace))
        self._stage.running.await_ready()
        url = self._stage.running.url
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            said = pool.map(lambda key: listen(url, ask_of(*key), _PEACE_S), missing)
            self._peace.update(zip(missing, said, strict=True))

    def ask(self, stream: Stream, limit_s: float) -> tuple[Said, str]:
        """What a client is told, and where that isn't what it is told in peace.

        Raises:
            Lost: the client gets an error.
        """
        said = listen(self._stage.running.url, ask_of(stream.kind, stream.variant), limit_s, stream.leaves_after)
        return said, said.difference(self._peace[stream.kind, stream.variant])

    def _stream(self, stream: Stream, began: float, limit_s: float) -> tuple[Said, str]:
        time.sleep(max(0.0, began + stream.starts_s - time.monotonic()))
        return self.ask(stream, limit_s)

    def _check(self, stream: Stream, found: Future[tuple[Said, str]], outcome: Outcome, deadline_s: float) -> None:
        name = f"{stream.kind}/{stream.variant}"
        try:
            said, difference = found.result()
        except Lost as error:
            outcome.lost.append(f"{name}: {error}")
            return
        outcome.wait_s = max(outcome.wait_s, said.longest_wait_s)
        outcome.late_s = max(outcome.late_s, stream.starts_s + said.took_s - deadline_s)
        if difference:
            outcome.changed.append(f"{name}: {difference}")

    def _deadline_s(self, history: History) -> float:
        """By when all streams must have ended: what they take in peace, and each fault's own time, with a new start."""
        peace_s = max(self._peace[one.kind, one.variant].took_s for one in history.streams)
        changes = any(ask_of(one.kind, one.variant).body["model"] == OTHER for one in history.streams)
        start_s, last_s = 1.5 * self._stage.start_s, max(one.starts_s for one in history.streams)
        faults_s = sum(
            (fault.at_s if fault.in_recovery else 0.0) + fault.lasts_s + TIMEOUT_S + _SEEN_S + pause_s
            + start_s * (2 if fault.kind == "swap" else 1)
            for fault, pause_s in zip(history.faults, _BACKOFF_S, strict=False)
        )  # fmt: skip
        return last_s + _MANY * peace_s + faults_s + 2 * start_s * changes

    # ---- faults

    def befall(self, fault: Fault, began: float, outcome: Outcome) -> None:
        """Let a fault happen, to its end, in a history that began then."""
        if fault.in_recovery:
            self._await_recovery()
            time.sleep(fault.at_s)
        else:
            time.sleep(max(0.0, began + fault.at_s - time.monotonic()))
        if fault.kind == "full disk":
            with self._stage.full_disk():
                time.sleep(fault.lasts_s)
        elif fault.kind == "swap":
            self._swap(outcome)
        elif (pid := self._stage.strike(fault.kind, fault.rank)) is not None and fault.lasts_s:
            time.sleep(fault.lasts_s)
            self._stage.pass_by(fault.kind, pid)

    def _await_recovery(self) -> None:
        ends = time.monotonic() + _RECOVERS_S
        while self._stage.running.status()["ready"] and time.monotonic() < ends:
            time.sleep(0.02)

    def _swap(self, outcome: Outcome) -> None:
        body = json.dumps({"model": OTHER}).encode()
        request = urllib.request.Request(f"{self._stage.running.url}/admin/model", body, JSON)
        try:
            with urllib.request.urlopen(request, timeout=_PEACE_S) as answer:
                answer.read()
        except (OSError, urllib.error.HTTPError) as error:
            outcome.wrong.append(f"/admin/model: {error}")
