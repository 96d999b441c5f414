"""The standard error of a launcher: its ranks' lines are passed on at once; those of mlx.launch itself are held back."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading

from hippo_mpi.errors import print_error

_COLOR = re.compile(r"\x1b\[[0-9;]*m")
# mlx.launch's threads write these lines in pieces, which may end up inside each other's lines.
_WARNING = re.compile(r"(?:\x1b\[3\dm\[(?:WARN|INFO|ERROR)\]|\s*Node with rank \d+ |\s*\x1b\[0m\s*$).*")
_RULE = re.compile(r"-{20,}")  # the lines of dashes above and below a message of mpirun
_USAGE, _MISTAKE = "usage: mlx.launch", "mlx.launch: error: "
_JOIN_TIMEOUT_S = 2.0


class LauncherMessages:
    """A reader of a launcher's standard error, in a thread of its own.

    The own messages of mlx.launch, such as that a rank "exited with code 2", say nothing new after a rank's error line;
    without one they may be all that explains a failure. So they are held back until `show`.

    Args:
        launcher: a process whose standard error is a pipe.
    """

    def __init__(self, launcher: subprocess.Popen[bytes]) -> None:
        self._kept: list[str] = []
        self._is_ruled = False  # inside a message of mpirun, between its two lines of dashes
        self._is_usage = False  # inside a usage text of mlx.launch, before its error line
        self._errors: set[str] = set()  # error lines that ranks have printed
        self.has_lost_a_rank = False  # the launcher has reported a failed rank
        assert launcher.stderr is not None
        self._descriptor = launcher.stderr.fileno()
        self._thread = threading.Thread(target=self._read, name="hippo-messages", daemon=True)
        self._thread.start()

    def await_end(self) -> None:
        """Wait until all is read, at most _JOIN_TIMEOUT_S: a rank that outlives its launcher keeps the pipe open."""
        self._thread.join(_JOIN_TIMEOUT_S)

    def show(self) -> bool:
        """Print the held messages, unless a rank has printed an error; return whether either has said something."""
        if not self._errors:
            sys.stderr.write("".join(f"{line}\n" for line in self._kept))
        return bool(self._errors or self._kept)

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
            os.write(2, line[: warning.start()].encode())  # the piece of a rank's line before it
        elif text not in self._errors:  # which several ranks find, before they know of each other
            if text.startswith("error: "):
                self._errors.add(text)
            os.write(2, line.encode())
