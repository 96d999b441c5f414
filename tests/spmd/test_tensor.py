"""Real ranks of which each holds a part of every layer: token for token what mlx-lm generates, and ends that have names."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model

from tests import ranks
from tests.measure.shaped_link import run_over_link
from tests.parity import tiny_models
from tests.parity.test_scripts import in_batches
from tests.servers import server
from tests.spmd.test_families import answer_of
from tests.spmd.test_faults import DEATH_S, FAULTY, SLACK_S, TIMEOUT_S, endless
from tests.spmd.test_library import BATCH, GENERATES, PROMPT, run
from tests.tiny_tokenizer import save_tokenizer

SHARDS = GENERATES.replace("model.pipeline(group)", "hippo_mpi.shard(model, group)")
TENSOR = ["--parallel", "tensor"]


def expected_tokens(folder: Path, num_tokens: int, prompt: list[int] = PROMPT) -> list[int]:
    model, _ = load_model(folder)
    return [token for token, _ in generate_step(mx.array(prompt), model, max_tokens=num_tokens)]


@pytest.mark.parametrize(
    ("name", "num_tokens", "backend", "options"),
    [
        ("llama", 200, "ring", []), ("mixtral", 200, "ring", ["--width-split", "3,2"]), ("nanbeige-loops", 200, "mpi", []),
        ("talkie", 60, "ring", ["--tensor", "exact"]), ("dbrx", 60, "ring", []),
        ("qwen3", 60, "ring", ["--collectives", "stepwise"]), ("olmo2", 60, "mpi", ["--collectives", "stepwise"]),
    ],
)  # fmt: skip
def test_tokens_are_those_of_mlx_lm(
    name: str, num_tokens: int, backend: str, options: list[str], tmp_path: Path
) -> None:
    assert_tokens(name, 2, backend, options, num_tokens, tmp_path)


@pytest.mark.parametrize(
    ("name", "num_ranks", "backend", "options"),
    [
        ("mixtral", 3, "ring", ["--width-split", "3,2,1"]), ("qwen3_moe", 4, "ring", ["--stages", "2"]),
        ("gemma3n", 4, "mpi", ["--stages", "2"]), ("phi3", 6, "ring", ["--stages", "2", "--layer-split", "2,4"]),
    ],
)  # fmt: skip
def test_more_ranks(name: str, num_ranks: int, backend: str, options: list[str], tmp_path: Path) -> None:
    """Fewer tokens: of so many ranks, only two at a time find a core here."""
    assert_tokens(name, num_ranks, backend, options, 20, tmp_path)


def assert_tokens(name: str, num_ranks: int, backend: str, options: list[str], num_tokens: int, tmp_path: Path) -> None:
    folder = tiny_models.make_checkpoint(name, tmp_path)
    save_tokenizer(folder)
    command = [
        str(ranks.BIN / "hippo_mpi.generate"), "--model", str(folder), "--json", "--ignore-chat-template", "--prompt",
        " ".join(f"w{token}" for token in PROMPT), "--max-tokens", str(num_tokens), "--max-context", "256", *TENSOR, *options,
    ]  # fmt: skip
    answer = answer_of(command, num_ranks, backend)
    found = answer["token_ids"]
    assert found == expected_tokens(folder, num_tokens)[: len(found)]
    assert len(found) == num_tokens or answer["finish_reason"] == "stop"


def test_a_layout_is_chosen(tmp_path: Path) -> None:
    """Whatever is chosen: the same tokens, and a line that says why."""
    folder = tiny_models.make_checkpoint("mixtral", tmp_path)
    save_tokenizer(folder)
    prompt = " ".join(f"w{token}" for token in PROMPT)
    command = [
        str(ranks.BIN / "hippo_mpi.generate"), "--model", str(folder), "--ignore-chat-template", "--prompt", prompt,
        "--max-tokens", "30", "--max-context", "256", "--json", "--parallel", "auto",
    ]  # fmt: skip
    with ranks.ring([command] * 2) as running:
        assert [rank.wait(60) for rank in running] == [0, 0]
    found = json.loads(running[0].out)["token_ids"]
    assert found == expected_tokens(folder, 30)[: len(found)]
    assert re.search(r"chosen: .*, [\d,.]+ tokens/s predicted for one request; ", running[0].err)


def test_one_rank_is_taken_over_a_slow_link(tmp_path: Path) -> None:
    """Several requests at once, prompts in pieces: the tokens of mlx-lm; the other rank has no layers, and ends in peace."""
    folder = tiny_models.make_checkpoint("mixtral", tmp_path)
    save_tokenizer(folder)
    prompts = [[*PROMPT, token] for token in range(3)]
    lines = [json.dumps({"custom_id": str(n), "prompt": " ".join(f"w{t}" for t in p)}) for n, p in enumerate(prompts)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    options = [
        str(tmp_path / "prompts.jsonl"), "-o", str(tmp_path / "answers.jsonl"), "--model", str(folder),
        "--ignore-chat-template", "--max-tokens", "20", "--max-context", "256", "--prefill-step-size", "4", "--parallel", "auto",
    ]  # fmt: skip
    said = run_over_link("hippo_mpi.batch", options, "", latency_s=0.02, bytes_per_s=1e9).err
    assert re.search(r"chosen: one rank alone, .* for 16 at once; pipeline: [\d,.]+; the other ranks stay idle", said)
    found = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    texts = {answer["custom_id"]: answer["response"]["body"]["choices"][0]["message"]["content"] for answer in found}
    for number, prompt in enumerate(prompts):
        has_text = [token for token in expected_tokens(folder, 20, prompt) if token < 100]  # of the tiny tokenizer
        assert texts[str(number)].split() == [f"w{token}" for token in has_text]


def test_a_benchmark_says_that_one_rank_is_taken(tmp_path: Path) -> None:
    folder = tiny_models.make_checkpoint("deepseek_v3", tmp_path)
    save_tokenizer(folder)
    options = [
        "--model", str(folder), "--parallel", "auto", "--json", "--max-context", "256",
        "--concurrent", "1", "--trials", "1", "--prompt-tokens", "4", "--generation-tokens", "4", "--compare", "mlx-lm",
    ]  # fmt: skip
    found = json.loads(run_over_link("hippo_mpi.benchmark", options, "", latency_s=0.02, bytes_per_s=1e9).out)
    modes = [result["mode"] for result in found["results"]]
    assert modes == ["standalone", "one rank alone", "replicas", "mlx-lm", "mlx-lm pipeline"]


@pytest.mark.parametrize(
    ("name", "num_ranks", "backend", "call"),
    [("gemma3_text", 2, "ring", "shard(model, group)"), ("qwen3_moe", 2, "mpi", "shard(model, group, exact=True)")],
)
def test_scripts(name: str, num_ranks: int, backend: str, call: str, tmp_path: Path) -> None:
    folder = tiny_models.make_checkpoint(name, tmp_path)
    model, _ = load_model(folder)
    expected = f"{expected_tokens(folder, 12)} {in_batches(model, *BATCH)}\n"
    ended = run(SHARDS.replace("shard(model, group)", call), num_ranks, backend, folder, (PROMPT, *BATCH))
    assert not any(rank.process.returncode for rank in ended), ended[0].err
    assert "".join(rank.out for rank in ended) == expected * num_ranks
    assert not any("[ring]" in rank.err for rank in ended)  # sums that nobody waited for at the end


ASTRAY = """
import sys
from pathlib import Path
import hippo_mpi
import mlx.core as mx
from mlx_lm.utils import load_model

group = mx.distributed.init()
model, _ = load_model(Path(sys.argv[1]), lazy=True)
hippo_mpi.shard(model, group, timeout=4)
model(mx.ones((1, 3 + group.rank()), mx.int32))
"""


def test_calls_that_differ_are_named(tmp_path: Path) -> None:
    ended = run(ASTRAY, 2, "ring", tiny_models.make_checkpoint("llama", tmp_path))
    assert all(rank.process.returncode == 3 for rank in ended)
    said = "".join(rank.err for rank in ended)
    assert "with tokens (1, 3)" in said and "with tokens (1, 4)" in said


@pytest.mark.parametrize(
    ("fault", "victim", "num_ranks"), [(signal.SIGKILL, 1, 2), (signal.SIGSTOP, 0, 2), (signal.SIGSTOP, 1, 4), (signal.SIGKILL, 3, 4)]
)  # fmt: skip
def test_a_rank_that_is_gone_inside_a_sum_is_named(fault: signal.Signals, victim: int, num_ranks: int) -> None:
    """On the ring, where four ranks are two stages."""
    command = [*endless(), *TENSOR, *(["--stages", "2"] if num_ranks == 4 else [])]
    limit_s = DEATH_S if fault == signal.SIGKILL else TIMEOUT_S
    with ranks.ring([command] * num_ranks) as running:
        running[0].await_output()
        running[victim].process.send_signal(fault)
        survivor = running[0 if victim else 1]
        assert survivor.wait(limit_s + SLACK_S + 5) == 3
        # MLX's ring writes lines of its own in pieces, between which ours may come.
        assert survivor.err.count("error: ") == 1
        assert f"rank {victim} (" in survivor.err.partition("error: ")[2]


@pytest.mark.parametrize(("fault", "victim"), [(signal.SIGKILL, 0), (signal.SIGSTOP, 1)])
def test_a_rank_that_is_gone_inside_a_sum_of_mpi_is_named(fault: signal.Signals, victim: int) -> None:
    with ranks.single(ranks.mpirun(2, [*endless(), *TENSOR])) as launcher:
        launcher.await_output()
        os.kill(ranks.await_rank(launcher, victim), fault)
        assert launcher.wait((DEATH_S if fault == signal.SIGKILL else TIMEOUT_S) + 10) != 0
        if fault == signal.SIGSTOP:  # of a death, mpirun itself speaks
            assert f"rank {victim} (" in launcher.err


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_a_rank_whose_router_chooses_other_experts_is_named(num_ranks: int, tmp_path: Path) -> None:
    """As where chips round differently: sums of other experts' parts would be nonsense."""
    folder = tiny_models.make_checkpoint("qwen3_moe", tmp_path)
    save_tokenizer(folder)
    options = ["--model", str(folder), "--prompt", "w1 w2", "--ignore-chat-template", "--max-tokens", "90", "--json"]
    options += ["--max-context", "256", *TENSOR, *(["--stages", "2"] if num_ranks == 4 else [])]
    commands = [[str(ranks.BIN / "hippo_mpi.generate"), *options]] * num_ranks
    commands[-1] = [sys.executable, FAULTY, "choose", *options]
    with ranks.ring(commands) as running:
        assert [rank.wait(60) for rank in running] == [3] * num_ranks, running[0].err
    names = [rf"rank {rank} \({socket.gethostname()}\)" for rank in (num_ranks - 1, num_ranks - 2)]
    assert re.search(f"{names[0]} has chosen other experts than {names[1]} for the same tokens", running[0].err), (
        running[0].err
    )


def test_a_server_goes_on_after_a_rank_was_killed() -> None:
    """Answers that were at work come back whole: the same tokens, each once."""
    asked: dict[str, Any] = {"model": "story-3m", "max_tokens": 150, "temperature": 0, "stream": True}
    asked["messages"] = [{"role": "user", "content": "Tell me a story about a fox."}]

    def text_of(stream: Any) -> str:
        return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    with server("--ranks", "2", *TENSOR) as here:
        client = here.client()
        undisturbed = text_of(client.chat.completions.create(**asked))
        stream = iter(client.chat.completions.create(**asked))
        first = next(stream)
        os.kill(here.rank_pids()[-1], signal.SIGKILL)
        assert text_of([first, *stream]) == undisturbed
        assert here.status()["restarts"] == 1
