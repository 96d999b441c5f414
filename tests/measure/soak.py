"""A server for long: streams of every kind come at random, some of their clients go away, and a fault befalls it a minute."""

from __future__ import annotations

import contextlib
import random
import statistics
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tests.histories.answers import Lost
from tests.histories.driver import Driver, Outcome
from tests.histories.history import FAULT_KINDS, Fault, History, Stream
from tests.histories.kinds import KINDS, NUM_VARIANTS
from tests.histories.stage import Stage, stage

_MOST_AT_ONCE = 64
_LEAVES = 0.2  # share of clients that go away
_LOOK_S = 10.0
_LIMIT_S = 300.0  # for an answer: three faults and the changes of models between


class Soak:
    """The streams and what came of them."""

    def __init__(self, driver: Driver, seed: int) -> None:
        self._driver, self._draw = driver, random.Random(seed)
        self._lock = threading.Lock()
        self.counts: Counter[str] = Counter()
        self.waits_s: list[float] = []
        self.num_under_way = 0

    def arrive(self) -> None:
        """One stream, to its end."""
        with self._lock:
            kind, variant = (
                self._draw.choice([kind for kind in KINDS if kind != "other model"]),
                self._draw.randrange(NUM_VARIANTS),
            )
            leaves = self._draw.randint(1, 40) if self._draw.random() < _LEAVES else None
            self.num_under_way += 1
        stream = Stream(kind, variant, 0.0, leaves)
        try:
            said, difference = self._driver.ask(stream, _LIMIT_S)
        except Lost as error:
            self._note("lost", f"{kind}/{variant}: {error}")
            return
        self._note("gone" if not said.has_ended else "answered")
        self.waits_s.append(said.longest_wait_s)
        if difference:
            self._note("changed", f"{kind}/{variant}: {difference}", is_end=False)

    def _note(self, what: str, line: str = "", is_end: bool = True) -> None:
        with self._lock:
            self.counts[what] += 1
            self.num_under_way -= is_end
        if line:
            print(f"  {what}: {line}", flush=True)


def measure_soak(minutes: float, seed: int = 1, fault_s: float = 60.0, arrivals_per_s: float = 2.0) -> bool:
    """Let streams arrive for so long, with a fault every `fault_s` (0: none); whether all was well."""
    with stage() as found:
        driver = Driver(found)
        driver.ask_in_peace([Stream(kind, variant, 0.0) for kind in KINDS for variant in range(NUM_VARIANTS)])
        soak, draw, before = Soak(driver, seed), random.Random(seed), found.count()
        began = time.monotonic()
        ends, look_at, fault_at = began + 60 * minutes, began, began + fault_s
        rows: list[dict[str, dict[str, Any]]] = []
        faults: Counter[str] = Counter()
        told = Outcome(History(seed, (), ()))
        with ThreadPoolExecutor(_MOST_AT_ONCE + 4) as pool:
            while (now := time.monotonic()) < ends:
                if soak.num_under_way < _MOST_AT_ONCE:
                    pool.submit(soak.arrive)
                if fault_s and now > fault_at:
                    fault_at += fault_s
                    fault = _draw_fault(draw, found)
                    faults[fault.kind] += 1
                    pool.submit(driver.befall, fault, time.monotonic(), told)
                if now > look_at:
                    look_at += _LOOK_S
                    rows.append(_look(found))
                time.sleep(draw.expovariate(arrivals_per_s))
        driver.await_rest(told)
        return _report(soak, faults, rows, before, told)


def _draw_fault(draw: random.Random, found: Stage) -> Fault:
    kind = draw.choice(found.fault_kinds)
    return Fault(kind, draw.randrange(2), 0.0, draw.uniform(0, FAULT_KINDS[kind]))


def _look(found: Stage) -> dict[str, dict[str, Any]]:
    """What its processes have; of ranks only while they answer: one that starts would not know the question."""
    looked: dict[str, dict[str, Any]] = {}
    for name in ("front", "rank 0", "rank 1") if found.running.status()["ready"] else ("front",):
        with contextlib.suppress(OSError, AssertionError):  # it has died, or was stopped, in this moment
            looked |= found.count([name])
    return looked


def _report(
    soak: Soak,
    faults: Counter[str],
    rows: list[dict[str, dict[str, Any]]],
    before: dict[str, dict[str, Any]],
    told: Outcome,
) -> bool:
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(faults.items())) or "none"
    print(f"  streams: {', '.join(f'{count} {what}' for what, count in soak.counts.items())}; faults: {kinds}")
    if soak.waits_s:
        print(f"  longest wait for an event: {max(soak.waits_s):.1f} s, median {statistics.median(soak.waits_s):.2f} s")
    for who, what in (
        ("front", "MiB"),
        ("front", "descriptors"),
        ("front", "tasks"),
        ("rank 0", "MiB"),
        ("rank 1", "MiB"),
    ):
        values = [row[who][what] for row in rows if what in row.get(who, ())]
        if values:
            parts = (values[len(values) * part // 4 : max(1, len(values) * (part + 1) // 4)] for part in range(4))
            quarters = ", ".join(f"{statistics.median(part or values):.0f}" for part in parts)
            print(f"  {who}, {what}: {quarters} in each quarter of the time")
    print(f"  idle before: {before}\n  idle after:  {told.counts}")
    print(f"  {len(told.left)} processes left; {'; '.join(told.wrong) or 'nothing else'}", flush=True)
    return not (soak.counts["lost"] or soak.counts["changed"] or told.left or told.wrong)
