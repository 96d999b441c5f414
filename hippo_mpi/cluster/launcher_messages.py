"""What comes on a launcher's standard error: its ranks' lines, passed on, and its own, kept back."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading

from hippo_mpi.errors import print_error

_COLOR = re.compile(r"\x1b\[[0-9;]*m")
# mlx.launch's threads write the parts of these lines one by one, between each other's.
_WARNING = re.compile(r"(?:\x1b\[3\dm\[(?:WARN|INFO|ERROR)\]|\s*Node with rank \d+ |\s*\x1b\[0m\s*$).*")
_RULE = re.compile(r"-{20,}")  # above and below what mpirun has to say
_USAGE, _MISTAKE = "usage: mlx.launch", "mlx.launch: error: "
_JOIN_S = 2.0


class LauncherMessages:
    """Reads mlx.launch's standard error from now on.

    After an error of ours, that a rank "exited with code 2" is news to nobody; without one, it may be all there is.

    Args:
        launcher: started with a pipe for it.
    """

    def __init__(self, launcher: subprocess.Popen[bytes]) -> None:
        self._kept: list[str] = []
        self._is_ruled = False  # between two rules of mpirun's
        self._is_usage = False  # between a usage line of mlx.launch and its point
        self._has_error = False  # a rank has said what went wrong
        self.has_lost_a_rank = False  # the launcher tells that one has ended badly
        assert launcher.stderr is not None
        self._descriptor = launcher.stderr.fileno()
        self._thread = threading.Thread(target=self._read, name="hippo-messages", daemon=True)
        self._thread.start()

    def await_end(self) -> None:
        """Wait until all is read; but not for a rank that has outlived its launcher."""
        self._thread.join(_JOIN_S)

    def show(self) -> None:
        """Pass on what was kept back, unless a rank has said more."""
        if self._has_error:
            return
        sys.stderr.write("".join(f"{line}\n" for line in self._kept))

    def _read(self) -> None:
        with open(self._descriptor, errors="replace", newline="\n", closefd=False) as lines:
            for line in lines:
                self._take(line)

    def _take(self, line: str) -> None:
        text = _COLOR.sub("", line).rstrip()
        is_rule = bool(_RULE.fullmatch(text))
        if self._is_ruled or is_rule:
            self._is_ruled ^= is_rule
            self._kept.append(text)
        elif text.startswith(_MISTAKE):
            self._is_usage = False
            print_error(text.removeprefix(_MISTAKE))
        elif self._is_usage or text.startswith(_USAGE):
            self._is_usage = True
        elif warning := _WARNING.search(line):
            self.has_lost_a_rank |= "Node with rank" in text
            self._kept += list(filter(None, [_COLOR.sub("", warning[0]).strip()]))
            os.write(2, line[: warning.start()].encode())  # of a rank's line that it came into
        else:
            self._has_error |= text.startswith("error: ")
            os.write(2, line.encode())
