"""The key of a run, a secret of its ranks.

It is made where the run is started. Ranks on that machine have it in their environment; to other machines it goes over
ssh's standard input into a file that only its owner can read. It must not be on a command line, where mlx.launch puts
the variables that it passes on, because all users of a machine can read those.
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
    """A new key, and the path of its file on other machines, relative to the home directory there."""

    key: str = field(default_factory=lambda: secrets.token_hex(32))
    file: str = field(default_factory=lambda: f"{_FOLDER}/run-{secrets.token_hex(8)}")

    @property
    def environment(self) -> dict[str, str]:
        """Environment of ranks on this machine."""
        return {RUN_KEY: self.key}

    @property
    def passed_on(self) -> dict[str, str]:
        """Environment of ranks on other machines; it is visible to every user there, so it has no secret."""
        return {RUN_KEY_FILE: self.file}

    def command(self, host: str, connect_s: int) -> list[str]:
        """Return the ssh command that reads the key from its standard input and stores it on a host.

        It also removes the key files of runs that began more than a day ago.

        Args:
            host: must let us in without a password.
            connect_s: seconds to wait for the connection.
        """
        folder, file = shlex.quote(_FOLDER), shlex.quote(self.file)
        script = f"umask 077; mkdir -p {folder}; find {folder} -name 'run-*' -mtime +0 -exec rm -f {{}} + ; cat >{file}"
        return [*SSH, "-o", f"ConnectTimeout={connect_s}", host, script]


def given_key() -> bytes:
    """Return the key that this rank was started with; empty if it has none.

    Raises:
        RankError: the key's file can't be read.
    """
    if key := os.environ.get(RUN_KEY):
        return key.encode()
    if not (name := os.environ.get(RUN_KEY_FILE)):
        return b""
    try:
        return (Path.home() / name).read_bytes()
    except OSError as error:
        raise RankError(f"can't read this run's key {Path.home() / name}: {error.strerror}") from None
