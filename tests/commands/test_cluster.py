"""hippo_mpi.cluster on this machine: ranks that are ended by their ids, and what is typed wrong."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

CLUSTER = [sys.executable, "-m", "hippo_mpi.cluster"]


def cluster(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*CLUSTER, *words], capture_output=True, text=True, timeout=60)


# In a process namespace of its own, whose first process is the shell: other ranks of this machine are nobody's here.
ENDED = """
("$0" $FOLDER/hippo_mpi.generate &)
"$0" -c "import subprocess, sys; subprocess.run(sys.argv[1:])" "$0" $FOLDER/hippo_mpi.generate &
sleep 2
"$0" -m hippo_mpi.cluster stop </dev/null
ps -A -ww -o args= | grep -c "^$0 $FOLDER/hippo_mpi.generate"
"$0" -m hippo_mpi.cluster stop --yes
ps -A -ww -o args= | grep -c "^$0 $FOLDER/hippo_mpi.generate"
"""
STUCK = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(300)"


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="needs root and unshare (util-linux)")
def test_ranks_without_a_starter_are_ended_after_a_yes(tmp_path: Path) -> None:
    """Also one that ignores SIGTERM; one whose starter lives isn't touched."""
    (tmp_path / "hippo_mpi.generate").write_text(STUCK)
    (tmp_path / "init").symlink_to(shutil.which("sh") or "")
    first = [str(tmp_path / "init"), "-c", 'sh -c "$1" "$0" & wait $!', sys.executable, ENDED]
    command = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", *first]
    found = subprocess.run(
        command, capture_output=True, text=True, timeout=100, env={**os.environ, "FOLDER": str(tmp_path)}
    )
    assert re.fullmatch(
        r"127\.0\.0\.1: 1 rank whose starter is gone \(pid (\d+)\)\nend them\? \[y/N\] nothing was ended\n2\n"
        r"127\.0\.0\.1: 1 rank whose starter is gone \(pid \1\)\n127\.0\.0\.1: ended\n1\n",
        found.stdout,
    ), found


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["mend"], "invalid choice"),
        (["doctor", "-oProxyCommand=x"], "unrecognized arguments"),
        (["doctor", "--", "-oProxyCommand=x"], "is not the name of a host"),
        (["doctor", "a", "--hostfile", "/x"], "not both"),
        (["doctor", "--hostfile", "/no/such"], "can't be read: No such file"),
        (["doctor", "--from", "/no/such"], "--from /no/such: No such file"),
        (["convert"], "arguments are required: file"),
        (["convert", "/no/such"], "can't be read"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(words: list[str], told: str) -> None:
    found = cluster(*words)
    assert found.returncode == 2 and found.stderr.startswith("error: ") and told in found.stderr, found.stderr
    assert found.stderr.count("\n") == 1


def test_without_hosts_it_is_this_machine() -> None:
    began_s = time.monotonic()
    found = cluster("doctor")
    assert (found.returncode in (0, 2) and "127.0.0.1  Linux" in found.stdout) or sys.platform != "linux"
    assert time.monotonic() - began_s < 30
