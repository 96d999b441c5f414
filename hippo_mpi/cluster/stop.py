"""Ends ranks whose starter is gone, on any host, by their ids."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Sequence

from hippo_mpi.cluster.asking.facts import Probed
from hippo_mpi.cluster.doctor.checks import stale_ranks
from hippo_mpi.transport.ports import THIS_MACHINE
from hippo_mpi.transport.run_key import SSH

_TIMEOUT_S = 15.0
# Looks once more whose id it is: it may have ended meanwhile, and the id be another's.
_SCRIPT = """
ours() { case "$(ps -ww -o args= -p "$1")" in *hippo_mpi.*) return 0;; esac; return 1; }
for signal in TERM KILL; do
  for pid in $PIDS; do ours $pid && kill -$signal $pid 2>/dev/null; done
  for wait in 1 2 3 4 5 6 7 8 9 10; do
    left=; for pid in $PIDS; do ours $pid && left="$left $pid"; done
    [ -z "$left" ] && exit 0
    sleep 0.2
  done
done
exit 1
"""


def commands_of(hosts: Sequence[Probed]) -> dict[str, list[str]]:
    """Return the command for each host that has such ranks, by its name."""
    found = {}
    for host in hosts:
        pids = " ".join(str(one.pid) for one in stale_ranks(host.facts)) if host.facts else ""
        if pids:
            script = f"PIDS={shlex.quote(pids)}{_SCRIPT}"
            is_here = host.host.ssh == THIS_MACHINE
            found[host.host.ssh] = (
                ["sh", "-c", script] if is_here else [*SSH, host.host.ssh, f"exec sh -c {shlex.quote(script)}"]
            )
    return found


def end(command: Sequence[str]) -> str:
    """Run a host's command; return "" if none of its ranks is left, else why not."""
    try:
        ended = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return f"no answer within {_TIMEOUT_S:.0f} s"
    if ended.returncode == 0:
        return ""
    lines = [line for line in ended.stderr.splitlines() if line.strip()]
    return lines[-1] if lines else "some don't end, even killed"
