"""Finds a Python on a host: a script for any sh, which runs what follows with the best one that is there."""

from __future__ import annotations

import shlex
import sys

from hippo_mpi.cluster.starting.start_plan import quoted

NO_PYTHON = "hippo-no-python"
"""The line that a script prints where there is none of 3.8 or later."""
_OURS = f"python3.{sys.version_info[1]}"
_FOLDERS = (  # that ssh's PATH hasn't
    "/opt/homebrew/bin", "/usr/local/bin", f"/Library/Frameworks/Python.framework/Versions/{_OURS[6:]}/bin", "~/.local/bin",
)  # fmt: skip
_PYTHONS = (
    _OURS, *(f"{folder}/{_OURS}" for folder in _FOLDERS), "python3", *(f"{folder}/python3" for folder in _FOLDERS[:2]),
    *(f"python3.{minor}" for minor in (14, 13, 12, 11)),
)  # fmt: skip
# Without Apple's command line tools macOS's own python3 only opens a window that asks for them.
_PASS_STUB = (
    '[ "$system" = Darwin ] && [ "$(command -v "$python")" = /usr/bin/python3 ]'
    " && { /usr/bin/xcode-select -p >/dev/null 2>&1 || continue; }"
)
_IS_NEW_ENOUGH = '"$python" -c "import sys; sys.exit(sys.version_info < (3, $minor))" </dev/null >/dev/null 2>&1'


def script_of(run: str, first: str | None = None) -> str:
    """Return a script that finds a Python of 3.11 or later, else of 3.8, and runs a command with it.

    It is one line. Without `first` there is nothing in it that a login shell would change between single quotes.

    Args:
        run: a command of sh that doesn't come back, such as `exec "$python" -`.
        first: path of the Python that is looked at first; `~/` is the home folder there.
    """
    pythons = " ".join([*([quoted(first)] if first else ()), *_PYTHONS])
    return (
        f"system=$(uname); for minor in 11 8; do for python in {pythons}; do {_PASS_STUB}; "
        f"if {_IS_NEW_ENOUGH}; then {run}; fi; done; done; echo {NO_PYTHON}"
    )


def through_ssh(script: str) -> str:
    """Return the command by which a host's login shell, whichever it is, has sh run a script."""
    return f"exec sh -c {shlex.quote(script)}"
