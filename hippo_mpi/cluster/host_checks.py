"""Which hosts can take part in the next start: those that ssh lets us into, and that their neighbors in the ring reach.

Both are checked, since ssh may use another network than the ring: a host whose ring cable is pulled still lets us in.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import shlex
import subprocess
import sys
from collections.abc import Sequence

from hippo_mpi.cluster.hostfile import Host
from hippo_mpi.cluster.starting.start_plan import quoted
from hippo_mpi.transport.ports import FIRST, LAST, THIS_MACHINE
from hippo_mpi.transport.run_key import SSH, RunKey

_CONNECT_TIMEOUT_S = 5  # for a host to let us in, or to be reached
_END_TIMEOUT_S = 3.0  # for the command to end after that
# A refused connection also shows that the host is reached: nothing needs to listen on the port.
_CONNECT_SCRIPT = """
import socket, sys
try: socket.create_connection((sys.argv[1], int(sys.argv[2])), float(sys.argv[3]))
except ConnectionRefusedError: pass
"""


async def reachable(hosts: Sequence[Host], key: RunKey | None = None) -> list[int]:
    """Return the indices of the hosts that let us in, with the run key copied there if one is given."""
    are_in = await asyncio.gather(*(_lets_in(host, key) for host in hosts))
    return [index for index, is_in in enumerate(are_in) if is_in]


async def linked(hosts: Sequence[Host], living: Sequence[int]) -> list[int]:
    """Return those of the `living` indices that form a ring: each host reaches the next, and the last the first."""
    ring = list(living[:1])
    for index in living[1:]:
        if await _reaches(hosts[ring[-1]], hosts[index]):
            ring.append(index)
    while len(ring) > 1 and not await _reaches(hosts[ring[-1]], hosts[ring[0]]):
        ring.pop()
    return ring


async def _lets_in(host: Host, key: RunKey | None) -> bool:
    if host.ssh == THIS_MACHINE:
        return True
    if key:
        return await _succeeds(key.command(host.ssh, _CONNECT_TIMEOUT_S), key.key.encode())
    return await _succeeds([*SSH, "-o", f"ConnectTimeout={_CONNECT_TIMEOUT_S}", host.ssh, "true"])


async def _reaches(host: Host, other: Host) -> bool:
    """Return True if a host reaches the first address of another, at a port from the ring's range, or it has none."""
    if not other.ips:
        return True
    port = random.randrange(FIRST, LAST)
    words = ["-c", _CONNECT_SCRIPT, other.ips[0], str(port), str(_CONNECT_TIMEOUT_S)]
    if host.ssh == THIS_MACHINE:
        return await _succeeds([sys.executable, *words])
    there = f"{quoted(host.python or sys.executable)} {shlex.join(words)}"
    return await _succeeds([*SSH, "-o", f"ConnectTimeout={_CONNECT_TIMEOUT_S}", host.ssh, there])


async def _succeeds(command: Sequence[str], data: bytes = b"") -> bool:
    """Return True if a command, given this input, exits with status 0 in time; kill it otherwise."""
    process = await asyncio.create_subprocess_exec(
        *command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        async with asyncio.timeout(2 * _CONNECT_TIMEOUT_S + _END_TIMEOUT_S):
            await process.communicate(data)
        return process.returncode == 0
    except (TimeoutError, OSError):
        return False
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
