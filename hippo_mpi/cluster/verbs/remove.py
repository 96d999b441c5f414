"""hippo_mpi.cluster remove: take away all that setup and tune have put on a host."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hippo_mpi.cluster.setting_up.removing import take_away
from hippo_mpi.cluster.verbs.host_options import HOSTFILE, agreement_of, tell
from hippo_mpi.config.parser import option
from hippo_mpi.errors import RankError


@dataclass(frozen=True, kw_only=True)
class Options:
    """All options of the verb."""

    host: str = option("", "host, as ssh knows it", "host")
    hostfile: Path = option(HOSTFILE, "hostfile that setup wrote, which loses the host", check=Path, metavar="FILE")
    yes: bool = option(False, "change the host without asking")


def run(options: Options) -> int:
    """Take all away; return the exit status.

    Raises:
        LaunchError: something is in the way.
        RankError: the host can't be reached.
    """
    try:
        if not take_away(options.hostfile, options.host, agreement_of(options.yes), tell):
            print("nothing was changed")
    except RankError as error:
        if not options.hostfile.exists():
            raise
        raise RankError(f"{error}; if it is gone for good, take its entry out of {options.hostfile}") from None
    return 0
