"""Takes away what setup and tune have put on a host, by the record there: all is as it was before."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hippo_mpi.cluster.setting_up import agent
from hippo_mpi.cluster.setting_up.carrying_out import check_terminal, needs_password, run_by_sudo
from hippo_mpi.cluster.setting_up.made_hostfile import MadeHostfile
from hippo_mpi.cluster.setting_up.reaching import Say, sessions
from hippo_mpi.cluster.setting_up.session import MAX_COMMAND, Session
from hippo_mpi.errors import LaunchError
from hippo_mpi.transport.ports import THIS_MACHINE
from hippo_mpi.units import visible

_UNDO_S = 300.0


def take_away(path: Path, name: str, agrees: Callable[[str], bool], say: Say) -> bool:
    """Take all away from a host, and the host from the hostfile; return False if that isn't wanted.

    With the last host, also what was set on this machine.

    Raises:
        LaunchError: the name is none, or something can't be put back.
        RankError: the host can't be reached.
    """
    file = MadeHostfile(path)
    file.with_hosts([name])
    if name == THIS_MACHINE:
        raise LaunchError("name another machine: what setup changed here goes with the last of them")
    rest = file.without(name) if name in file.names else file.text
    among = [name] if rest else [name, THIS_MACHINE]
    with sessions(among, None, say) as reached:
        found = {one: entries_of(reached[one]) for one in among}
        lines = [(one, line) for one in among for line in lines_of(found[one])]
        if rest != file.text:
            lines.append((THIS_MACHINE, f"{'write' if rest else 'remove'} {path}"))
        for one, line in lines:
            print(f"  {'here' if one == THIS_MACHINE else one}: {visible(line, MAX_COMMAND)}")
        if lines and not agrees("do this? [y/N] "):
            return False
        for one in among:
            _undo(reached[one], found[one], ["setup", "tune"], say)
        if rest != file.text:
            file.write(rest)
    return True


def entries_of(session: Session) -> list[dict[str, Any]]:
    """Return the record of a host.

    Raises:
        LaunchError: it can't be read.
    """
    found = session.call(agent.changes)
    try:
        lines_of(found)
        if {one["of"] for one in found} <= {"setup", "tune"}:
            return list(found)
    except (KeyError, TypeError, AttributeError):
        pass
    raise LaunchError(f"{session.name}: ~/.hippo-mpi/changes.json there isn't what setup writes; move it away")


def lines_of(entries: Sequence[dict[str, Any]]) -> list[str]:
    """Return what undoing a record does, the last change first."""
    told = {
        "made": lambda entry: f"remove {entry['path']}",
        "folder": lambda entry: f"remove {entry['path']}, if nothing else is in it",
        "line": lambda entry: f"take this machine's key out of {entry['path']}",
        "command": lambda entry: f"{'sudo ' if entry['root'] else ''}{shlex.join(entry['undo'])}",
    }
    return [told[entry["kind"]](entry) for entry in reversed(entries)]


def undo(session: Session, of: Sequence[str], say: Say) -> None:
    """Put back what verbs have changed on a host.

    Raises:
        LaunchError: something can't be put back.
    """
    _undo(session, entries_of(session), of, say)


def _undo(session: Session, entries: Sequence[dict[str, Any]], of: Sequence[str], say: Say) -> None:
    as_root = [entry["undo"] for entry in reversed(entries) if entry.get("root") and entry["of"] in of]
    through_sudo = needs_password(session, bool(as_root))
    if through_sudo:
        check_terminal(session.name, [shlex.join(words) for words in as_root])
        run_by_sudo(session.name, [*as_root, ["true"]], needs_all=False)
    answer = session.call(agent.undo, _UNDO_S, of=list(of), is_root_done=through_sudo)
    if answer["failed"]:
        raise LaunchError(
            f"{session.name}: {visible('; '.join(answer['failed']))}; it stays in the record, for the next call"
        )
    if any(entry["of"] in of for entry in entries):
        left = (
            f"; left in ~/.hippo-mpi, since it isn't setup's: {visible(', '.join(answer['left']))}"
            if answer["left"]
            else ""
        )
        say(session.name, "put back", f"as it was before{left}")
    else:
        say(session.name, "put back", "there is nothing")
