"""The hostfile that setup writes and remove shortens; what people add to it stays."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hippo_mpi.cluster.hostfile import Host, Hostfile, hostfile_of, read_hostfile
from hippo_mpi.durable_files import FileLock, replacing
from hippo_mpi.environment import CONTROL
from hippo_mpi.errors import LaunchError
from hippo_mpi.transport.ports import THIS_MACHINE

MADE_BY = "hippo_mpi.cluster setup"


class MadeHostfile:
    """A hostfile of ours, which need not be there yet.

    Args:
        path: of the file.

    Raises:
        LaunchError: it is there, and somebody else's, or can't be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.text = ""
        self._raw: dict[str, Any] = {}
        self._hosts: tuple[Host, ...] = ()
        if path.exists():
            self._hosts = read_hostfile(path).hosts
            self.text = path.read_text()
            raw = json.loads(self.text)
            if not isinstance(raw, dict) or raw.get("made_by") != MADE_BY:
                raise LaunchError(f"{path} wasn't written by setup, and stays as it is: give --hostfile another name")
            self._raw = raw

    @property
    def names(self) -> list[str]:
        """Return the hosts beside this machine."""
        return [host.ssh for host in self._hosts if host.ssh != THIS_MACHINE]

    def with_hosts(self, names: Sequence[str]) -> Hostfile:
        """Return this machine, the hosts of the file, and these.

        Raises:
            LaunchError: a name is none.
        """
        named = list(dict.fromkeys([THIS_MACHINE, *self.names, *names]))
        return hostfile_of([{"ssh": name} for name in named], "the command line")

    def wanted(self, hostfile: Hostfile, marks: Sequence[str], python: str) -> str:
        """Return what the file should say.

        Args:
            hostfile: hosts, addresses and backend.
            marks: what tells whether a first run has been made with these.
            python: path of the ranks' Python on other hosts.
        """
        before = {entry["ssh"]: entry for entry in self._raw.get("hosts", ())}
        entries = []
        for host in hostfile.hosts:
            entry = {**before.get(host.ssh, {}), "ssh": host.ssh, "ips": list(host.ips), "rdma": list(host.rdma)}
            entries.append(entry if host.ssh == THIS_MACHINE else {**entry, "python": python})
        kept = [one for one in self._raw.get("envs", ()) if not one.startswith(f"{CONTROL}=")]
        own = {"backend": hostfile.backend or "ring", "envs": [*hostfile.envs, *kept]}
        return _as_text({**self._raw, "made_by": MADE_BY, "first_run": list(marks), **own, "hosts": entries})

    def without(self, name: str) -> str:
        """Return what the file should say without a host; empty: no other host is left."""
        if set(self.names) <= {name}:
            return ""
        ranks = [rank for rank, host in enumerate(self._hosts) if host.ssh != name]
        entries = []
        for rank in ranks:
            entry = self._raw["hosts"][rank]
            rdma = entry.get("rdma") or []
            entries.append(
                {**entry, "rdma": [rdma[other] for other in ranks] if len(rdma) == len(self._hosts) else rdma}
            )
        return _as_text({**self._raw, "first_run": [], "hosts": entries})

    def write(self, text: str) -> None:
        """Replace the file; remove it if there is nothing to say.

        Raises:
            LaunchError: it can't be written.
        """
        try:
            lock = FileLock(self.path)
            try:
                if text:
                    with replacing(self.path) as file:
                        file.write(text.encode())
                else:
                    self.path.unlink(missing_ok=True)
            finally:
                lock.release()
        except OSError as error:
            raise LaunchError(f"{self.path} can't be written: {error.strerror}") from None
        self.text = text


def _as_text(raw: dict[str, Any]) -> str:
    entries = ",\n  ".join(json.dumps(entry) for entry in raw["hosts"])
    rest = ",\n ".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in raw.items() if key != "hosts")
    return f'{{{rest},\n "hosts": [\n  {entries}]}}\n'
