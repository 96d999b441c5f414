"""hippo_mpi.cluster find: machines that announce their ssh server, and the link to each."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from hippo_mpi.cluster.asking.facts import Facts
from hippo_mpi.cluster.asking.remote import ask
from hippo_mpi.cluster.hostfile import hostfile_of
from hippo_mpi.cluster.setting_up.discovery import Announced, browse
from hippo_mpi.config import checks
from hippo_mpi.config.parser import option
from hippo_mpi.transport.ports import THIS_MACHINE
from hippo_mpi.units import visible

_WIDTH = 64  # of what is shown of a name


@dataclass(frozen=True, kw_only=True)
class Options:
    """All options of the verb."""

    json: bool = option(False, "print a JSON array")
    timeout: float = option(4.0, "seconds to look", check=checks.seconds)


def run(options: Options) -> int:
    """Print what is found; return the exit status.

    Raises:
        LaunchError: nothing here can look.
    """
    found = browse(options.timeout)
    (here,) = ask(hostfile_of([{"ssh": THIS_MACHINE}], "this machine"), (), options.timeout + 5)
    others = [one for one in found if not _is_own(one, here.facts)]
    if options.json:
        print(
            json.dumps([{**asdict(one), "link": link_of(one, here.facts), "usable": one.is_usable} for one in others])
        )
    else:
        print("\n".join(lines_of(others, here.facts)))
    return 0


def _is_own(one: Announced, here: Facts | None) -> bool:
    return bool(here and one.address and here.interface_of(one.address))


def link_of(one: Announced, here: Facts | None) -> str:
    """Return the interface of this machine that leads to another, and on a Mac its port."""
    interface = one.interface
    if not interface and here and one.address and (towards := here.interface_towards(one.address)):
        interface = towards.name
    ports = here.mac.hardware_ports if here and here.mac else None
    port = next((port for port, name in (ports or {}).items() if name == interface), "")
    return f"{interface} ({port})" if port else interface


def lines_of(found: Sequence[Announced], here: Facts | None) -> Iterator[str]:
    """Return a line for each machine; names as they can be printed, and cut."""
    if not found:
        yield "no other machine announces an ssh server here; name it: ./launch/cluster setup mini2.local"
        return
    rows = [("host", "address", "link", "called")]
    rows += [
        (visible(one.host)[:_WIDTH], one.address, visible(link_of(one, here))[:_WIDTH], visible(one.service)[:_WIDTH])
        for one in found
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    notes = ["", *("" if one.is_usable else "not a name for ssh: leave it" for one in found)]
    for row, note in zip(rows, notes, strict=True):
        yield "  ".join([*(word.ljust(width) for word, width in zip(row, widths, strict=True)), note]).rstrip()
    if names := [one.host for one in found if one.is_usable]:
        yield f"to set one up: ./launch/cluster setup {names[0]}"
