"""Hostile requests beside normal streams: python tests/measure/serving.py hostile

As a script of its own it sends a file of them (python tests/measure/hostile.py FILE URL): another process, of the lowest
priority, since those who send such requests have machines of their own.
"""

from __future__ import annotations

import pickle
import random
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests import ranks
from tests.histories.answers import Lost, Said, listen
from tests.histories.kinds import ask_of
from tests.histories.nasty import Attack, draw_attacks
from tests.histories.stage import Stage, stage

NORMAL = ("greedy", "drawn", "choices", "logprobs", "chat", "chat JSON", "message greedy", "response")
_SENDERS = 4
_LIMIT_S = 60.0
_QUIET_S = 30.0
_SMOOTH = ("--prefill-step-size", "32", "--max-batch-tokens", "64")  # so that long prompts hold streams up less
_JSON = "Content-Type: application/json"
_FINE = {"200", "400", "401", "404", "405", "408", "411", "413", "422", "429", "closed"}


class Normal:
    """Streams, one after another and eight at a time, until they are stopped."""

    def __init__(self, url: str) -> None:
        self._url, self._stopped = url, threading.Event()
        self.gaps_s: list[float] = []
        self.lost: list[str] = []
        self.changed: list[str] = []
        self.count = 0
        self._wanted: dict[str, Said] = {kind: listen(url, ask_of(kind, 0), _LIMIT_S) for kind in NORMAL}

    def run(self) -> None:
        with ThreadPoolExecutor(len(NORMAL)) as pool:
            for one in [pool.submit(self._stream, kind) for kind in NORMAL]:
                one.result()

    def stop(self) -> None:
        self._stopped.set()

    def clear(self) -> float:
        """The 99th percentile of the time between two events so far; counting begins anew."""
        gaps_s, self.gaps_s = self.gaps_s, []
        return statistics.quantiles(gaps_s, n=100)[98]

    def _stream(self, kind: str) -> None:
        while not self._stopped.is_set():
            try:
                said = listen(self._url, ask_of(kind, 0), 2 * _LIMIT_S)
            except Lost as error:
                self.lost.append(f"{kind}: {error}")
                continue
            self.count += 1
            self.gaps_s += said.gaps_s[1:]
            if difference := said.difference(self._wanted[kind]):
                self.changed.append(f"{kind}: {difference}")


def measure_hostile(count: int, seed: int = 1) -> bool:
    """Send `count` hostile requests, and tell what became of them and of the streams beside them; whether all is well."""
    began = time.monotonic()
    attacks = draw_attacks(seed, count)
    print(f"  seed {seed}: {len(attacks)} requests drawn in {time.monotonic() - began:.0f} s", flush=True)
    with (
        stage("--max-tokens", "4", "--timeout", "30", *_SMOOTH) as found,
        tempfile.NamedTemporaryFile() as file,
    ):
        pickle.dump(attacks, file)
        file.flush()
        before = found.count()
        normal = Normal(found.running.url)
        with ThreadPoolExecutor(1) as pool:
            streams = pool.submit(normal.run)
            try:
                time.sleep(_QUIET_S)
                quiet_s = normal.clear()
                began = time.monotonic()
                with ranks.single(
                    ["nice", "-n", "19", sys.executable, __file__, file.name, found.running.url]
                ) as sender:
                    code = sender.wait(max(600.0, 2.0 * count))
                took_s, hostile_s = time.monotonic() - began, normal.clear()
            finally:
                normal.stop()
            streams.result()
        print(f"  {sender.out.strip() or sender.err[-1000:]}")
        return _report(found, normal, before, quiet_s, hostile_s, took_s) and code == 0


def _report(found: Stage, normal: Normal, before: dict, quiet_s: float, hostile_s: float, took_s: float) -> bool:
    for line in [*(f"lost: {one}" for one in normal.lost), *(f"changed: {one}" for one in normal.changed)][:20]:
        print(f"  {line}")
    restarts = found.running.status()["restarts"]
    for line in found.running.running.err.splitlines():
        if "the ranks failed" in line or line.startswith("error:") or " ERROR " in line:
            print(f"  {line}")
    found.running.await_status(lambda status: status["requests"] == 0)
    print(f"  before: {before}\n  after:  {found.count()}")
    print(
        f"  {took_s:.0f} s; {normal.count} streams beside them: {len(normal.lost)} lost, {len(normal.changed)} changed;"
        f" p99 between events {hostile_s * 1e3:.0f} ms, in quiet {quiet_s * 1e3:.0f} ms: {hostile_s / quiet_s:.2f} of it;"
        f" {restarts} restarts",
        flush=True,
    )
    return not (normal.lost or normal.changed or restarts) and hostile_s < 2 * quiet_s


# ---- the sender's process


def send_all(attacks: Sequence[Attack], url: str) -> bool:
    """Send them, a few at a time; print what came back and each answer that shouldn't have come."""
    host, port = url.removeprefix("http://").split(":")
    is_fine = True
    counts: Counter[str] = Counter()
    with ThreadPoolExecutor(_SENDERS) as pool:
        results = pool.map(lambda attack: _send(attack, (host, int(port))), attacks)
        for index, (attack, (status, text, took_s)) in enumerate(zip(attacks, results, strict=True)):
            counts[status] += 1
            if status not in _FINE or took_s > _LIMIT_S:
                is_fine = False
                what = attack.body[:120].decode(errors="replace")
                print(
                    f"number {index}: {status} after {took_s:.1f} s: {attack.way} {attack.path} {what!r} -> {text[:200]!r}",
                    flush=True,
                )
    print(", ".join(f"{count} {status}" for status, count in counts.most_common()))
    return is_fine


def _send(attack: Attack, address: tuple[str, int]) -> tuple[str, str, float]:
    """The status of the answer, its text, and how long it took; "closed" where nobody waits for it, or it was cut off."""
    began, draw = time.monotonic(), random.Random(len(attack.body))
    length = [] if any("Content-Length" in line for line in attack.headers) else [f"Content-Length: {len(attack.body)}"]
    head = "\r\n".join(
        (
            f"POST {attack.path} HTTP/1.1",
            "Host: localhost",
            _JSON,
            "Connection: close",
            *attack.headers,
            *length,
            "",
            "",
        )
    )
    data = head.encode() + attack.body
    answer = b""
    try:
        with socket.create_connection(address, timeout=2 * _LIMIT_S) as connection:
            if attack.way == "dribbled":
                for at in range(0, len(data), 20):
                    connection.sendall(data[at : at + 20])
                    time.sleep(draw.uniform(0, 0.05))
            elif attack.way == "cut off":
                connection.sendall(data[: len(data) - len(attack.body) // 2])
            else:
                connection.sendall(data)
            if attack.way == "left":
                time.sleep(draw.uniform(0, 1))
            elif attack.way == "unread":
                time.sleep(3)
            elif attack.way != "cut off":
                while piece := connection.recv(1 << 16):
                    answer += piece
    except TimeoutError:
        return "silence", "", time.monotonic() - began
    except OSError as error:  # cut off before all was read: what came first counts
        if not answer:
            return "closed", str(error), time.monotonic() - began
    status = answer[9:12].decode(errors="replace") if answer.startswith(b"HTTP/1.1 ") else "closed"
    return status, answer.partition(b"\r\n\r\n")[2].decode(errors="replace"), time.monotonic() - began


if __name__ == "__main__":
    sys.exit(0 if send_all(pickle.loads(Path(sys.argv[1]).read_bytes()), sys.argv[2]) else 1)
