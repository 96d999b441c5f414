"""Print the figures of hippo_mpi.serve: python tests/measure/serving.py [what ...]

faults   random faults while 8 streams run: requests lost, answers changed, processes left, time until ready again
idle     CPU of front and ranks without a request, and the first token after it against a warm one
compare  throughput and time to the first token at 1, 4 and 16 requests, beside mlx_lm.server
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import mlx.core as mx
import openai

from tests import ranks
from tests.measure.figures import make_llama
from tests.servers import GOES_ON, MODEL, Server, server

NUM_STREAMS = 8
TIMEOUT_S = 4


def streams(running: Server, num_tokens: int = 120) -> list[str]:
    """Long answers to different prompts at once, half of them greedy."""

    def ask(number: int) -> str:
        pieces = running.client().completions.create(
            model=MODEL, prompt=f"Story {number}: once upon a time a fox", max_tokens=num_tokens, stream=True,
            temperature=0.0 if number % 2 else 1.0, seed=number, logit_bias=GOES_ON,
        )  # fmt: skip
        return "".join(piece.choices[0].text for piece in pieces if piece.choices)

    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        return list(pool.map(ask, range(NUM_STREAMS)))


def measure_faults(count: int) -> None:
    random.seed(1)
    lost = changed = left = 0
    ready_s: dict[str, list[float]] = {"SIGKILL": [], "SIGSTOP": []}
    with server("--timeout", str(TIMEOUT_S), "--max-restarts", "20") as running:
        wanted = streams(running)
        for _ in range(count):
            number, rank = random.choice([signal.SIGKILL, signal.SIGSTOP]), random.choice([0, 1])
            pids = running.rank_pids()
            with ThreadPoolExecutor(1) as pool:
                found = pool.submit(streams, running)
                time.sleep(random.uniform(0, 1.5))
                began = time.monotonic()
                os.kill(pids[rank], number)
                running.await_status(lambda status: not status["ready"])
                running.await_ready()
                ready_s[number.name].append(time.monotonic() - began)
                try:
                    changed += sum(a != b for a, b in zip(found.result(120), wanted, strict=True))
                except Exception as error:
                    lost += 1
                    print(f"  {number.name} of rank {rank}: {error}")
            left += len(ranks.await_end(pids))
    print(
        f"  {count} faults: {lost} with lost requests, {changed} of {count * NUM_STREAMS} answers changed, {left} processes left"
    )
    for name, times in ready_s.items():
        if times:
            spread = f"{min(times):.1f} to {max(times):.1f}, n={len(times)}"
            print(f"  {name}: ready again after {statistics.median(times):.1f} s ({spread}); --timeout {TIMEOUT_S}")


def _first_token_s(running: Server) -> float:
    began = time.perf_counter()
    pieces = running.client().completions.create(model=MODEL, prompt="A fox", max_tokens=2, stream=True)
    for piece in pieces:
        if piece.choices[0].text:
            return time.perf_counter() - began
    raise SystemExit("no token")


def measure_idle(_: int) -> None:
    with server() as running:
        warm = [_first_token_s(running) for _ in range(10)][5:]
        pids = [running.running.process.pid, *running.rank_pids()]
        time.sleep(10)
        before = [ranks.cpu_seconds(pid) for pid in pids]
        time.sleep(20)
        shares = [(ranks.cpu_seconds(pid) - b) / 20 for pid, b in zip(pids, before, strict=True)]
        after = _first_token_s(running)
    parts = ", ".join(f"{share:.2%}" for share in shares)
    print(f"  {sum(shares):.2%} of a core (front, rank 0, rank 1: {parts}) over 20 s")
    print(f"  first token after idling {after * 1e3:.0f} ms, warm {statistics.median(warm) * 1e3:.0f} ms (n=5)")


def _load(url: str, model: str, concurrent: int) -> tuple[float, float]:
    """(tokens per second of all requests, median seconds to the first token)."""
    firsts: dict[int, float] = {}

    def ask(number: int) -> int:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=300)
        began = time.perf_counter()
        words = " ".join(f"w{(number * 7 + i) % 97}" for i in range(24))
        pieces = client.completions.create(model=model, prompt=words, max_tokens=32, stream=True, temperature=0)
        for piece in pieces:
            if piece.choices and piece.choices[0].text:
                firsts.setdefault(number, time.perf_counter() - began)
        return 32

    began = time.perf_counter()
    with ThreadPoolExecutor(concurrent) as pool:
        total = sum(pool.map(ask, range(concurrent)))
    return total / (time.perf_counter() - began), statistics.median(firsts.values())


def _await(url: str) -> None:
    for _ in range(600):
        try:
            urllib.request.urlopen(url, timeout=1)
            return
        except OSError:
            time.sleep(0.1)
    raise SystemExit(f"{url} doesn't answer")


def measure_compare(count: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        parameters = make_llama(Path(name), 12, 768, 1024, mx.float32)
        print(
            f"  llama of {parameters / 1e6:.0f}M parameters, float32, 24 + 32 tokens, both on the same 2 cores, in turn"
        )
        (port,) = ranks.free_ports(1)
        theirs = [str(ranks.BIN / "mlx_lm.server"), "--model", name, "--port", str(port)]
        found: dict[tuple[str, int], list[tuple[float, float]]] = {}
        with server("--model", name) as running, ranks.single(theirs):
            _await(f"http://127.0.0.1:{port}/v1/models")
            for _ in range(count):
                for concurrent in (1, 4, 16):
                    for who, url, model in (
                        ("hippo_mpi.serve", running.url, Path(name).name),
                        ("mlx_lm.server", f"http://127.0.0.1:{port}", name),
                    ):
                        found.setdefault((who, concurrent), []).append(_load(url, model, concurrent))
    for (who, concurrent), runs in found.items():
        rate, first = statistics.median(run[0] for run in runs), statistics.median(run[1] for run in runs)
        print(f"  {concurrent:>2} at once  {who:<16} {rate:>7.1f} tok/s, first token {first:.3f} s (n={len(runs)})")


MEASURES: dict[str, tuple[Callable[[int], None], int]] = {
    "faults": (measure_faults, 50),
    "idle": (measure_idle, 1),
    "compare": (measure_compare, 5),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=[], help="figures to print; all if none is named")
    parser.add_argument("--count", type=int, help="faults, or trials")
    arguments = parser.parse_args()
    for what in arguments.what or MEASURES:
        print(f"{what}:", flush=True)
        measure, count = MEASURES[what]
        measure(arguments.count or count)


if __name__ == "__main__":
    main()
