"""The end of standard input ends what reads it, however the ranks were started: Ctrl-D, a pipe, a file, /dev/null."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests import ranks
from tests.ranks import Rank
from tests.terminals import CTRL_D, UP, Terminal, terminal

ROOT = Path(__file__).parents[2]
CHAT = [str(ranks.BIN / "hippo_mpi.chat"), "--max-tokens", "20"]
READ = [str(ranks.BIN / "hippo_mpi.generate"), "--max-tokens", "20", "--prompt", "-"]
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
QUESTION, ANSWER = "What does a cow say?", "A cow says moo."
ON_SCREEN = "A.* cow.* says.* moo"
"""The answer where others may write in its midst: mlx.launch copies what ranks say on both streams piece by piece."""
LAUNCHERS = ("alone", "ring", "launch/run", "launch/run with MPI", "mlx.launch", "mpirun")


def command_line(launcher: str, command: list[str]) -> list[str]:
    run = [str(ranks.BIN / "python"), "-m", "hippo_mpi.run", "--command", Path(command[0]).name]
    launch = [str(ranks.BIN / "mlx.launch"), "--starting-port", str(ranks.consecutive_ports(2))]
    if launcher == "launch/run":
        return [*run, *command[1:]]
    if launcher == "launch/run with MPI":
        return [*run, "--backend", "mpi", "-n", "2", *command[1:]]
    if launcher == "mlx.launch":
        return [*launch, "--hostfile", str(ROOT / "hostfile"), "--", *command]
    return ranks.mpirun(2, command) if launcher == "mpirun" else command


@contextmanager
def started(launcher: str, command: list[str], stdin: int) -> Iterator[Rank]:
    """The process whose standard input is read, by rank 0 in the end."""
    if launcher == "ring":
        with ranks.ring([command] * 2, first_stdin=stdin) as running:
            yield running[0]
    else:
        with ranks.single(command_line(launcher, command), stdin, AS_ROOT) as one:
            yield one


def slow_but(*quick: str) -> pytest.MarkDecorator:
    names = [pytest.param(n, marks=() if n in quick else pytest.mark.slow, id=n) for n in LAUNCHERS]
    return pytest.mark.parametrize("launcher", names)


@slow_but("alone", "launch/run")
def test_a_pipe_that_ends_ends_a_chat(launcher: str) -> None:
    """After what was asked in it has been answered."""
    with started(launcher, CHAT, subprocess.PIPE) as running:
        assert running.process.stdin is not None
        running.process.stdin.write(f"{QUESTION}\n/reset\n{QUESTION}".encode())
        running.process.stdin.close()
        assert running.wait() == 0, running.err
        assert running.out == f"{ANSWER}\n" * 2


@slow_but("launch/run", "mpirun")
@pytest.mark.slow
def test_no_input_at_all_ends_a_chat(launcher: str) -> None:
    with started(launcher, CHAT, subprocess.DEVNULL) as running:
        assert running.wait() == 0, running.err
        assert not running.out


@slow_but("launch/run")
@pytest.mark.parametrize("kind", ["pipe", "file", "/dev/null"])
@pytest.mark.slow
def test_a_prompt_from_standard_input_ends_with_it(launcher: str, kind: str, tmp_path: Path) -> None:
    """And not with a pause in it."""
    (tmp_path / "prompt").write_text(QUESTION)
    with open(tmp_path / "prompt") as file:
        stdin = {"pipe": subprocess.PIPE, "file": file.fileno(), "/dev/null": subprocess.DEVNULL}[kind]
        with started(launcher, READ, stdin) as running:
            if running.process.stdin:
                first, second = QUESTION[:10], QUESTION[10:]
                running.process.stdin.write(first.encode())
                running.process.stdin.flush()
                time.sleep(8 if launcher in ("mlx.launch", "mpirun") else 3)  # so long that rank 0 reads already
                running.process.stdin.write(second.encode())
                running.process.stdin.close()
            code = running.wait()
            if kind == "/dev/null":
                assert "error: the prompt is empty" in running.err
                assert code == (0 if launcher.startswith("mlx.launch") else 2)
            else:
                assert code == 0, running.err
                assert running.out == f"{ANSWER}\n"


def await_question(running: Terminal, launcher: str) -> None:
    # mpirun holds back what isn't a line yet
    running.await_text(">> " if launcher != "mpirun" else "begins with a space.")


@pytest.mark.parametrize(
    "launcher", [pytest.param(n, marks=() if n == "launch/run" else pytest.mark.slow, id=n) for n in LAUNCHERS if n != "ring"]
)  # fmt: skip
def test_ctrl_d_ends_a_chat(launcher: str) -> None:
    """And leaves the terminal as it was."""
    with terminal(command_line(launcher, CHAT), AS_ROOT) as running:
        await_question(running, launcher)
        running.press(f"{QUESTION}\r")
        running.await_match(ON_SCREEN)
        running.await_text("tok/s")
        time.sleep(0.5)
        below = ranks.descendants(running.pid)
        running.press(CTRL_D)
        assert running.wait(20) == 0, running.screen
        assert running.is_as_it_was
        assert not ranks.await_end(below, 5)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["launch/run", "mlx.launch"])
def test_ctrl_d_ends_a_prompt(launcher: str) -> None:
    with terminal(command_line(launcher, READ), AS_ROOT) as running:
        running.press(f"{QUESTION}\r{CTRL_D}" if launcher == "launch/run" else f"{QUESTION}\r")
        if launcher != "launch/run":
            time.sleep(15)  # a Ctrl-D that comes before ranks can see it is lost with mlx.launch
            running.press(CTRL_D)
        assert running.wait() == 0, running.screen
        assert re.search(ON_SCREEN, running.screen, re.DOTALL), running.screen
        assert running.is_as_it_was


@pytest.mark.slow
def test_arrows_bring_back_what_was_said() -> None:
    with terminal(command_line("launch/run", CHAT)) as running:
        await_question(running, "launch/run")
        running.press(f"{QUESTION}\r")
        running.await_text("tok/s")
        shown = len(running.screen)
        running.await_text(">> ", shown - 5)
        running.press(f"{UP}\r")
        running.await_text(f"{QUESTION}\n", shown)
        running.await_text("tok/s", shown)


@pytest.mark.parametrize("launcher", ["alone", "launch/run"])
@pytest.mark.slow
def test_a_closed_input_is_none(launcher: str) -> None:
    command = ["sh", "-c", 'exec "$@" <&-', "sh", *command_line(launcher, CHAT)]
    with ranks.single(command) as running:
        assert running.wait() == 0, running.err


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="finds rank 0 by /proc")
@pytest.mark.slow
def test_a_rank_that_dies_at_the_prompt_leaves_the_terminal_as_it_was() -> None:
    with terminal(command_line("launch/run", CHAT)) as running:
        await_question(running, "launch/run")
        for pid in ranks.descendants(running.pid):
            if b"MLX_RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes():
                os.kill(pid, 9)
        assert running.wait(20) == 3
        assert "error: rank 1 (" in running.screen
        assert running.is_as_it_was
