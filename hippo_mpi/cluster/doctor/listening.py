"""Calls hosts whose firewall is on, where a program of ours listens for a moment.

The doctor's first call goes to a port where nobody listens: refused, it shows that the host is there, and a firewall may
have been what refused it. So this asks once more, of these hosts alone. The programs leave no file; who calls and who
listens prove to each other that they are ours.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Sequence
from dataclasses import replace

from hippo_mpi.cluster.asking.facts import Probed
from hippo_mpi.cluster.doctor.findings import known
from hippo_mpi.cluster.programs.host_program import HostLost, HostProgram

_PROGRAM = "link.link_end"
_CONNECT_S = 2.0
_ANSWER_S = 20.0  # of a program that may be on a busy machine; all calls have a deadline beside that
_Call = tuple[int, int, str]
"""Who calls, who listens, and at which address: ranks."""


def with_calls(hosts: Sequence[Probed], timeout_s: float) -> list[Probed]:
    """Return hosts with what came of calling the next one, where its firewall may be what answered.

    Args:
        hosts: by rank, as asked.
        timeout_s: for all of it; what isn't known by then stays unknown.
    """
    calls = _in_doubt(hosts)
    said = asyncio.run(_make(calls, hosts, timeout_s)) if calls else {}
    found = list(hosts)
    for (rank, _, address), why in said.items():
        one = found[rank]
        assert one.facts is not None
        called = {**one.facts.called, address: why}
        found[rank] = replace(one, facts=replace(one.facts, called=called), raw={**one.raw, "called": called})
    return found


def _in_doubt(hosts: Sequence[Probed]) -> list[_Call]:
    found = []
    for rank, _, facts in known(hosts):
        following = (rank + 1) % len(hosts)
        there = hosts[following].facts
        for address, reach in facts.reached.items():
            is_elsewhere = not reach.why and facts.interface_of(address) is None
            if there and there.has_firewall and is_elsewhere and there.own.get(address) == "":
                found.append((rank, following, address))
    return found


async def _make(calls: Sequence[_Call], hosts: Sequence[Probed], timeout_s: float) -> dict[_Call, str]:
    """Return why each call didn't come through, or "" if it did; nothing of those that couldn't be made."""
    programs = {rank: HostProgram(hosts[rank].host) for call in calls for rank in call[:2]}
    said: dict[_Call, str] = {}
    try:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                started = await asyncio.gather(*(_start(one, timeout_s) for one in programs.values()))
                running = {rank: one for (rank, one), is_on in zip(programs.items(), started, strict=True) if is_on}
                possible = [call for call in calls if {*call[:2]} <= running.keys()]
                await asyncio.gather(*(_call(running[call[0]], running[call[1]], call, said) for call in possible))
    finally:
        await asyncio.gather(*(one.close() for one in programs.values()))
    return said


async def _start(program: HostProgram, timeout_s: float) -> bool:
    try:
        await program.start(_PROGRAM, timeout_s)
    except HostLost:
        return False
    return True


async def _call(one: HostProgram, other: HostProgram, call: _Call, said: dict[_Call, str]) -> None:
    """Let one host call a port on which the other listens, and note what came of it."""
    try:
        port = (await other.ask(_ANSWER_S, do="listen", address=call[2])).get("port")
    except (HostLost, OSError):
        return
    told = {"port": port, "token": secrets.token_hex(32), "streams": 1, "seconds": _CONNECT_S, "size": 1, "count": 1}
    accepting = asyncio.create_task(other.ask(_ANSWER_S, do="accept", role="echo", **told))
    try:
        await one.ask(_ANSWER_S, do="call", role="ping", address=call[2], connect_s=_CONNECT_S, **told)
        said[call] = ""
    except HostLost:
        pass
    except OSError as error:
        said[call] = str(error)
    finally:
        accepting.cancel()
        await asyncio.gather(accepting, return_exceptions=True)
