"""Slow is not dead: steps that take several times --timeout, and a rank among them that really is stuck."""

from __future__ import annotations

import fcntl
import json
import signal
import sys
import time
from pathlib import Path

import pytest

from tests import ranks
from tests.real_shapes import make_sparse_checkpoint
from tests.spmd.test_faults import endless
from tests.tiny_tokenizer import save_tokenizer

TIMEOUT_S = 1
# 134 million parameters in 4 bits: a core takes about a second for each token of a prompt.
SLOW = {
    "model_type": "llama", "hidden_size": 1024, "num_hidden_layers": 8, "intermediate_size": 4096,
    "num_attention_heads": 16, "num_key_value_heads": 16, "rms_norm_eps": 1e-5, "vocab_size": 128,
    "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip
PROMPT_TOKENS = 13
START_CPU_S = 4.0  # more than a rank needs before its first step, and less than until the end of that


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder: Path = tmp_path_factory.mktemp("slow")
    make_sparse_checkpoint(SLOW, folder)
    save_tokenizer(folder)
    prompt = " ".join(f"w{i}" for i in range(PROMPT_TOKENS))
    options = ["--prompt", prompt, "--max-tokens", "2", "--timeout", str(TIMEOUT_S), "--json"]
    return [str(ranks.BIN / "hippo_mpi.generate"), "--model", str(folder), *options]


def test_a_step_of_several_timeouts(command: list[str]) -> None:
    """All of the prompt but its last token in one step, of which each of two ranks does half after the other."""
    with ranks.ring([[*command, "--prefill-step-size", str(PROMPT_TOKENS - 1)]] * 2) as running:
        assert running[0].wait() == 0, running[0].err
    stats = json.loads(running[0].out)["stats"]
    assert stats["generation_tokens"] == 2
    if stats["time_to_first_token_s"] < 2 * 3 * TIMEOUT_S:
        pytest.skip(f"this machine is too fast for the test: {stats['time_to_first_token_s']:.1f} s")


def test_steps_are_sized_so_that_they_end_in_time(command: list[str]) -> None:
    with ranks.ring([command] * 2) as running:
        assert running[0].wait() == 0, running[0].err


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_stuck_in_a_slow_step_is_found(command: list[str], victim: int) -> None:
    with ranks.ring([[*command, "--prefill-step-size", str(PROMPT_TOKENS - 1)]] * 2) as running:
        while ranks.cpu_seconds(running[victim].process.pid) < START_CPU_S:
            assert running[victim].process.poll() is None, running[0].err
            time.sleep(0.1)
        running[victim].process.send_signal(signal.SIGSTOP)
        assert running[1 - victim].wait(20) == 3
        assert f"rank {victim} (" in running[1 - victim].err


_LATE_READER = f"""
import fcntl, sys, termios, time
fcntl.fcntl(0, fcntl.F_SETPIPE_SZ, 4096)
while int.from_bytes(fcntl.ioctl(0, termios.FIONREAD, bytes(4)), "little") < 4000:
    time.sleep(0.1)
time.sleep({6 * TIMEOUT_S})
print(len(sys.stdin.read()))
"""


@pytest.mark.skipif(not hasattr(fcntl, "F_SETPIPE_SZ"), reason="needs a small pipe")
def test_a_reader_that_pauses_ends_nothing() -> None:
    """`... | less`, say: rank 0 waits in a write for several timeouts."""
    command = [*endless(TIMEOUT_S), "--max-tokens", "1300"]
    piped = ["bash", "-c", 'set -o pipefail; "${@:3}" | "$1" -c "$2"', "bash", sys.executable, _LATE_READER, *command]
    with ranks.ring([piped, command]) as running:
        assert running[0].wait() == 0, running[0].err
        assert int(running[0].out) > 4096
