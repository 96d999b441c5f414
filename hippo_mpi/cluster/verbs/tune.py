"""hippo_mpi.cluster tune: settings of hosts that matter to ranks; changed after a yes, and put back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hippo_mpi.cluster.cabling.address_plan import Command
from hippo_mpi.cluster.setting_up import agent
from hippo_mpi.cluster.setting_up.carrying_out import carry_out, lines_of
from hippo_mpi.cluster.setting_up.fitting import There
from hippo_mpi.cluster.setting_up.reaching import at_all, one_after_the_other, sessions
from hippo_mpi.cluster.setting_up.removing import entries_of, undo
from hippo_mpi.cluster.setting_up.removing import lines_of as undoing
from hippo_mpi.cluster.setting_up.session import MAX_COMMAND, Session
from hippo_mpi.cluster.setting_up.tuning import READ, Setting, settings_of
from hippo_mpi.cluster.verbs.host_options import HostOptions, agreement_of, hosts_meant, tell
from hippo_mpi.config import checks
from hippo_mpi.config.parser import option
from hippo_mpi.errors import UserError
from hippo_mpi.transport.ports import THIS_MACHINE
from hippo_mpi.units import count_of, visible

TUNE = "tune"


@dataclass(frozen=True, kw_only=True)
class Options(HostOptions):
    """All options of the verb."""

    apply: bool = option(False, "change what should be changed, after a yes")
    undo: bool = option(False, "put back what --apply has changed, after a yes")
    yes: bool = option(False, "change hosts without asking")
    wired_limit: int | None = option(
        None, "MB that a Mac's GPU may hold, instead of as many as are safe", check=checks.positive, metavar="MB"
    )


def run(options: Options) -> int:
    """Show settings, and change them if asked to; return the exit status.

    Raises:
        UserError: both are asked for, or a host isn't named in a way that can be read.
        LaunchError: a setting can't be changed.
        RankError: a host can't be reached.
    """
    if options.apply and options.undo:
        raise UserError("give --apply, or --undo, not both")
    names = list(dict.fromkeys(host.ssh for host in hosts_meant(options).hosts))
    with sessions(names, None, tell) as reached:
        if options.undo:
            return _undo(reached, options.yes)
        found = at_all(names, lambda name: _settings(reached[name], options.wired_limit, options.timeout))
        print("\n".join(table(found)))
        commands = {name: [one.command for one in found[name] if one.command] for name in names}
        if options.apply and any(commands.values()):
            _apply(reached, {name: some for name, some in commands.items() if some}, options.yes)
    return 0


def _settings(session: Session, wired_mb: int | None, timeout_s: float) -> list[Setting]:
    system = There.read(session.call(agent.hello)).system
    said = session.call(agent.outputs, timeout_s, commands=READ.get(system, {}))
    return settings_of(system, said, wired_mb)


def table(found: Mapping[str, Sequence[Setting]]) -> list[str]:
    """Return a line per setting of each host."""
    rows = [("host", "setting", "now", "wanted", "lasts", "root", "why")]
    for name, settings in found.items():
        for one in settings:
            needs = "sudo" if one.command and one.command.needs_root else ""
            lasts = one.lasts if one.wanted else ""
            rows.append((name, one.name, visible(one.now), one.wanted or "as it is", lasts, needs, one.why))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _apply(reached: Mapping[str, Session], commands: Mapping[str, Sequence[Command]], is_yes: bool) -> None:
    for name, some in commands.items():
        for line in lines_of(some):
            print(f"  {_who(name)}: {visible(line, MAX_COMMAND)}")
    if not agreement_of(is_yes)("do this? [y/N] "):
        print("nothing was changed")
        return
    one_after_the_other(list(commands), lambda name: _change(reached[name], commands[name]))


def _change(session: Session, commands: Sequence[Command]) -> None:
    carry_out(session, commands, TUNE)
    tell(session.name, TUNE, f"{count_of(len(commands), 'setting')} changed")


def _undo(reached: Mapping[str, Session], is_yes: bool) -> int:
    entries = at_all(list(reached), lambda name: entries_of(reached[name]))
    lines = [(name, line) for name in reached for line in undoing([one for one in entries[name] if one["of"] == TUNE])]
    for name, line in lines:
        print(f"  {_who(name)}: {visible(line, MAX_COMMAND)}")
    if lines and not agreement_of(is_yes)("do this? [y/N] "):
        print("nothing was changed")
        return 0
    one_after_the_other(list(reached), lambda name: undo(reached[name], [TUNE], tell))
    return 0


def _who(name: str) -> str:
    return "here" if name == THIS_MACHINE else name
