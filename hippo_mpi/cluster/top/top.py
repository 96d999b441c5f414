"""Watches hosts: a program on each through one ssh, started again when it is lost, and a server's own account."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import AsyncIterator

from hippo_mpi.cluster.asking.facts import Probed
from hippo_mpi.cluster.asking.remote import ask
from hippo_mpi.cluster.hostfile import Hostfile
from hippo_mpi.cluster.programs.host_program import HostLost, HostProgram
from hippo_mpi.cluster.top.server_answers import fetch_status, fetch_tokens
from hippo_mpi.cluster.top.top_state import HostState, ServerState
from hippo_mpi.transport.ports import THIS_MACHINE

_GIVE_UP_S = 10.0  # a host that was silent for so long is asked anew
_RETRY_S = 3.0
_SERVER_S = 1.0  # between two questions; rank 0 reports every second
_END_S = 0.3  # for a program to end, before it is told so in a harder way


class Watch:
    """The states of hosts and of a server, as they are now.

    Args:
        hostfile: whose hosts.
        server: URL of a server; None: none is asked.
        timeout_s: for a host to let us in.
    """

    def __init__(self, hostfile: Hostfile, server: str | None, timeout_s: float) -> None:
        self._hostfile, self._timeout_s = hostfile, timeout_s
        names = [socket.gethostname() if host.ssh == THIS_MACHINE else host.ssh for host in hostfile.hosts]
        self.hosts = [HostState(name, heard_s=time.monotonic()) for name in names]
        self.server = ServerState() if server else None
        self._has_interfaces = False
        self._url = (server or "").rstrip("/")

    @property
    def is_told(self) -> bool:
        """Whether everybody has answered, or is known not to."""
        hosts = all(host.sample or host.why_lost for host in self.hosts)
        return hosts and self._has_interfaces and (self.server is None or self.server.line != ServerState.line)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Watch during the block."""
        # These may wait for longer than anybody wants to who leaves.
        threading.Thread(target=self._find_data_interfaces, daemon=True).start()
        if self.server:
            threading.Thread(target=self._watch_server, args=(self.server,), daemon=True).start()
        tasks = [asyncio.create_task(self._keep(rank)) for rank in range(len(self.hosts))]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _keep(self, rank: int) -> None:
        """Keep a program on a host."""
        state = self.hosts[rank]
        while True:
            program = HostProgram(self._hostfile.hosts[rank], lambda said: state.hear(said, time.monotonic()))
            try:
                await program.start("top.top_end", self._timeout_s)
                started_s = time.monotonic()
                while not await program.await_loss(_SERVER_S):
                    if time.monotonic() - max(started_s, state.heard_s) > _GIVE_UP_S:
                        break
                state.why_lost = program.why_lost or f"{state.name} has said nothing for {_GIVE_UP_S:.0f} s"
            except HostLost as lost:
                state.why_lost = str(lost)
            finally:
                await program.close(_END_S)
            await asyncio.sleep(_RETRY_S)

    def _find_data_interfaces(self) -> None:
        hosts = ask(self._hostfile, (), self._timeout_s)
        for rank, state in enumerate(self.hosts):
            state.data = data_interfaces(hosts, rank)
        self._has_interfaces = True

    def _watch_server(self, server: ServerState) -> None:
        while True:
            try:
                server.hear(fetch_status(self._url))
                server.hear_tokens(fetch_tokens(self._url), time.monotonic())
            except OSError as error:
                server.fail(f"{self._url} doesn't answer: {getattr(error, 'reason', None) or error}")
            except (ValueError, RecursionError):
                pass  # a proxy's own page, or metrics that aren't public
            time.sleep(_SERVER_S)


def data_interfaces(hosts: list[Probed], rank: int) -> tuple[str, ...]:
    """Return the interfaces of a host that have its addresses of the hostfile, or are towards the next rank's."""
    facts, following = hosts[rank].facts, hosts[(rank + 1) % len(hosts)].host
    if facts is None:
        return ()
    own = [facts.interface_of(address) for address in hosts[rank].host.ips]
    towards = [facts.interface_towards(address) for address in following.ips if len(hosts) > 1]
    return tuple(dict.fromkeys(one.name for one in (*own, *towards) if one))
