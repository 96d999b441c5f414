"""The key of a run, which all of its ranks know and nobody else.

It is made where the run is started. Ranks of that machine have it in their environment; to other machines it goes over
ssh's standard input into a file that only its owner can read. A command line, where mlx.launch puts what it passes on,
can be read by all users of a machine.
"""

from __future__ import annotations

import os
import secrets
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from hippo_mpi.environment import RUN_KEY, RUN_KEY_FILE
from hippo_mpi.errors import RankError

_FOLDER = ".cache/hippo-mpi"  # below the home directory
SSH = ("ssh", "-o", "BatchMode=yes")


@dataclass(frozen=True)
class RunKey:
    """A new key, and the name of its file on other machines, below the home directory there."""

    key: str = field(default_factory=lambda: secrets.token_hex(32))
    file: str = field(default_factory=lambda: f"{_FOLDER}/run-{secrets.token_hex(8)}")

    @property
    def environment(self) -> dict[str, str]:
        """What ranks of this machine are started with."""
        return {RUN_KEY: self.key}

    @property
    def passed_on(self) -> dict[str, str]:
        """What ranks of other machines are started with, for everybody to see."""
        return {RUN_KEY_FILE: self.file}

    def command(self, host: str, connect_s: int) -> list[str]:
        """Return the command that takes the key on its standard input and leaves it on a host, for those who are let in
        without a password. Files of runs that began more than a day ago are removed."""
        folder, file = shlex.quote(_FOLDER), shlex.quote(self.file)
        script = f"umask 077; mkdir -p {folder}; find {folder} -name 'run-*' -mtime +0 -exec rm -f {{}} + ; cat >{file}"
        return [*SSH, "-o", f"ConnectTimeout={connect_s}", host, script]


def given_key() -> bytes:
    """Return the key that this rank was started with; empty if it has none.

    Raises:
        RankError: its file isn't there.
    """
    if key := os.environ.get(RUN_KEY):
        return key.encode()
    if not (name := os.environ.get(RUN_KEY_FILE)):
        return b""
    try:
        return (Path.home() / name).read_bytes()
    except OSError as error:
        raise RankError(f"this run's key isn't in {Path.home() / name}: {error.strerror}") from None
