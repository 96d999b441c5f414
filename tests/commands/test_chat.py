"""hippo_mpi.chat as a person uses it: turns, a kept cache, and no work while nobody speaks."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from mlx_lm import load, stream_generate

from hippo_mpi.config.bundled import BUNDLED_MODEL
from tests import ranks
from tests.ranks import Rank
from tests.spmd.test_faults import endless_model
from tests.terminals import CTRL_C, Terminal, terminal

CHAT = [str(ranks.BIN / "hippo_mpi.chat"), "--max-tokens", "200"]
HELP_ENDS = "as is a line that begins with a space.\n"
TURNS = ["Tell me a story about a fox.", "What does a cow say?", "Thank you!"]


def say(rank: Rank, line: str) -> str:
    """Send a line and wait for the answer, behind which the help is asked for."""
    asked, shown = rank.err.count(HELP_ENDS), len(rank.out)
    assert rank.process.stdin is not None
    rank.process.stdin.write(f"{line}\n/help\n".encode())
    rank.process.stdin.flush()
    ends = time.monotonic() + 60
    while rank.err.count(HELP_ENDS) == asked:
        assert time.monotonic() < ends, rank.err
        assert rank.process.poll() is None, rank.err
        time.sleep(0.02)
    length = -1
    while length != len(rank.out):  # the answer comes through another pipe than the help that follows it
        length = len(rank.out)
        time.sleep(0.2)
    return rank.out[shown:].rstrip("\n")


@pytest.mark.slow
def test_turns_are_those_of_mlx_lm_and_the_cache_is_kept() -> None:
    model, tokenizer = load(str(BUNDLED_MODEL))
    messages: list[dict[str, str]] = []
    with ranks.ring([CHAT] * 2, first_stdin=subprocess.PIPE) as running:
        first = running[0]
        for turn in TURNS:
            messages.append({"role": "user", "content": turn})
            tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
            expected = "".join(p.text for p in stream_generate(model, tokenizer, tokens, max_tokens=200))
            assert say(first, turn) == expected
            messages.append({"role": "assistant", "content": expected})
        say(first, "r")
        alone = tokenizer.apply_chat_template([{"role": "user", "content": TURNS[1]}], add_generation_prompt=True)
        expected = "".join(p.text for p in stream_generate(model, tokenizer, alone, max_tokens=200))
        assert say(first, TURNS[1]) == expected
        first.process.stdin.write(b"q\n")  # type: ignore[union-attr]
        first.process.stdin.flush()  # type: ignore[union-attr]
        assert [rank.wait() for rank in running] == [0, 0]


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="reads CPU time from /proc")
@pytest.mark.slow
def test_idle_ranks_take_no_cpu() -> None:
    with ranks.ring([CHAT] * 2, first_stdin=subprocess.PIPE) as running:
        say(running[0], TURNS[1])
        before = [ranks.cpu_seconds(rank.process.pid) for rank in running]
        time.sleep(5)
        used = [ranks.cpu_seconds(rank.process.pid) - b for rank, b in zip(running, before, strict=True)]
    assert max(used) < 0.15  # 3 % of a core; what is measured is in the figures of tests/measure


def test_a_turn_that_is_too_long_is_refused_and_the_chat_goes_on() -> None:
    with ranks.single([*CHAT, "--max-context", "40"], stdin=subprocess.PIPE) as running:
        say(running, "fox " * 200)
        assert "error: the prompt has" in running.err
        assert say(running, TURNS[1])


def test_commands_and_what_is_said_with_a_space() -> None:
    with ranks.single(CHAT, stdin=subprocess.PIPE) as running:
        assert not say(running, "/help")
        assert running.err.count("/reset, r: start over") == 2 and ">>" not in running.err
        assert not say(running, "/hepl me")
        assert (
            "/hepl isn't a command (/help lists them); with a space before it, it is sent to the model" in running.err
        )
        assert not say(running, "/reset")
        assert say(running, " h")
        assert running.process.stdin is not None
        running.process.stdin.write(b"/bye\n")
        running.process.stdin.flush()
        assert running.wait() == 0


STARTED = {
    "alone": CHAT,
    "launch/run": [str(ranks.BIN / "python"), "-m", "hippo_mpi.run", "--command", "hippo_mpi.chat"],
}
LONG = ["--model", endless_model(), "--max-tokens", "1900"]


def await_answer(running: Terminal, since: int) -> None:
    while len(running.screen) < since + 30:
        assert running.poll() is None, running.screen
        time.sleep(0.02)


@pytest.mark.parametrize("started", ["alone", pytest.param("launch/run", marks=pytest.mark.slow)])
def test_ctrl_c_stops_an_answer_and_leaves_at_the_prompt(started: str) -> None:
    with terminal([*STARTED[started], *LONG]) as running:
        running.await_text(">> ")
        for question in ("hello\r", "again\r"):
            shown = len(running.screen)
            running.press(question)
            await_answer(running, shown)
            running.press(CTRL_C)
            running.await_text(">> ", shown)
        below = ranks.descendants(running.pid)
        running.press(CTRL_C)
        assert running.wait(15) == 130, running.screen
        assert running.is_as_it_was
        assert not ranks.await_end(below, 5)
        assert "Traceback" not in running.screen and "error" not in running.screen


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="finds rank 1 by /proc")
@pytest.mark.slow
def test_a_second_ctrl_c_leaves_whatever_the_ranks_do() -> None:
    """Without a terminal, too, and while rank 0 waits inside MLX for one that has stopped."""
    with ranks.single([*STARTED["launch/run"], *LONG], stdin=subprocess.PIPE) as running:
        assert running.process.stdin is not None
        running.process.stdin.write(b"hello\n")
        running.process.stdin.flush()
        running.await_output()
        below = ranks.descendants(running.process.pid)
        (second,) = [pid for pid in below if b"MLX_RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()]
        os.kill(second, signal.SIGSTOP)
        for _ in range(2):
            time.sleep(0.5)
            running.process.send_signal(signal.SIGINT)
        assert running.wait(25) == 130, running.err
        assert running.err.splitlines()[-1] == "error: interrupted by Ctrl-C"
        assert not ranks.await_end(below, 5)


@pytest.mark.slow
def test_statistics_follow_every_answer() -> None:
    with ranks.single(CHAT, stdin=subprocess.PIPE) as running:
        say(running, TURNS[1])
        assert re.search(r"prompt \d+ tokens, .* generation \d+ tokens", running.err)


@pytest.mark.parametrize("stdin", [subprocess.DEVNULL, subprocess.PIPE], ids=["nothing", "pipe"])
def test_nobody_is_asked_without_a_terminal(stdin: int) -> None:
    with ranks.single(CHAT, stdin=stdin) as running:
        if running.process.stdin:
            running.process.stdin.write(f"{TURNS[1]}\n".encode())
            running.process.stdin.close()
        assert running.wait() == 0, running.err
        lines = running.err.splitlines()
        assert len(lines) == (stdin == subprocess.PIPE) and all(line.startswith("prompt ") for line in lines), lines
