"""A rank that dies, stops, raises or goes astray ends the job: on every rank, in time, with its name, leaving nothing."""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from hippo_mpi.config.bundled import BUNDLED_MODEL
from tests import ranks
from tests.parity.tiny_models import make_checkpoint
from tests.ranks import Rank
from tests.tiny_tokenizer import save_tokenizer

TIMEOUT_S = 4
DEATH_S = 2.0
SLACK_S = 1.5  # two ranks on two shared cores, with the test beside them
FAULTY = str(Path(__file__).parent / "faulty_rank.py")


@functools.cache
def endless_model() -> str:
    """The bundled model with another end token, one that it never says."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    for path in BUNDLED_MODEL.iterdir():
        (folder / path.name).symlink_to(path)
    vocab_size = json.loads((BUNDLED_MODEL / "config.json").read_text())["vocab_size"]
    for name, key, value in (
        ("config.json", "eos_token_id", vocab_size - 1),
        ("generation_config.json", "eos_token_id", vocab_size - 1),
        ("tokenizer_config.json", "eos_token", None),
    ):
        (folder / name).unlink()
        (folder / name).write_text(json.dumps({**json.loads((BUNDLED_MODEL / name).read_text()), key: value}))
    return str(folder)


def endless(timeout_s: float = TIMEOUT_S) -> list[str]:
    """A generation that goes on for long."""
    model = ["--model", endless_model(), "--max-tokens", "1900"]
    return [str(ranks.BIN / "hippo_mpi.generate"), *model, "--timeout", str(timeout_s)]


def assert_ended(running: list[Rank], limit_s: float, named: str, survivors: list[int]) -> None:
    began = time.monotonic()
    for index in survivors:
        code = running[index].wait(limit_s + 5)
        assert code != 0, f"rank {index} ended with status 0"
    took = time.monotonic() - began
    assert took < limit_s + SLACK_S, f"took {took:.1f} s"
    lines = [line for index in survivors for line in running[index].err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, f"expected one line, got {lines}"
    assert named in lines[0]


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_killed_while_decoding(victim: int) -> None:
    with ranks.ring([endless()] * 3) as running:
        running[0].await_output()
        running[victim].process.kill()
        survivors = [i for i in range(3) if i != victim]
        assert_ended(running, DEATH_S, f"rank {victim} (", survivors)


@pytest.mark.parametrize("victim", [0, 1])
def test_stopped_while_decoding(victim: int) -> None:
    with ranks.ring([endless()] * 2) as running:
        running[0].await_output()
        running[victim].process.send_signal(signal.SIGSTOP)
        assert_ended(running, TIMEOUT_S, f"rank {victim} (", [1 - victim])


def test_two_of_three_are_stopped() -> None:
    """The one that is left has heard of rank 0 only, and leaves none behind all the same."""
    with ranks.ring([endless()] * 3) as running:
        running[0].await_output()
        for victim in (0, 1):
            running[victim].process.send_signal(signal.SIGSTOP)
        assert running[2].wait(TIMEOUT_S + SLACK_S) == 3
        assert [running[victim].wait(SLACK_S) for victim in (0, 1)] == [-signal.SIGKILL] * 2


@pytest.mark.parametrize("delay_s", [0.2, 0.8, 1.5, 2.2])
def test_killed_while_starting_or_loading(delay_s: float) -> None:
    with ranks.ring([[*endless(), "--start-timeout", str(TIMEOUT_S)]] * 2) as running:
        time.sleep(delay_s)
        running[1].process.kill()
        code = running[0].wait(TIMEOUT_S + 10)
        assert code != 0
        assert "rank" in running[0].err


@pytest.mark.parametrize("delay_s", [0.5, 2.0])
def test_stopped_while_starting_or_loading(delay_s: float) -> None:
    with ranks.ring([[*endless(), "--start-timeout", str(TIMEOUT_S)]] * 2) as running:
        time.sleep(delay_s)
        running[1].process.send_signal(signal.SIGSTOP)
        assert running[0].wait(2 * TIMEOUT_S + 8) != 0
        assert len([line for line in running[0].err.splitlines() if line.startswith("error:")]) == 1


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads CPU time from /proc")
@pytest.mark.parametrize("delay_s", [0.0, 0.3])
def test_killed_while_prefilling(delay_s: float, tmp_path: Path) -> None:
    """A prompt of 7,900 tokens in small chunks takes many seconds; rank 1 dies among them."""
    folder = make_checkpoint("llama-full", tmp_path)
    save_tokenizer(folder)
    prompt = " ".join(f"w{i % 99}" for i in range(7900))
    command = [*endless(), "--model", str(folder), "--prompt", prompt, "--ignore-chat-template"]
    command += ["--prefill-step-size", "4", "--max-context", "8000"]
    with ranks.ring([command] * 2) as running:
        while not running[1].err and ranks.cpu_seconds(running[1].process.pid) < 3.0 + delay_s:
            time.sleep(0.02)
        running[1].process.kill()
        assert_ended(running, DEATH_S, "rank 1 (", [0])
        assert "prefill" in running[0].err
        assert not running[0].out


def test_stuck_while_others_send(tmp_path: Path) -> None:
    """Rank 1 takes nothing any more (its heart beats), and rank 0 spins in a send of MLX's: that is no work."""
    folder = make_checkpoint("llama-full", tmp_path, overrides={"hidden_size": 768})
    save_tokenizer(folder)
    prompt = " ".join(f"w{i % 99}" for i in range(7900))
    options = [*endless()[1:], "--model", str(folder), "--prompt", prompt, "--ignore-chat-template"]
    options += ["--prefill-step-size", "64", "--max-context", "8000"]
    with ranks.ring([[endless()[0], *options], [sys.executable, FAULTY, "hang", *options]]) as running:
        assert running[0].wait() == 3
        assert "waiting for the next rank to take a message" in running[0].err


def test_stopped_between_turns_of_a_chat() -> None:
    command = [str(ranks.BIN / "hippo_mpi.chat"), "--timeout", str(TIMEOUT_S)]
    with ranks.ring([command] * 2, first_stdin=subprocess.PIPE) as running:
        running[0].await_chat()
        running[1].process.send_signal(signal.SIGSTOP)
        assert_ended(running, TIMEOUT_S, "rank 1 (", [0])


def test_killed_between_turns_of_a_chat() -> None:
    command = [str(ranks.BIN / "hippo_mpi.chat"), "--timeout", str(TIMEOUT_S)]
    with ranks.ring([command] * 3, first_stdin=subprocess.PIPE) as running:
        running[0].await_chat()
        running[2].process.kill()
        assert_ended(running, DEATH_S, "rank 2 (", [0, 1])


@pytest.mark.parametrize("what", ["raise", "exit", "hang", "skip"])
def test_rank_goes_astray(what: str) -> None:
    """Rank 1 raises, exits, stops getting on (its heart still beats), or loses a step."""
    faulty = [sys.executable, FAULTY, what, *endless()[1:]]
    with ranks.ring([endless(), faulty]) as running:
        running[0].await_output()
        limit = TIMEOUT_S if what == "hang" else DEATH_S
        assert_ended(running, limit, "rank 1", [0])
        assert running[1].wait(5) != 0


def test_a_mistake_of_ours_while_a_rank_loads_is_told_as_one() -> None:
    """A server tries again then: with status 2 it would give the model up."""
    with ranks.ring([endless(), [sys.executable, FAULTY, "load", *endless()[1:]]]) as running:
        assert [rank.wait() for rank in running] == [1, 1]
        assert "this rank was told not to load" in running[0].err and "error: rank 1 (" in running[0].err


def test_killed_under_mpirun() -> None:
    with ranks.single(ranks.mpirun(2, endless())) as launcher:
        launcher.await_output()
        below = ranks.descendants(launcher.process.pid)
        victim = max(below)
        subprocess.run(["kill", "-9", str(victim)], check=True)
        assert launcher.wait(10) != 0
        assert not ranks.await_end(below, 3)


@pytest.mark.parametrize(
    ("body", "awaited"),
    [(endless(), ("",)), ([str(ranks.BIN / "hippo_mpi.chat")], (">> ", "stderr"))],
    ids=["generate", "chat"],
)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("is_group", [True, False], ids=["group", "alone"])
def test_launcher_ended(body: list[str], awaited: tuple[str, ...], number: signal.Signals, is_group: bool) -> None:
    """mlx.launch leaves its ranks alone when it is ended; they see it. Ctrl-C reaches the whole group."""
    if number == signal.SIGINT and not is_group and not Path("/proc/self/wchan").exists():
        pytest.skip("only /proc tells that mlx.launch's main thread has ended")
    command = [
        str(ranks.BIN / "mlx.launch"),
        "-n",
        "2",
        "--starting-port",
        str(ranks.consecutive_ports(2)),
        "--",
        *body,
    ]
    with ranks.single(command, stdin=subprocess.PIPE) as launcher:
        launcher.await_output(*awaited)
        below = ranks.descendants(launcher.process.pid)
        if is_group:
            os.killpg(launcher.process.pid, number)
        else:
            launcher.process.send_signal(number)
        assert not ranks.await_end(below, 8)


STARTS = {
    "mlx.launch": [str(ranks.BIN / "mlx.launch"), "-n", "2", "--starting-port", str(ranks.consecutive_ports(2)), "--"],
    "mlx.launch-mpi": [str(ranks.BIN / "mlx.launch"), "-n", "2", "--backend", "mpi", "--"],
    "mpirun": ranks.mpirun(2, []),
    "run": [sys.executable, "-m", "hippo_mpi.run", "-n", "2"],
}


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds ranks by their environment in /proc")
@pytest.mark.parametrize(
    ("start", "victim", "moment"),
    [
        ("mlx.launch", 0, "imports"),
        ("mlx.launch", 1, "decoding"),
        ("mlx.launch-mpi", 1, "imports"),
        ("mpirun", 0, "decoding"),
        ("run", 0, "imports"),
        ("run", 1, "imports"),
        ("run", 0, "decoding"),
    ],
)
def test_stopped_under_a_launcher(start: str, victim: int, moment: str) -> None:
    """No SIGTERM ends a rank that is stopped, for which mlx.launch would wait for ever."""
    options = endless()[start == "run" :]
    with ranks.single([*STARTS[start], *options, "--start-timeout", str(TIMEOUT_S)], stdin=subprocess.PIPE) as launcher:
        if moment == "decoding":
            launcher.await_output()
        pid = ranks.await_rank(launcher, victim)
        os.kill(pid, signal.SIGSTOP)
        code = launcher.wait(3 * TIMEOUT_S + 10)
        assert not ranks.is_alive(pid)
        if not start.startswith("mlx.launch"):  # whose status is always 0
            assert code == 3
        assert f"rank {1 - victim} (" in launcher.err if moment == "imports" else f"rank {victim} (" in launcher.err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_mpirun_ended(number: signal.Signals) -> None:
    with ranks.single(ranks.mpirun(2, endless())) as launcher:
        launcher.await_output()
        below = ranks.descendants(launcher.process.pid)
        launcher.process.send_signal(number)
        assert launcher.wait(15) != 0
        assert not ranks.await_end(below, 5)
