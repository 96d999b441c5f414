"""Which hosts can take part in the next start: those that let us in, and that the rank before reaches.

ssh may go another way than the ring: a host whose cable is pulled still lets us in.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import shlex
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from hippo_mpi.transport.ports import FIRST, LAST, THIS_MACHINE
from hippo_mpi.transport.run_key import SSH, RunKey

Host = dict[str, Any]
"""An entry of a hostfile: {"ssh": name, "ips": [address]}."""
_ANSWER_S = 5  # for a host to let us in, or to be reached
_END_S = 3.0
# A port with nobody behind it refuses us: that is an answer, too.
_REACH = """
import socket, sys
try: socket.create_connection((sys.argv[1], int(sys.argv[2])), float(sys.argv[3]))
except ConnectionRefusedError: pass
"""


async def hand_over(key: RunKey, hosts: Sequence[Host]) -> list[int]:
    """Give the key of the ranks to come to all hosts; return the places of those that let us in."""
    are_in = await asyncio.gather(*(_hand_over(key, host) for host in hosts))
    return [index for index, is_in in enumerate(are_in) if is_in]


async def linked(hosts: Sequence[Host], living: Sequence[int]) -> list[int]:
    """Return those of the `living` that make a ring: each is reached by the one before, and the first by the last."""
    found = list(living[:1])
    for index in living[1:]:
        if await _reaches(hosts[found[-1]], hosts[index]):
            found.append(index)
    while len(found) > 1 and not await _reaches(hosts[found[-1]], hosts[found[0]]):
        found.pop()
    return found


async def _hand_over(key: RunKey, host: Host) -> bool:
    if host["ssh"] == THIS_MACHINE:
        return True
    return await _succeeds(key.command(host["ssh"], _ANSWER_S), key.key.encode())


async def _reaches(host: Host, other: Host) -> bool:
    """Return True if a host reaches the first address of another, at a port such as rings have; or if there is none."""
    if not other.get("ips"):
        return True
    port = random.randrange(FIRST, LAST)
    command = [sys.executable, "-c", _REACH, str(other["ips"][0]), str(port), str(_ANSWER_S)]
    if host["ssh"] != THIS_MACHINE:
        command = [*SSH, "-o", f"ConnectTimeout={_ANSWER_S}", host["ssh"], shlex.join(command)]
    return await _succeeds(command)


async def _succeeds(command: Sequence[str], data: bytes = b"") -> bool:
    """Return True if a command with this input ends well, in time."""
    process = await asyncio.create_subprocess_exec(
        *command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        async with asyncio.timeout(2 * _ANSWER_S + _END_S):
            await process.communicate(data)
        return process.returncode == 0
    except (TimeoutError, OSError):
        return False
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
