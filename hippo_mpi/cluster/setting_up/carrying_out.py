"""Runs commands that change a host's settings: written down before, as root where they need it, put back on request."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Sequence

from hippo_mpi.cluster.cabling.address_plan import Command
from hippo_mpi.cluster.setting_up import agent
from hippo_mpi.cluster.setting_up.session import Session
from hippo_mpi.errors import LaunchError
from hippo_mpi.transport.ports import THIS_MACHINE
from hippo_mpi.units import visible

_COMMANDS_S = 120.0


def lines_of(commands: Sequence[Command]) -> list[str]:
    """Return commands as one would type them."""
    return [f"{'sudo ' if command.needs_root else ''}{shlex.join(command.do)}" for command in commands]


def carry_out(session: Session, commands: Sequence[Command], of: str) -> None:
    """Run commands on a host.

    Args:
        session: with the host.
        commands: in their order.
        of: the verb whose changes they are.

    Raises:
        LaunchError: one fails, or needs root and nobody can be asked; those before it stay, and are written down.
    """
    sent = [{"do": list(one.do), "undo": list(one.undo), "root": one.needs_root} for one in commands]
    through_sudo = needs_password(session, any(one.needs_root for one in commands))
    told = [shlex.join(one.do) for one in commands]
    if through_sudo:
        check_terminal(session.name, told)
    failed = session.call(agent.apply, commands=sent, of=of, runs=not through_sudo, timeout_s=_COMMANDS_S)
    if failed:
        raise LaunchError(f"{session.name}: {visible(failed)}; what was done before it can be undone")
    if through_sudo:
        run_by_sudo(session.name, [one.do for one in commands])
        session.call(agent.confirm, commands=sent)


def needs_password(session: Session, needs_root: bool) -> bool:
    """Return True if a command of a host needs root, and sudo there asks for a password."""
    if not needs_root or session.call(agent.hello)["is_root"]:
        return False
    return session.call(agent.outputs, commands={"sudo": ["sudo", "-n", "true"]})["sudo"] is None


def check_terminal(name: str, told: Sequence[str]) -> None:
    """Check that sudo can ask somebody for a password.

    Raises:
        LaunchError: there is no terminal; it says what commands one would type on the host.
    """
    if not sys.stdin.isatty():
        raise LaunchError(
            f"{name} wants a password for sudo: run this in a terminal, or there: sudo {'; sudo '.join(told)}"
        )


def run_by_sudo(name: str, commands: Sequence[Sequence[str]], needs_all: bool = True) -> None:
    """Run commands by sudo, which asks the person at this terminal for a password, once.

    Raises:
        LaunchError: sudo or a command fails; without `needs_all`, sudo or the last one.
    """
    script = (" && " if needs_all else " ; ").join(shlex.join(words) for words in commands)
    words = ["sudo", "sh", "-c", script]
    command = words if name == THIS_MACHINE else ["ssh", "-t", name, f"exec {shlex.join(words)}"]
    if subprocess.run(command).returncode:
        raise LaunchError(f"{name}: sudo, or one of its commands, failed; what was done before it can be undone")
