"""Scripts on real ranks that loop over an LLM's answers and leave such a loop, or end, in every way."""

from __future__ import annotations

import re
import signal
import sys

import pytest

from tests import ranks

LOOP = """
import os, signal, sys, threading, time
import hippo_mpi, mlx.core as mx
from hippo_mpi import LLM, SamplingParams
rank = int(os.environ.get("MLX_RANK", 0))
BEFORE
with LLM("story-3m", timeout=10) as llm:
    print("begun", flush=True)
    for number, output in enumerate(llm.generate("The fox", SamplingParams(max_tokens=400, ignore_eos=True))):
        if number > 5:
            time.sleep(0.3)  # who is followed to the last token is waited for too long
        if number == 5:
            WHAT
    print("left", flush=True)
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    print([(output.request_id, output.finish_reason) for output in llm.generate("The bear", params)], flush=True)
print("went on", flush=True)
"""
WENT_ON = f"begun\nleft\n{[(0, None)] * 3 + [(0, 'length')]}\nwent on\n"
LIMIT_S = 40.0


def looping(what: str, before: str = "") -> list[str]:
    """Return a script that does `what` at the sixth output of a loop."""
    return [sys.executable, "-c", LOOP.replace("WHAT", what).replace("BEFORE", before)]


def run(command: list[str], num_ranks: int) -> list[ranks.Rank]:
    """Run a script on all ranks; each must end within seconds."""
    with ranks.ring([command] * num_ranks) as running:
        for rank in running:
            rank.wait(LIMIT_S)
        return running


def check_end(ended: list[ranks.Rank], code: int, line: str) -> None:
    """Check that all ranks have ended with this status and one line, and none went on."""
    said = "".join(rank.err for rank in ended)
    assert [rank.process.returncode for rank in ended] == [code] * len(ended), said
    (found,) = re.findall("^error: (.*)", said, re.MULTILINE)
    assert re.match(line, found)
    assert not any("went on" in rank.out for rank in ended)


LEFT_ALONE = "this rank left a loop over answers that rank 0 continues"
LEAVES = [
    ("if rank == 1: raise ValueError('mine')", 2, 1, r"rank 1 \(.*\): the script raised ValueError: mine"),
    ("if rank == 0: raise ValueError('mine')", 2, 1, "the script raised ValueError: mine"),
    ("if rank == 2: sys.exit(0)", 3, 3, rf"rank 2 \(.*\): {LEFT_ALONE}"),
    ("if rank == 1: break", 2, 3, rf"rank 1 \(.*\): {LEFT_ALONE}"),
    ("if rank == 0: break", 2, 3, r"rank 1 \(.*\): rank 0 left a loop over answers that this rank continues"),
    ("if rank == 1: os.kill(os.getpid(), signal.SIGINT)", 2, 130, r"rank 1 \(.*\): interrupted by Ctrl-C"),
    ("hippo_mpi.load('story-draft')", 2, 1, ".*the script raised UserError: another LLM is in use"),
]


@pytest.mark.parametrize(("what", "num_ranks", "code", "line"), LEAVES)
def test_a_rank_that_leaves_the_loop_ends_all_with_a_line(what: str, num_ranks: int, code: int, line: str) -> None:
    ended = run(looping(what), num_ranks)
    check_end(ended, code, line)
    assert "break" in what or not any("left" in rank.out for rank in ended)


def test_rank_0_that_ends_in_the_loop_is_named_by_another() -> None:
    ended = run(looping("if rank == 0: sys.exit(0)"), 2)
    assert ended[1].process.returncode == 3
    assert "rank 0 left a loop" in ended[0].err + ended[1].err
    assert not any("went on" in rank.out for rank in ended)


def test_all_may_leave_a_loop_and_begin_another() -> None:
    for num_ranks in (1, 2):
        assert [rank.out for rank in run(looping("break"), num_ranks)] == [WENT_ON] * num_ranks


@pytest.mark.parametrize("before", ["pass", "outputs = llm.generate('The owl'); next(outputs)"])
def test_the_status_of_a_script_that_ends_in_a_loop_is_kept(before: str) -> None:
    ended = run(looping(f"{before}\n            sys.exit(5)"), 2)
    assert [rank.process.returncode for rank in ended] == [5, 5]


INTERRUPTED = """
from hippo_mpi.parallel import worker
def interrupt(kind, name):
    def interrupted(*arguments):
        function(*arguments)
        if asked:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    function, asked = getattr(kind, name), []
    setattr(kind, name, interrupted)
    return asked
asked = interrupt(worker.Leader, "_submit") if rank == 0 else interrupt(worker.Follower, "_compute")
"""


@pytest.mark.parametrize(("num_ranks", "who"), [(1, 0), (2, 0), (2, 1)])
def test_ctrl_c_in_the_middle_of_a_step_ends_all(num_ranks: int, who: int) -> None:
    ended = run(looping(f"if rank == {who}: asked.append(True)", INTERRUPTED), num_ranks)
    assert {rank.process.returncode for rank in ended} <= {130, -signal.SIGINT}
    assert "KeyboardInterrupt" in ended[who].err
    assert not any("left" in rank.out for rank in ended)


def test_ctrl_c_of_a_terminal_reaches_all_ranks_at_once() -> None:
    with ranks.ring([looping("pass")] * 2) as running:
        for rank in running:
            rank.await_output("begun")
        for rank in running:
            rank.process.send_signal(signal.SIGINT)
        assert [rank.wait(LIMIT_S) for rank in running] == [130, 130]


MODEL_IN_LOOP = "model(mx.array([[1]]))"
THREADED = "t = threading.Thread(target=model, args=(mx.array([[1]]),), name='mine'); t.start(); t.join()"


def test_a_model_inside_a_loop_is_refused() -> None:
    ended = run(looping(MODEL_IN_LOOP, "model, _ = hippo_mpi.load('story-draft')"), 2)
    check_end(ended, 1, ".*the script raised UserError: another LLM is in use")


def test_a_model_in_another_thread_is_refused() -> None:
    ended = run(looping(THREADED, "model, _ = hippo_mpi.load('story-draft')"), 2)
    check_end(ended, 2, ".*a model was called in thread mine: call it from the thread that loaded it, MainThread")


def test_a_model_may_be_called_after_a_loop_was_left() -> None:
    what = "break\n    print(model(mx.array([[1]])).shape[:2])"
    for rank in run(looping(what, "model, _ = hippo_mpi.load('story-draft')"), 2):
        assert "(1, 1)\n" in rank.out and "went on" in rank.out, rank.err


def test_ranks_that_make_different_calls_end_with_a_line() -> None:
    before = "other = LLM('story-draft', timeout=10).__enter__()"
    ended = run(looping("break\n    list((llm if rank == 0 else other).generate('The owl'))", before), 2)
    check_end(
        ended,
        3,
        r"rank 1 .*: this rank is at generate.. call 1 on model 1 .*, but rank 0 at generate.. call 2 on model 2",
    )
    model = "model, _ = hippo_mpi.load('story-draft')"
    ended = run(looping("break\n    model(mx.array([[1]])) if rank else list(llm.generate('The owl'))", model), 2)
    check_end(ended, 3, "rank 1 .*: this rank is at call 0 of model .*, but the previous rank at a step of an LLM")


def test_a_forked_child_is_no_rank() -> None:
    what = "child = os.fork()\n            sys.exit(0) if child == 0 else os.waitpid(child, 0)\n            break"
    for rank in run(looping(what), 2):
        assert rank.process.returncode == 0, rank.err
        assert rank.out.endswith("went on\n")
