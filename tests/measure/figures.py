"""Print the figures that the project claims: python tests/measure/figures.py [what ...]

    decode   tokens per second of one stream, 2 ranks against 1
    prefill  tokens per second of a 4,096-token prompt, 2 ranks against 1
    tensor   tokens per second of one stream, each of 2 ranks holding a part of every layer, over the ring and MPI
    draft    tokens per second of one stream of the bundled model, with its draft model against without, on 1 and 2 ranks
    benchmark hippo_mpi.benchmark --compare mlx-lm with the model of decode; its plot goes to rates.png
    hop      time per hop of an 8 KiB hidden state, on the ring and on MPI
    memory   peak resident memory of each rank against the bytes of its own tensors
    shapes   seconds and peak memory to open, trace and plan checkpoints of the shapes that people run
    size     a random 4-bit checkpoint of 12 GB on 2 ranks: how fast it loads, and peak memory against own tensors
    start    seconds from the command to the first token of the bundled model
    simulate what hippo_mpi.plan --simulate predicts for links of given latency and bandwidth, against real runs over them
    idle     CPU of the ranks of a chat that waits

Ratios come from runs side by side, in turn (1, 2, 1, 2 ...), medians of --trials. Each rank has one core and one
BLAS thread. On Linux, give --preload /usr/lib/x86_64-linux-gnu/libopenblas.so.0: decoding is then bound by memory,
as on a Mac's GPU, and not by the wheel's slow BLAS.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models import llama

from hippo_mpi.config.bundled import BUNDLED_MODEL
from hippo_mpi.units import count_of
from tests import ranks
from tests.measure.shaped_link import run_over_link
from tests.real_shapes import CONFIGS, fill_holes, make_sparse_checkpoint
from tests.tiny_tokenizer import save_tokenizer

GENERATE = str(ranks.BIN / "hippo_mpi.generate")
PROMPT_TOKENS = 4096


def make_llama(folder: Path, num_layers: int, hidden: int, vocab: int, dtype: mx.Dtype) -> int:
    """A llama with random weights; returns the number of its parameters."""
    config: dict[str, Any] = {
        "model_type": "llama", "hidden_size": hidden, "num_hidden_layers": num_layers,
        "intermediate_size": hidden * 8 // 3 // 64 * 64, "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64, "rms_norm_eps": 1e-5, "vocab_size": vocab,
        "max_position_embeddings": 8192, "tie_word_embeddings": True,
    }  # fmt: skip
    model = llama.Model(llama.ModelArgs.from_dict(config))
    weights = {name: array.astype(dtype) for name, array in tree_flatten(model.parameters())}
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
    save_tokenizer(folder)
    return sum(array.size for array in weights.values())


def run_pinned(num_ranks: int, command: list[str], preload: str) -> str:
    """What rank 0 of a run prints, with each rank on a core of its own."""
    cores = os.cpu_count() or 1
    env = ["env", "OPENBLAS_NUM_THREADS=1", *([f"LD_PRELOAD={preload}"] if preload else [])]
    pin = (lambda rank: ["taskset", "-c", str(rank % cores)]) if sys.platform == "linux" else (lambda rank: [])
    commands = [[*pin(rank), *env, *command] for rank in range(num_ranks)]
    with ranks.ring(commands) as running:
        codes = [rank.wait(1800) for rank in running]
        if any(codes):
            raise SystemExit(running[0].err)
        return running[0].out


def run_under_mpi(num_ranks: int, command: list[str], preload: str) -> str:
    """As `run_pinned`, by mpirun."""
    command = ["env", "OPENBLAS_NUM_THREADS=1", *([f"LD_PRELOAD={preload}"] if preload else []), *command]
    with ranks.single([*ranks.mpirun(num_ranks, []), "--bind-to", "core", *command]) as launcher:
        if launcher.wait(1800):
            raise SystemExit(launcher.err)
        return launcher.out


def run_generate(num_ranks: int, options: list[str], preload: str) -> dict[str, Any]:
    """The --json object of a run with each rank on a core of its own."""
    return dict(json.loads(run_pinned(num_ranks, [GENERATE, "--json", *options], preload)))


def compare(options: list[str], figure: str, preload: str, trials: int) -> None:
    """Print the medians of `figure` for 1 and 2 ranks, and of the ratio pair by pair."""
    found: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(trials):
        for num_ranks in (1, 2):
            found[num_ranks].append(run_generate(num_ranks, options, preload)["stats"][figure])
    ratios = [two / one for one, two in zip(found[1], found[2], strict=True)]
    one, two = statistics.median(found[1]), statistics.median(found[2])
    spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
    print(
        f"  1 rank {one:.1f} tok/s, 2 ranks {two:.1f} tok/s: ratio {statistics.median(ratios):.3f} ({spread}, n={trials})"
    )


def make_dense_llama(folder: Path) -> int:
    """Make one whose head is 6 % of it, as in an 8B Llama; returns its number of parameters."""
    return make_llama(folder, 14, 768, 8000, mx.float32)


def measure_benchmark(_: str, preload: str, trials: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "llama-105m"  # which the picture says
        folder.mkdir()
        parameters = make_dense_llama(folder)
        print(f"  llama of {parameters / 1e6:.0f}M parameters, float32, {preload or 'the wheel’s own BLAS'}")
        lengths = ["--prompt-tokens", "64", "--generation-tokens", "32", "--trials", str(trials), "--timeout", "120"]
        command = [str(ranks.BIN / "hippo_mpi.benchmark"), "--model", str(folder), *lengths]
        print(run_pinned(2, [*command, "--compare", "mlx-lm", "--plot", "rates.png"], preload))


def measure_speed(what: str, preload: str, trials: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        parameters = make_dense_llama(Path(name))
        print(f"{what}, llama of {parameters / 1e6:.0f}M parameters, float32, {preload or 'the wheel’s own BLAS'}")
        prompt = " ".join(f"w{i % 97}" for i in range(PROMPT_TOKENS if what == "prefill" else 16))
        options = ["--model", name, "--prompt", prompt, "--timeout", "120", "--max-context", "5000"]
        if what == "prefill":
            compare([*options, "--max-tokens", "1"], "prompt_tps", preload, trials)
        else:
            compare([*options, "--max-tokens", "64"], "generation_tps", preload, trials)


def measure_tensor(_: str, preload: str, trials: int) -> None:
    """Beside mlx-lm's own way; the vocabulary is a quarter of the model."""
    with tempfile.TemporaryDirectory() as name:
        parameters = make_llama(Path(name), 12, 768, 32000, mx.float32)
        print(f"  llama of {parameters / 1e6:.0f}M parameters, float32, {preload or 'the wheel’s own BLAS'}")
        options = ["--model", name, "--parallel", "tensor", "--compare", "mlx-lm", "--trials", str(trials)]
        options += ["--concurrent", "1", "--prompt-tokens", "128", "--generation-tokens", "48"]
        for run in (run_pinned, run_under_mpi):
            print(run(2, [str(ranks.BIN / "hippo_mpi.benchmark"), *options], preload), flush=True)


def measure_draft(_: str, preload: str, trials: int) -> None:
    draft = str(BUNDLED_MODEL.parent / "story-draft")
    options = ["--precision", "float32", "--max-tokens", "140"]
    print(f"{BUNDLED_MODEL.name} in float32, drafts of story-draft, {preload or 'the wheel’s own BLAS'}")
    for num_ranks in (1, 2):
        ratios, rates, last = [], [], {}
        for _ in range(trials):
            plain = run_generate(num_ranks, options, preload)
            last = run_generate(num_ranks, [*options, "--draft-model", draft], preload)
            assert last["token_ids"] == plain["token_ids"]
            rates.append((plain["stats"]["generation_tps"], last["stats"]["generation_tps"]))
            ratios.append(rates[-1][1] / rates[-1][0])
        accepted = f"{last['stats']['accepted_draft_tokens']} of {last['stats']['draft_tokens']} draft tokens accepted"
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}, n={trials}"
        without, drafted = (statistics.median(column) for column in zip(*rates, strict=True))
        print(
            f"  {count_of(num_ranks, 'rank')}: {without:.0f} tok/s without, {drafted:.0f} with, ratio"
            f" {statistics.median(ratios):.2f} ({spread}); {accepted}"
        )


_HOP = """
from hippo_mpi.transport.hop_times import echo, time_ring
from hippo_mpi.transport.channel import RingChannel
from hippo_mpi.transport.control import Control
from hippo_mpi.transport.layout import Layout
from hippo_mpi.transport.world import connect, detect_launch
world = connect(detect_launch(), 30)
control = Control(world, 30, 30)
channel = RingChannel(world, control, Layout(world.size))
if world.rank == 0:
    hop = next(hop for hop in time_ring(channel, world.size, control.progress) if hop.size_bytes == 8192)
    print(f"  {world.backend}: median {hop.median_s * 1e6:.0f} us, p95 {hop.p95_s * 1e6:.0f} us")
else:
    echo(channel)
control.gather({}); control.share({} if world.rank == 0 else None); control.close()
channel = None; world.group = None
"""


def measure_hop(*_: Any) -> None:
    print("time per hop of 8 KiB, with its announcement on the control socket, half a round trip, n=200")
    command = [sys.executable, "-c", _HOP]
    with ranks.ring([command] * 2) as running:
        running[0].wait(120)
        print(running[0].out, end="")
    with ranks.single(ranks.mpirun(2, command)) as launcher:
        launcher.wait(120)
        print(launcher.out, end="")


def measure_memory(*_: Any) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parameters = make_llama(folder, 24, 1536, 32000, mx.float16)
        empty = "import hippo_mpi.generate, hippo_mpi.planning.machine as m; print(m.peak_resident_bytes())"
        empty_bytes = int(subprocess.run([sys.executable, "-c", empty], capture_output=True, text=True).stdout)
        size = (folder / "model.safetensors").stat().st_size
        print(
            f"llama of {parameters / 1e6:.0f}M parameters, float16, {size / 2**20:.0f} MiB; an empty process {empty_bytes / 2**20:.0f} MiB"
        )
        print("  ranks  rank  layers  own tensors  peak resident  less empty  of own tensors")
        for num_ranks in (1, 2, 3):
            options = [
                "--model",
                name,
                "--prompt",
                "w1 w2 w3",
                "--max-tokens",
                "4",
                "--max-context",
                "64",
                "--timeout",
                "300",
            ]
            found = run_generate(num_ranks, options, "")["stats"]["ranks"]
            for rank, part in enumerate(found):
                own, peak = part["weight_bytes"], part["peak_resident_bytes"]
                less = peak - empty_bytes
                print(
                    f"  {num_ranks:>5}  {rank:>4}  {part['layers'][0]:>2}-{part['layers'][1] - 1:<3}  {own / 2**20:>7.0f} MiB"
                    f"  {peak / 2**20:>9.0f} MiB  {less / 2**20:>6.0f} MiB  {less / own:>13.2f}"
                )
            print(f"         sum of own tensors {sum(part['weight_bytes'] for part in found) / 2**20:.0f} MiB")


_SHAPE = """
import sys, time
from pathlib import Path
from hippo_mpi.checkpoint.checkpoint import ModelSource, open_checkpoint
from hippo_mpi.sharding.slot_caches import KVSettings
from hippo_mpi.planning.layer_split import Machine, plan_split
from hippo_mpi.planning.model_costs import model_info
from hippo_mpi.planning.machine import peak_resident_bytes
began = time.perf_counter()
checkpoint = open_checkpoint(ModelSource(Path(sys.argv[1])))
traced = time.perf_counter()
info = model_info(checkpoint, KVSettings())
for count in range(1, 9):
    plan_split(info, [Machine("m", 2 << 40)] * count)
planned = time.perf_counter()
print(
    f"{info.num_layers} layers, {len(checkpoint.weight_bytes):,} arrays, {sum(checkpoint.weight_bytes.values()) / 1e9:.1f} GB:"
    f" opened and traced in {traced - began:.1f} s, planned for 1 to 8 machines in {planned - traced:.1f} s;"
    f" peak {peak_resident_bytes() / 2**30:.2f} GiB"
)
"""


def measure_shapes(*_: Any) -> None:
    for name, config in CONFIGS.items():
        with tempfile.TemporaryDirectory() as folder:
            make_sparse_checkpoint(config, Path(folder))
            found = subprocess.run([sys.executable, "-c", _SHAPE, folder], capture_output=True, text=True, check=True)
            print(f"  {name}: {found.stdout}", end="", flush=True)


# A mixture, so that a token reads a tenth of it: a CPU takes a minute for a token of a dense one.
_BIG: dict[str, Any] = {
    "model_type": "qwen3_moe", "hidden_size": 2048, "num_hidden_layers": 32, "intermediate_size": 6144,
    "moe_intermediate_size": 768, "num_experts": 140, "num_experts_per_tok": 2, "num_attention_heads": 16,
    "num_key_value_heads": 4, "head_dim": 128, "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True,
    "vocab_size": 32000, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
    "tie_word_embeddings": False,
}  # fmt: skip


def measure_size(*_: Any) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        total = sum(make_sparse_checkpoint(_BIG, folder).values())
        files = sorted(folder.glob("*.safetensors"))
        for file in files:
            fill_holes(file)
        save_tokenizer(folder)
        began = time.perf_counter()
        subprocess.run(["cat", *files], stdout=subprocess.DEVNULL, check=True)
        read_s = time.perf_counter() - began
        print(f"qwen3_moe, 4-bit, random, {total / 1e9:.1f} GB in {len(files)} files; read by cat in {read_s:.1f} s")
        options = [
            "--model",
            name,
            "--prompt",
            "w1",
            "--max-tokens",
            "4",
            "--max-context",
            "64",
            "--ignore-chat-template",
        ]
        command = [GENERATE, "--json", *options]
        began = time.perf_counter()
        with ranks.ring([["env", "OPENBLAS_NUM_THREADS=1", *command]] * 2) as running:
            if any([rank.wait(900) for rank in running]):
                raise SystemExit(running[0].err)
        took_s, stats = time.perf_counter() - began, json.loads(running[0].out)["stats"]
        answered_s = stats["time_to_first_token_s"] + (stats["generation_tokens"] - 1) / stats["generation_tps"]
        print(f"  2 ranks: {took_s - answered_s:.1f} s to start and load (and end), {answered_s:.1f} s to answer")
        for rank, part in enumerate(stats["ranks"]):
            own, peak = part["weight_bytes"], part["peak_resident_bytes"]
            print(f"  rank {rank}: own tensors {own / 1e9:.2f} GB, peak resident {peak / 1e9:.2f} GB: {peak / own:.3f}")


_LINKS = ((0.0005, 1e9), (0.005, 100e6), (0.02, 20e6))  # seconds, bytes per second
_OWN_LATENCY_S = 0.0003  # of this machine's loopback, the relay and a rank that wakes up


def measure_simulation(_: str, preload: str, trials: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        parameters = make_llama(Path(name), 12, 768, 1024, mx.float32)
        print(f"llama of {parameters / 1e6:.0f}M parameters, float32, 2 ranks, {preload or 'the wheel’s own BLAS'}")
        load = ["--model", name, "--prompt-tokens", "1024", "--concurrent", "1,4,16", "--timeout", "120", "--json"]
        times = Path(name) / "times.json"
        times.write_text(run_over_link("hippo_mpi.plan", [*load, "--simulate"], preload, *_LINKS[0]).out)
        benchmark = [*load, "--generation-tokens", "24", "--trials", str(trials), "--pipeline-only"]
        for latency_s, bytes_per_s in _LINKS:
            link = f"{(latency_s + _OWN_LATENCY_S) * 1e3:.3g}ms,{bytes_per_s / 1e6:g}MB/s"
            command = [
                str(ranks.BIN / "hippo_mpi.plan"),
                *load,
                "--simulate",
                "--link",
                link,
                "--stage-times",
                str(times),
            ]
            machines = ["--machine", "a:4", "--machine", "b:4"]
            predicted = json.loads(subprocess.run([*command, *machines], capture_output=True, check=True).stdout)[
                "pipeline"
            ]
            found = json.loads(run_over_link("hippo_mpi.benchmark", benchmark, preload, latency_s, bytes_per_s).out)[
                "results"
            ]
            rates = {result["concurrent"]: result["trials"] for result in found}
            pairs = {"prompt": (1024 / predicted["first_token_s"], [trial["prompt_tps"] for trial in rates[1]])}
            for count, runs in rates.items():
                pairs[f"{count} at once"] = predicted["decode_tps"][str(count)], [trial["decode_tps"] for trial in runs]
            for label, (wanted, real) in pairs.items():
                median = statistics.median(real)
                print(
                    f"  {link:<16} {label:<11} predicted {wanted:>6.1f}, real {median:>6.1f} tok/s: {wanted / median:.3f}"
                )


def measure_start(_: str, __: str, trials: int) -> None:
    run = Path(__file__).parents[2] / "launch" / "run"
    for label, command in (("./launch/run", [str(run)]), ("hippo_mpi.generate alone", [GENERATE])):
        times = []
        for _ in range(trials):
            began = time.perf_counter()
            with ranks.single(command, stdin=subprocess.PIPE) as running:
                running.await_output()
                times.append(time.perf_counter() - began)
                running.wait()
        print(
            f"  {label}: first token after {statistics.median(times):.2f} s ({min(times):.2f} to {max(times):.2f}, n={trials})"
        )


def measure_idle(*_: Any) -> None:
    chat = [str(ranks.BIN / "hippo_mpi.chat")]
    with ranks.ring([chat] * 2, first_stdin=subprocess.PIPE) as running:
        running[0].await_chat()
        time.sleep(1)

        before = [ranks.cpu_seconds(rank.process.pid) for rank in running]
        time.sleep(30)
        shares = [(ranks.cpu_seconds(rank.process.pid) - b) / 30 for rank, b in zip(running, before, strict=True)]
    print("  " + ", ".join(f"rank {rank}: {share:.2%} of a core" for rank, share in enumerate(shares)) + " over 30 s")


MEASURES: dict[str, Callable[[str, str, int], None]] = {
    "decode": measure_speed,
    "prefill": measure_speed,
    "tensor": measure_tensor,
    "draft": measure_draft,
    "benchmark": measure_benchmark,
    "hop": measure_hop,
    "memory": measure_memory,
    "simulate": measure_simulation,
    "shapes": measure_shapes,
    "size": measure_size,
    "start": measure_start,
    "idle": measure_idle,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=[], help="figures to print; all if none is named")
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--preload", default="", help="a BLAS library to preload into the ranks")
    arguments = parser.parse_args()
    versions = ", ".join(f"{name} {version(name)}" for name in ("hippo-mpi", "mlx", "mlx-lm"))
    print(f"{date.today()}, {versions}, {os.cpu_count()} cores, {platform.machine()} {platform.system()}")
    for what in arguments.what or MEASURES:
        print(f"{what}:", flush=True)
        MEASURES[what](what, arguments.preload, arguments.trials)


if __name__ == "__main__":
    main()
