"""What a launcher says of itself, and what its ranks say."""

from __future__ import annotations

import subprocess
import sys

import pytest

from hippo_mpi.cluster.starting.launcher_messages import LauncherMessages

RULE = "-" * 74
WARNING = "\x1b[33m[WARN] Node with rank {} exited with code 2 \x1b[0m\n"
SAID = {
    "warnings": ("one\n" + WARNING.format(0) + "two\n", "one\ntwo\n", "[WARN] Node with rank 0 exited with code 2\n"),
    "warnings within each other": (
        "one\n\x1b[33m[WARN]\x1b[33m[WARN] Node with rank 0 exited with code 2\x1b[0m\n"
        " Node with rank 1 exited with code 2 \x1b[0m\n",
        "one\n",
        "[WARN][WARN] Node with rank 0 exited with code 2\nNode with rank 1 exited with code 2\n",
    ),
    "a warning within a line": ("one" + WARNING.format(1) + "two\n", "onetwo\n", "[WARN] Node with rank 1 exited with code 2\n"),
    "what mpirun says": (f"one\n{RULE}\nprterun detected\n\nthat\n{RULE}\ntwo\n", "one\ntwo\n", f"{RULE}\nprterun detected\n\nthat\n{RULE}\n"),
    "a mistake": ("usage: mlx.launch [-h]\n   [--x]\nmlx.launch: error: no\n", "error: no\n", ""),
}  # fmt: skip


@pytest.mark.parametrize("case", SAID)
def test_what_is_passed_on_and_what_is_kept(case: str, capfd: pytest.CaptureFixture[str]) -> None:
    said, passed_on, kept = SAID[case]
    command = [sys.executable, "-c", "import sys; sys.stderr.write(sys.argv[1])", said]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as launcher:
        messages = LauncherMessages(launcher)
        messages.await_end()
    assert capfd.readouterr().err == passed_on
    messages.show()
    assert capfd.readouterr().err == kept
