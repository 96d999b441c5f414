"""A first run over new hosts: a few tokens of the bundled model, which must be those of one machine."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from hippo_mpi.errors import LaunchError, RankError

TOKENS = 24
_ALONE_S = 120.0
_TOGETHER_S = 180.0
_GENERATE = ["--max-tokens", str(TOKENS), "--temp", "0"]


def start_alone() -> subprocess.Popen[bytes]:
    """Start to generate on this machine alone."""
    return subprocess.Popen(
        [sys.executable, "-m", "hippo_mpi.generate", *_GENERATE], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip


def compare(alone: subprocess.Popen[bytes] | None, hostfile: str) -> None:
    """Generate on all hosts of a hostfile, and compare with what comes of this machine alone.

    Raises:
        RankError: the run fails.
        LaunchError: it gives something else, or this machine alone gives nothing.
    """
    wanted = _output(alone or start_alone(), _ALONE_S, "a run on this machine alone")
    with tempfile.TemporaryDirectory(prefix="hippo-setup-") as folder:
        path = Path(folder) / "hosts.json"
        path.write_text(hostfile)
        words = [sys.executable, "-m", "hippo_mpi.run", "--hostfile", str(path), *_GENERATE]
        together = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        found = _output(together, _TOGETHER_S, "the first run over these hosts")
    if found != wanted:
        raise LaunchError(
            f"the first run over these hosts gave other tokens than this machine alone: {found[:60]!a}, not {wanted[:60]!a}"
        )


def _output(process: subprocess.Popen[bytes], timeout_s: float, what: str) -> str:
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.terminate()
        process.communicate()
        raise RankError(f"{what} didn't end within {timeout_s:.0f} s") from None
    finally:
        if process.poll() is None:
            process.kill()
    if process.returncode:
        said = [line for line in err.decode(errors="replace").splitlines() if line.startswith("error: ")]
        why = "; ".join(line.removeprefix("error: ") for line in said) or f"status {process.returncode}"
        raise RankError(f"{what} failed: {why}")
    return out.decode(errors="replace")
