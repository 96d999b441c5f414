"""Gets into hosts: by a key if they take one, else by what ssh asks the person at this terminal, who may then give them one."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

from hippo_mpi.cluster.setting_up import agent
from hippo_mpi.cluster.setting_up.session import Session
from hippo_mpi.errors import HippoError, LaunchError, RankError
from hippo_mpi.units import visible

_T = TypeVar("_T")
_SSH_S = 10.0
_ASKABLE = ("Permission denied", "Host key verification failed")
Say = Callable[[str, str, str], None]
"""Tells of a host, a step, and what came of it."""


def at_all(names: Sequence[str], function: Callable[[str], _T]) -> dict[str, _T]:
    """Return what a function gives for each host, all at once.

    Raises:
        HippoError: it failed for some; the message names all of them.
    """
    found: dict[str, _T] = {}
    errors: list[HippoError] = []

    def one(name: str) -> None:
        try:
            found[name] = function(name)
        except HippoError as error:
            errors.append(error)

    with ThreadPoolExecutor(max(1, len(names))) as pool:
        list(pool.map(one, names))
    _raise(errors)
    return {name: found[name] for name in names}


def one_after_the_other(names: Sequence[str], function: Callable[[str], None]) -> None:
    """Do something on each host, also if it fails on one: a person may be asked.

    Raises:
        HippoError: it failed for some; the message names all of them.
    """
    errors: list[HippoError] = []
    for name in names:
        try:
            function(name)
        except HippoError as error:
            errors.append(error)
    _raise(errors)


def _raise(errors: Sequence[HippoError]) -> None:
    if errors:
        kind = RankError if any(isinstance(error, RankError) for error in errors) else LaunchError
        raise errors[0] if len(errors) == 1 else kind("; ".join(map(str, errors)))


@contextmanager
def sessions(names: Sequence[str], agrees: Callable[[str], bool] | None, say: Say) -> Iterator[Mapping[str, Session]]:
    """Open a session on each host.

    Args:
        names: of hosts, by ssh.
        agrees: asks a person; None: hosts that take no key are an error.
        say: tells what was done.

    Raises:
        RankError: a host can't be reached.
        LaunchError: it has no Python, or isn't to be given a key.
    """
    found = {name: Session(name) for name in names}
    with ExitStack() as stack:
        for session in found.values():
            stack.callback(session.close)
        asking = [
            name for name, is_open in at_all(names, lambda name: _open(found[name], agrees)).items() if not is_open
        ]
        for name in asking:
            found[name].open(asks=True)
            assert agrees
            _give_key(found[name], agrees, say)
        yield found


def _open(session: Session, agrees: Callable[[str], bool] | None) -> bool:
    """Return False if a person has to be asked."""
    try:
        session.open()
        return True
    except RankError as error:
        if agrees is None or not any(said in str(error) for said in _ASKABLE) or not sys.stdin.isatty():
            raise
        return False


def _give_key(session: Session, agrees: Callable[[str], bool], say: Say) -> None:
    """Let this machine in without a password from now on.

    Raises:
        LaunchError: that isn't wanted, or there is no key.
    """
    if _lets_in(session.name):  # only its fingerprint was new
        return
    line = _public_key(session.name, agrees)
    print(f"{session.name}: adds to ~/.ssh/authorized_keys: {visible(line)}")
    if not agrees("let this machine in by that key? [y/N] "):
        raise LaunchError(
            f"ranks are started by ssh without a password; give {session.name} a key: ssh-copy-id {session.name}"
        )
    session.call(agent.add_key, line=line)
    if not _lets_in(session.name):
        raise RankError(
            f"{session.name} has the key, but still asks for a password: does its sshd allow PubkeyAuthentication?"
        )
    session.has_new_key = True
    say(session.name, "key", "installed")


def _lets_in(name: str) -> bool:
    session = Session(name)
    try:
        session.open()
        return True
    except HippoError:
        return False
    finally:
        session.close()


def _public_key(name: str, agrees: Callable[[str], bool]) -> str:
    """Return the public key that ssh offers a host; make one if there is none, after a yes.

    Raises:
        LaunchError: there is none.
    """
    settings = _output(["ssh", "-G", name])
    private = [
        Path(line.split(None, 1)[1]).expanduser() for line in settings.splitlines() if line.startswith("identityfile ")
    ]
    for path in private:
        public = path.with_name(f"{path.name}.pub")
        if path.is_file() and public.is_file():
            return public.read_text().strip().splitlines()[0]
    if lines := _output(["ssh-add", "-L"]).splitlines():
        return lines[0].strip()
    path = next((path for path in private if "ed25519" in path.name), Path("~/.ssh/id_ed25519").expanduser())
    words = ["ssh-keygen", "-t", "ed25519", "-f", str(path)]
    print(f"there is no ssh key here; this makes one: {shlex.join(words)}")
    if not agrees("make it? [y/N] ") or subprocess.run(words).returncode:
        raise LaunchError(f"ranks are started by ssh without a password, and there is no key: {shlex.join(words)}")
    return path.with_name(f"{path.name}.pub").read_text().strip()


def _output(words: Sequence[str]) -> str:
    try:
        ended = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_SSH_S)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return ended.stdout if ended.returncode == 0 else ""
