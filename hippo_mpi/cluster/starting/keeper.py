"""Runs one rank on its host, and ends it with whoever started it: python -m hippo_mpi.cluster.starting.keeper, for the starter.

Standard input is the lifeline. Its first line is an `Errand`; after that the starter says something twice a second. If
it ends, or falls silent since the starter's machine is gone, the rank is ended, also a stopped one. The exit status is
the rank's.

The standard library only, so that a keeper is there at once and takes little memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

SILENCE_S = 2.5
"""Without a word from the starter, after which its machine counts as gone."""
_ERRAND_S = 30.0  # for the starter to say what is to be run
_TERM_S = 1.0  # from SIGTERM to SIGKILL
_MAX_WORDS = 1 << 16


@dataclass(frozen=True)
class Errand:
    """What a keeper is to run.

    Args:
        words: what this Python runs: the words behind its name.
        environment: variables, beside those that the keeper has.
        files: what is to be in files, by the variables that are to have their paths.
        folder: where the rank is to work, if there is such a folder.
        beats: whether the starter says something twice a second.
    """

    words: Sequence[str]
    environment: Mapping[str, str]
    files: Mapping[str, str]
    folder: str
    beats: bool

    def encode(self) -> bytes:
        """Return it as a line of JSON."""
        return json.dumps(asdict(self)).encode() + b"\n"


class Keeper:
    """A rank's process, in a group of its own.

    Args:
        errand: what to run.
        folder: an empty folder for the rank's files.
    """

    def __init__(self, errand: Errand, folder: Path) -> None:
        environment = {**os.environ, **errand.environment}
        for name, content in errand.files.items():
            path = folder / name.lower()
            path.write_text(content)
            environment[name] = str(path)
        with contextlib.suppress(OSError):
            os.chdir(errand.folder)
        self._silence_s = SILENCE_S if errand.beats else None
        self._process = subprocess.Popen(
            [sys.executable, *errand.words], env=environment, stdin=subprocess.DEVNULL, process_group=0
        )
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda *_: self._terminate())
        threading.Thread(target=self._hold_lifeline, daemon=True).start()

    def wait(self) -> int:
        """Wait for the rank's end; return its exit status, or 128 + the number of the signal that ended it."""
        code = self._process.wait()
        self._signal(signal.SIGKILL)  # what it has started
        return code if code >= 0 else 128 - code

    def _hold_lifeline(self) -> None:
        while True:
            if not select.select([0], [], [], self._silence_s)[0]:
                self._signal(signal.SIGKILL)
                return
            if not os.read(0, _MAX_WORDS):
                self._terminate()
                return

    def _terminate(self) -> None:
        self._signal(signal.SIGTERM)
        last = threading.Timer(_TERM_S, self._signal, [signal.SIGKILL])
        last.daemon = True
        last.start()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)


def _read_errand() -> Errand | None:
    """Return what the first line says; None if the starter, or its machine, is gone before. No byte beyond it is read."""
    line = bytearray()
    while not line.endswith(b"\n"):
        if not select.select([0], [], [], _ERRAND_S)[0] or not (byte := os.read(0, 1)):
            return None
        line += byte
    return Errand(**json.loads(line))


def main() -> None:
    """Keep one rank; ends the process."""
    errand = _read_errand()
    if errand is None:
        sys.exit(1)
    with tempfile.TemporaryDirectory(prefix="hippo-rank-") as folder:
        code = Keeper(errand, Path(folder)).wait()
    sys.exit(code)


if __name__ == "__main__":
    main()
