"""What a check finds: its name, the host, what was seen, what to do, and how much it matters."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from hippo_mpi.cluster.asking.facts import Facts, Probed

ERROR, WARNING, INFO = "error", "warning", "info"
WEIGHTS = (ERROR, WARNING, INFO)


@dataclass(frozen=True)
class Finding:
    """Something that is wrong, or may be, or is as well to know.

    Args:
        check: its name.
        host: ssh's name of the host.
        found: what was seen, with numbers.
        fix: what to do.
        weight: an error keeps ranks from working; an info asks for nothing.
    """

    check: str
    host: str
    found: str
    fix: str
    weight: str = ERROR


Known = tuple[int, Probed, Facts]
"""A rank, its host, and what that said."""
Check = Callable[[Sequence[Probed]], Iterator[Finding]]


def known(hosts: Sequence[Probed]) -> list[Known]:
    """Return the hosts that answered."""
    return [(rank, host, host.facts) for rank, host in enumerate(hosts) if host.facts is not None]


def as_root(*words: str) -> str:
    """Return a command line for people to copy; its words may come from other hosts."""
    return f"sudo {shlex.join(words)}"
