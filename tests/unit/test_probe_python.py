"""Which Python of a host runs what is sent to it, found by real shells among what is in PATH."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hippo_mpi.cluster.programs.find_python import NO_PYTHON, script_of, through_ssh

SHELLS = ("sh", "bash", "dash", "zsh", "fish", "tcsh")
OURS = f"python3.{sys.version_info[1]}"


def put(folder: Path, name: str, minor: int) -> Path:
    """A Python that tells its own name, and takes itself for so old."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        '#!/bin/sh\ncase "$2" in\n'
        f'*"(3, 11)"*) test {minor} -ge 11;;\n*"(3, 8)"*) test {minor} -ge 8;;\n*) echo "$0 $2";;\nesac\n'
    )
    path.chmod(0o755)
    return path


def found_by(shell: str, folder: Path, first: str | None = None) -> str:
    (folder / "uname").symlink_to(shutil.which("uname") or "")
    (folder / "sh").symlink_to(shutil.which("sh") or "")
    command = through_ssh(script_of('exec "$python" -c "it runs"', first))
    ended = subprocess.run(
        [shutil.which(shell) or "", "-c", command], capture_output=True, text=True, timeout=30,
        env={"PATH": str(folder), "HOME": str(folder / "home")},
    )  # fmt: skip
    return ended.stdout.strip()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The whole of PATH; the places outside of it that are looked at have no Python of ours here."""
    for place in ("/opt/homebrew/bin", "/usr/local/bin"):
        if any(Path(place).glob("python3*")):
            pytest.skip(f"{place} has a Python")
    return tmp_path


@pytest.mark.parametrize("shell", SHELLS)
def test_the_first_one_is_taken_and_a_path_may_hold_anything(shell: str, folder: Path) -> None:
    if not shutil.which(shell):
        pytest.skip(f"{shell} isn't installed")
    put(folder, "python3", 12)
    wanted = put(folder, "home/Anna's $(touch made) `touch made`/python", 11)
    assert found_by(shell, folder, f"~/{wanted.relative_to(folder / 'home')}") == f"{wanted} it runs"
    assert not (Path.cwd() / "made").exists()


@pytest.mark.parametrize(
    ("there", "wanted"),
    [
        ({"python3": 9, "python3.13": 13}, "python3.13"),  # new enough for all, though further behind
        ({"python3": 9, OURS: 7}, "python3"),
        ({"python3": 11, OURS: 11}, OURS),
        ({"first": 6, "home/.local/bin/" + OURS: 11}, "home/.local/bin/" + OURS),
        ({"first": 9, "python3": 6}, "first"),
        ({"python3": 7}, ""),
        ({}, ""),
    ],
)  # fmt: skip
def test_the_best_one_is_taken(there: dict[str, int], wanted: str, folder: Path) -> None:
    for name, minor in there.items():
        put(folder, name, minor)
    assert found_by("sh", folder, str(folder / "first")) == (f"{folder / wanted} it runs" if wanted else NO_PYTHON)


def test_a_program_is_read_from_standard_input(folder: Path) -> None:
    """Looking for a Python eats none of it, though one that is none reads all that there is."""
    put(folder, "first", 6).write_text("#!/bin/sh\nwhile read -r line; do :; done; exit 1\n")
    script = f"PATH={Path(sys.executable).parent}:$PATH; " + script_of('exec "$python" -', str(folder / "first"))
    ended = subprocess.run(["sh", "-c", script], input="print('it runs')", capture_output=True, text=True, timeout=30)
    assert (ended.stdout, ended.stderr) == ("it runs\n", "")
