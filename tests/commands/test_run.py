"""./launch/run: what it refuses, what it passes on, how it ends, and that nothing stays behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hippo_mpi import run
from tests import ranks
from tests.spmd.test_faults import endless_model
from tests.terminals import CTRL_C, terminal

RUN = [sys.executable, "-m", "hippo_mpi.run"]
LONG = ["--model", endless_model(), "--max-tokens", "1900"]
SECONDS = 25.0


def refused(*options: str, expected: str) -> None:
    """One line, status 2, and nothing else."""
    with ranks.single([*RUN, *options]) as running:
        assert running.wait(SECONDS) == 2
        assert running.err.startswith("error: ") and expected in running.err and running.err.count("\n") == 1
        assert not running.out


HOSTFILES = {
    "not JSON": ("[", "is not JSON"),
    "empty": ("[]", "lists no hosts"),
    "without ssh": ('[{"ips": ["127.0.0.1"]}]', 'rank 0 has no "ssh"'),
    "not an IP": ('[{"ssh": "127.0.0.1", "ips": ["mini1"]}]', "'mini1' of rank 0 is not an IP address"),
    "without addresses": (
        '[{"ssh": "127.0.0.1", "ips": ["127.0.0.1"]}, {"ssh": "127.0.0.1"}]',
        'rank 1 (127.0.0.1) has no "ips", which the ring listens on',
    ),
    "no such host": ('[{"ssh": "no-such-host.invalid", "ips": ["127.0.0.1"]}]', "no-such-host.invalid"),
}


@pytest.mark.parametrize("case", HOSTFILES)
def test_bad_hostfile(case: str, tmp_path: Path) -> None:
    text, expected = HOSTFILES[case]
    path = tmp_path / "hostfile"
    path.write_text(text)
    refused("--hostfile", str(path), expected=expected)


def test_a_host_that_does_not_answer_is_named(tmp_path: Path) -> None:
    """With what ssh says of it, before anything is launched."""
    path = tmp_path / "hostfile"
    path.write_text(
        '[{"ssh": "127.0.0.1", "ips": ["127.0.0.1"]}, {"ssh": "127.0.0.77", "ips": ["127.0.0.77"]},'
        ' {"ssh": "127.0.0.78", "ips": ["127.0.0.78"]}]'
    )
    with ranks.single([*RUN, "--hostfile", str(path)]) as running:
        assert running.wait(SECONDS) == 2
        assert re.fullmatch(
            r"error: hostfile \S+: `ssh NAME true` fails for 127\.0\.0\.77 \(rank 1\): .*refused.*;"
            r" 127\.0\.0\.78 \(rank 2\): .*refused.*\n",
            running.err,
        )


@pytest.mark.parametrize("name", ["ls", "hippo_mpi.bogus", "hippo_mpi.page"])
def test_only_commands_for_ranks_are_started(name: str) -> None:
    refused("--command", name, expected="(choose from 'hippo_mpi.generate', 'hippo_mpi.chat'")


@pytest.mark.parametrize(
    ("port", "expected"),
    [("70000", "70000 is not a port"), ("65535", "65535 is too high: the run needs 2 ports up to 65535")],
)
def test_ports_that_are_none(port: str, expected: str) -> None:
    refused("--starting-port", port, expected=expected)


def test_what_jaccl_lacks_is_one_line() -> None:
    refused("-n", "2", "--backend", "jaccl", expected='this machine: jaccl needs "rdma", a device')


def test_help_begins_with_its_own_options() -> None:
    with ranks.single([*RUN, "--help"]) as running:
        assert running.wait(SECONDS) == 0
        own, theirs = running.out.split("usage: hippo_mpi.generate")
        assert own.startswith("usage: ./launch/run")
        for action in run.make_parser()._actions:
            assert all(option in own for option in action.option_strings)
        assert "--prompt" in theirs


def test_version() -> None:
    with ranks.single([*RUN, "--command", "hippo_mpi.plan", "--version"]) as running:
        assert running.wait(SECONDS) == 0
        assert re.fullmatch(r"hippo_mpi\.plan: hippo-mpi \S+, mlx \S+, mlx-lm \S+, Python \S+\n", running.out)


BACKENDS = {"ring": [], "MPI": ["--backend", "mpi", "-n", "2"]}  # pytest-mpi skips what is called "mpi"


@pytest.mark.slow
@pytest.mark.parametrize("backend", [pytest.param("ring"), pytest.param("MPI", marks=pytest.mark.slow)])
def test_an_error_of_ours_is_all_that_is_said(backend: str) -> None:
    """On its exit status; no warning of mlx.launch, no page of mpirun's, and as root without asking."""
    unset = ["env", "-u", "OMPI_ALLOW_RUN_AS_ROOT", "-u", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"]
    with ranks.single([*unset, *RUN, *BACKENDS[backend], "--model", "/no/such/folder"]) as running:
        assert running.wait() == 2
        assert running.err == "error: no such model folder: /no/such/folder\n"
        assert not running.out


@pytest.mark.slow
@pytest.mark.skipif(
    (os.cpu_count() or 1) > 11, reason="the bundled model has 12 layers, and this machine as many cores"
)
def test_more_ranks_than_cores_start_under_mpi() -> None:
    """Which mpirun refuses by itself."""
    with ranks.single([*RUN, "--backend", "mpi", "-n", str((os.cpu_count() or 1) + 1), "--max-tokens", "3"]) as running:
        assert running.wait() == 0, running.err
        assert running.out.strip()


def test_a_rank_that_dies_before_it_can_speak_is_named(tmp_path: Path) -> None:
    path = tmp_path / "hostfile"
    path.write_text('[{"ssh": "127.0.0.1", "ips": ["127.0.0.1"]}]')
    env = {"PYTHONPATH": str(tmp_path)}
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\nif 'MLX_RANK' in os.environ: os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    with ranks.single([*RUN, "--hostfile", str(path)], env=env) as running:
        assert running.wait() == 3
        assert running.err == "error: rank 0 (127.0.0.1) was killed by signal 9\n"


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_rank_0_that_is_killed_gives_the_status_of_a_rank_that_died(backend: str) -> None:
    assert_rank_0_ends_all(backend, signal.SIGKILL)


@pytest.mark.slow
def test_a_rank_0_that_is_stopped_is_ended() -> None:
    """mlx.launch would wait for it for ever."""
    assert_rank_0_ends_all("ring", signal.SIGSTOP)


def assert_rank_0_ends_all(backend: str, number: signal.Signals) -> None:
    with ranks.single([*RUN, *BACKENDS[backend], *LONG, "--timeout", "4"]) as running:
        running.await_output()
        below = ranks.descendants(running.process.pid)
        lines = [(pid, Path(f"/proc/{pid}/environ").read_bytes()) for pid in below if Path(f"/proc/{pid}").exists()]
        for pid, environment in lines:
            if b"MLX_RANK=0\0" in environment or b"OMPI_COMM_WORLD_RANK=0\0" in environment:
                os.kill(pid, number)
        assert running.wait() == 3
        assert backend != "ring" or ("error: rank 0 (" in running.err and "[WARN]" not in running.err), running.err
        assert not ranks.await_end(below, 8)


@pytest.mark.slow
def test_no_color(tmp_path: Path) -> None:
    with terminal([*RUN, "-n", "1", "--max-tokens", "5"], {"NO_COLOR": "1"}) as running:
        assert running.wait() == 0, running.screen
        assert "loading" in running.screen
        assert not re.search(r"\x1b\[[0-9;]*m", running.screen)


@pytest.mark.parametrize(
    ("backend", "delay_s"),
    [
        pytest.param("ring", 0.2, id="importing"),
        pytest.param("ring", 1.0, id="starting"),
        pytest.param("ring", None, id="answering"),
        pytest.param("MPI", 1.0, id="starting under MPI", marks=pytest.mark.slow),
        pytest.param("MPI", None, id="answering under MPI", marks=pytest.mark.slow),
    ],
)
def test_ctrl_c_ends_all_with_130(backend: str, delay_s: float | None) -> None:
    with terminal([*RUN, *BACKENDS[backend], *LONG]) as running:
        if delay_s is None:
            running.await_text("\x1b[2K")  # the bar
            shown = len(running.screen)
            while len(running.screen) < shown + 200:
                assert running.poll() is None, running.screen
                time.sleep(0.02)
        else:
            time.sleep(delay_s)
        below = ranks.descendants(running.pid)
        running.press(CTRL_C)
        assert running.wait(15) == 130, running.screen
        assert not ranks.await_end(below, 5)
        assert "Traceback" not in running.screen and "error" not in running.screen


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
@pytest.mark.parametrize("backend", BACKENDS)
def test_ranks_end_with_it(backend: str, number: signal.Signals) -> None:
    with ranks.single([*RUN, *BACKENDS[backend], *LONG]) as running:
        running.await_output()
        below = ranks.descendants(running.process.pid)
        running.process.send_signal(number)
        assert running.process.wait(15) == (-9 if number == signal.SIGKILL else 128 + number)
        assert not ranks.await_end(below, 8)
        assert "Traceback" not in running.err


@pytest.mark.slow
def test_nohup_is_respected() -> None:
    with ranks.single(["nohup", *RUN, "-n", "1", *LONG]) as running:
        running.await_output()
        running.process.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            running.process.wait(1.0)
