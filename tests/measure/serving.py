"""Print the figures of hippo_mpi.serve: python tests/measure/serving.py [what ...]

faults   random faults while 8 streams run: requests lost, answers changed, processes left, time until ready again
idle     CPU of front and ranks without a request, and the first token after it against a warm one
together rounds of three servers and three runs that start at the same moment: how many came up at once
journal  throughput of 16 streams with a journal against without, and the CPU that the front takes for a token
compare  throughput and time to the first token at 1, 4 and 16 requests, on two ranks and on one, beside mlx_lm.server

What takes longer, with --count, --seed and --minutes (tests/measure/campaigns.py), only if it is named:

histories random sequences of faults against streams of every kind: what was lost or changed, with its seed
moments   a rank killed or stopped at any moment of a run, under each way to start: what didn't end as it should
starter   our starter over three hosts: its CPU, and how long ranks outlive it, its machine, or one of them
hostile   hostile requests beside 8 normal streams: what they got, streams lost or changed, times between tokens
soak      streams that come and go, and a fault a minute: errors, changed answers, memory, descriptors, tasks
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import mlx.core as mx
import openai

from tests import ranks
from tests.commands.test_side_by_side import start_together
from tests.measure.campaigns import CAMPAIGNS, add_options
from tests.measure.figures import make_llama
from tests.servers import FAULTS, GOES_ON, JSON, MODEL, WITH_FAULTS, Server, server

NUM_STREAMS = 8
TIMEOUT_S = 4
LENGTHS = ((24, 32), (512, 64))  # tokens of prompts and answers that servers are compared with
A_WORD = {"9": 100}  # random weights may choose tokens without a text


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
    ready_s: dict[str, list[float]] = {fault: [] for fault in FAULTS}
    with server("--timeout", str(TIMEOUT_S), "--max-restarts", "20", env=WITH_FAULTS) as running:
        wanted = streams(running)
        for _ in range(count):
            fault, rank = random.choice(list(FAULTS)), random.choice([0, 1])
            pids = running.rank_pids()
            with ThreadPoolExecutor(1) as pool:
                found = pool.submit(streams, running)
                time.sleep(random.uniform(0, 1.5))
                began = time.monotonic()
                os.kill(pids[rank], FAULTS[fault])
                running.await_status(lambda status: not status["ready"])
                if random.random() < 0.2:  # another one while they start again
                    time.sleep(random.uniform(0, 2))
                    for pid in running.rank_pids()[:1]:
                        os.kill(pid, FAULTS["killed"])
                running.await_ready()
                ready_s[fault].append(time.monotonic() - began)
                try:
                    changed += sum(a != b for a, b in zip(found.result(120), wanted, strict=True))
                except Exception as error:
                    lost += 1
                    print(f"  rank {rank} {fault}: {error}")
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


def _load(url: str, model: str, concurrent: int, num_prompt: int, num_tokens: int, trial: int) -> tuple[float, float]:
    """(tokens per second of all requests, median seconds to the first token); no trial's prompts are cached."""
    firsts: dict[int, float] = {}

    def ask(number: int) -> int:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=300)
        began = time.perf_counter()
        words = " ".join([f"w{trial}", *(f"w{(number * 7 + i) % 97}" for i in range(num_prompt - 1))])
        pieces = client.completions.create(
            model=model, prompt=words, max_tokens=num_tokens, stream=True, temperature=0, logit_bias=A_WORD
        )
        for piece in pieces:
            if piece.choices and piece.choices[0].text:
                firsts.setdefault(number, time.perf_counter() - began)
        return num_tokens

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
        print(f"  llama of {parameters / 1e6:.0f}M parameters, float32, all on the same 2 cores, in turn, n={count}")
        (port,) = ranks.free_ports(1)
        theirs = [str(ranks.BIN / "mlx_lm.server"), "--model", name, "--port", str(port)]
        found: dict[tuple[int, int, int, str], list[tuple[float, float]]] = {}
        with server("--model", name) as two, server("--model", name, "--ranks", "1") as one, ranks.single(theirs):
            _await(f"http://127.0.0.1:{port}/v1/models")
            for trial, (_, lengths, concurrent) in enumerate(product(range(count), LENGTHS, (1, 4, 16))):
                for who, url, model in (
                    ("2 ranks", two.url, Path(name).name),
                    ("1 rank", one.url, Path(name).name),
                    ("mlx_lm.server", f"http://127.0.0.1:{port}", name),
                ):
                    run = _load(url, model, concurrent, *lengths, trial=trial)
                    found.setdefault((*lengths, concurrent, who), []).append(run)
    for (num_prompt, num_tokens, concurrent, who), runs in found.items():
        rate, first = statistics.median(run[0] for run in runs), statistics.median(run[1] for run in runs)
        what = f"{num_prompt} + {num_tokens} tokens, {concurrent:>2} at once"
        theirs_runs = found[num_prompt, num_tokens, concurrent, "mlx_lm.server"]
        ratio = statistics.median(run[0] / other[0] for run, other in zip(runs, theirs_runs, strict=True))
        print(f"  {what}  {who:<16} {rate:>7.1f} tok/s ({ratio:.2f} of theirs), first token {first:.3f} s")


def measure_together(rounds: int) -> None:
    began = time.monotonic()
    for done in range(1, rounds + 1):
        start_together(3, 3)  # which fails if any start isn't good, or was a second try
        print(f"  {done} rounds: {6 * done} good starts, 0 restarts, {time.monotonic() - began:.0f} s", flush=True)


def _load_of_streams(running: Server, num_streams: int, num_tokens: int) -> tuple[float, float]:
    """(tokens per second of all streams, seconds of the front's CPU for a thousand tokens)."""
    body = {"model": MODEL, "prompt": "Once upon a time a fox", "max_tokens": num_tokens, "stream": True}
    data = json.dumps({**body, "temperature": 1.0, "logit_bias": GOES_ON}).encode()

    def ask(_: int) -> None:
        request = urllib.request.Request(f"{running.url}/v1/completions", data, JSON)
        with urllib.request.urlopen(request, timeout=300) as answer:
            assert answer.read().rstrip().endswith(b"[DONE]")

    pid = running.running.process.pid
    began, before = time.perf_counter(), ranks.cpu_seconds(pid)
    with ThreadPoolExecutor(num_streams) as pool:
        list(pool.map(ask, range(num_streams)))
    made = num_streams * num_tokens
    return made / (time.perf_counter() - began), (ranks.cpu_seconds(pid) - before) / made * 1000


def measure_journal(count: int) -> None:
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:  # /tmp may be in memory
        journal = str(Path(name) / "journal")
        with server("--ranks", "1") as without, server("--ranks", "1", "--journal", journal) as having:
            for running in (without, having):
                _load_of_streams(running, 16, 20)
            found = [[_load_of_streams(running, 16, 150) for running in (without, having)] for _ in range(count)]
        size = sum(file.stat().st_size for file in Path(name).iterdir())
    ratios = [having[0] / without[0] for without, having in found]
    cpu = [statistics.median(pair[which][1] for pair in found) for which in (0, 1)]
    rate = statistics.median(pair[0][0] for pair in found)
    print(
        f"  {rate:.0f} tok/s without; with a journal {statistics.median(ratios):.3f} of it"
        f" ({min(ratios):.3f} to {max(ratios):.3f}, n={count})"
    )
    print(
        f"  CPU of the front for a token: {cpu[0]:.3f} ms without, {cpu[1]:.3f} ms with; {size / 2**20:.1f} MiB on disk"
    )


MEASURES: dict[str, tuple[Callable[[int], None], int]] = {
    "together": (measure_together, 20),
    "faults": (measure_faults, 50),
    "idle": (measure_idle, 1),
    "journal": (measure_journal, 7),
    "compare": (measure_compare, 5),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=[], help="figures to print; all if none is named")
    parser.add_argument("--count", type=int, help="faults, trials, histories or requests")
    add_options(parser)
    arguments = parser.parse_args()
    for what in arguments.what or MEASURES:
        print(f"{what}:", flush=True)
        if what in CAMPAIGNS:
            CAMPAIGNS[what](arguments)
            continue
        measure, count = MEASURES[what]
        measure(arguments.count or count)


if __name__ == "__main__":
    main()
