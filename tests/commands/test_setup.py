"""launch/setup with a package of its own that needs nothing: steps, interruptions, two at once."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests import ranks
from tests.ranks import Rank

SETUP = Path(__file__).parents[2] / "launch" / "setup"
PROJECT = """
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"
[project]
name = "tiny"
version = "1"
[project.optional-dependencies]
mpi = []
serve = []
dev = []
[project.scripts]
"hippo_mpi.generate" = "tiny:main"
[tool.setuptools]
py-modules = ["tiny"]
"""
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "launch").mkdir()
    shutil.copy(SETUP, tmp_path / "launch")
    (tmp_path / "pyproject.toml").write_text(PROJECT)
    (tmp_path / "tiny.py").write_text("def main():\n    print('tiny')\n")
    return tmp_path


def set_up(folder: Path, extras: str = "") -> contextlib.AbstractContextManager[Rank]:
    before = f"extras={extras}; " if extras else ""
    return ranks.single(["bash", "-c", f"{before}source {folder}/launch/setup; echo ready"])


def is_first(running: Rank) -> bool:
    steps = [f"[{step}/3]" in running.err for step in (1, 2, 3)]
    assert steps in ([True] * 3, [False] * 3), running.err
    return steps[0]


def wait(running: Rank) -> None:
    assert running.wait(120) == 0, running.err
    assert running.out == "ready\n"


def test_once_for_people_and_once_more_for_tests(folder: Path) -> None:
    for extras, expected in (("", True), ("", False), ("dev", True), ("dev", False), ("", False)):
        with set_up(folder, extras) as running:
            wait(running)
            assert is_first(running) is expected


def test_two_at_once(folder: Path) -> None:
    with set_up(folder) as one, set_up(folder) as other:
        wait(one)
        wait(other)
        assert is_first(one) is not is_first(other)
        assert "another setup of this folder is running" in (other if is_first(one) else one).err


@pytest.mark.parametrize("step", ["[1/3]", "[2/3]"])
def test_one_that_was_interrupted_begins_anew(folder: Path, step: str) -> None:
    with set_up(folder) as running:
        running.await_output(step, "stderr")
        time.sleep(0.5)
        os.killpg(running.process.pid, signal.SIGKILL)
    with set_up(folder) as running:
        wait(running)
        assert is_first(running)
    assert subprocess.run([folder / ".venv" / "bin" / "hippo_mpi.generate"], capture_output=True).stdout == b"tiny\n"


def test_interrupted_extras_take_nothing_from_people(folder: Path) -> None:
    with set_up(folder) as running:
        wait(running)
    with set_up(folder, "dev") as running:
        running.await_output("[2/3]", "stderr")
        os.killpg(running.process.pid, signal.SIGKILL)
    with set_up(folder) as running:
        wait(running)
        assert not is_first(running)


def test_ctrl_c_ends_it_with_130(folder: Path) -> None:
    with set_up(folder) as running:
        running.await_output("[1/3]", "stderr")
        time.sleep(0.5)
        os.killpg(running.process.pid, signal.SIGINT)
        assert running.wait(30) == 130
        assert "Traceback" not in running.err


def test_what_pip_cannot_install_is_said(folder: Path) -> None:
    (folder / "pyproject.toml").write_text(PROJECT.replace("serve = []", 'serve = ["./nowhere @"]'))
    with set_up(folder) as running:
        assert running.wait(120) == 2
        assert running.err.splitlines()[-1].startswith("error: pip failed")
