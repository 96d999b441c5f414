"""hippo_mpi.cluster setup: from bare machines to a first token, and a hostfile; safe to repeat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hippo_mpi.cluster.setting_up.setup import set_up
from hippo_mpi.cluster.verbs.host_options import HOSTFILE, agreement_of, tell
from hippo_mpi.config import checks
from hippo_mpi.config.parser import option


@dataclass(frozen=True, kw_only=True)
class Options:
    """All options of the verb."""

    hosts: Sequence[str] = option(
        (),
        "hosts beside this machine, as ssh knows them; those of the hostfile, if it is there, too",
        "hosts",
        nargs="*",
    )
    hostfile: Path = option(HOSTFILE, "hostfile to write", check=Path, metavar="FILE")
    yes: bool = option(False, "change hosts without asking; ssh still asks about fingerprints and passwords")
    timeout: float = option(20.0, "seconds for a host to say what it is", check=checks.above_0)


def run(options: Options) -> int:
    """Set hosts up; return the exit status.

    Raises:
        LaunchError: something is in the way.
        RankError: a host can't be reached.
    """
    if set_up(options.hostfile, options.hosts, agreement_of(options.yes), tell, options.timeout):
        print(f"now: ./launch/run --hostfile {options.hostfile} --model MODEL")
    return 0
