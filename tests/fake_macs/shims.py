"""The commands of fake Macs: small scripts that print what the model says, and change it.

All Macs share one model, in a folder, so that a command on one changes what the others print next.
"""

from __future__ import annotations

import contextlib
import fcntl
import pickle
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from hippo_mpi.cluster.asking import probe
from tests.fake_macs.model import FakeCluster

ROOT = Path(__file__).parents[2]
REAL = ("/bin/sh", "/bin/ps")
OTHERS = ("/sbin/route", "/usr/bin/nc", "/usr/bin/uname")


class SharedMacs:
    """A model in a folder, and what its commands print, as files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self) -> FakeCluster:
        found: FakeCluster = pickle.loads((self.folder / "cluster").read_bytes())
        return found

    def store(self, cluster: FakeCluster) -> None:
        (self.folder / "cluster").write_bytes(pickle.dumps(cluster))
        for number in range(len(cluster.macs)):
            answers = self.folder / str(number)
            shutil.rmtree(answers, ignore_errors=True)
            answers.mkdir()
            for words in questions(cluster, number):
                answer = cluster.answer(number, words)
                path = answers / " ".join([words[0].rpartition("/")[2], *words[1:]])
                path.parent.mkdir(exist_ok=True)
                path.write_text(f"{answer.status}\n{answer.out}")

    @contextlib.contextmanager
    def changed(self) -> Iterator[FakeCluster]:
        """The model, to be changed."""
        with (self.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            cluster = self.load()
            yield cluster
            self.store(cluster)

    def commands_of(self, number: int) -> Path:
        """A folder for an overlay over /usr, with the commands of one Mac."""
        folder = self.folder / f"usr{number}"
        paths = {words[0] for words in probe.COMMANDS["Darwin"].values()} - {*REAL} | {*OTHERS}
        for path in paths:
            shim = folder / path.removeprefix("/usr").lstrip("/")
            shim.parent.mkdir(parents=True, exist_ok=True)
            shim.write_text(
                f'#!/bin/sh\nanswer="{self.folder}/{number}/${{0##*/}} $*"\n'
                'if [ -f "$answer" ]; then { read -r status; cat; } < "$answer"; exit "$status"; fi\n'
                f'cd {shlex.quote(str(ROOT))} && exec {sys.executable} -m tests.fake_macs.shims {self.folder} {number} "$0" "$@"\n'
            )
            shim.chmod(0o755)
        return folder


def questions(cluster: FakeCluster, number: int) -> Iterator[list[str]]:
    """Commands that only ask."""
    yield from ([*words] for words in probe.COMMANDS["Darwin"].values() if words[0] not in REAL)
    yield ["networksetup", "-listallnetworkservices"]
    yield from (["networksetup", "-getinfo", one.name] for one in cluster.macs[number].services)
    for mac, own in enumerate(cluster.macs):
        addresses = [one for _, device in own.hardware_ports for one in cluster.addresses(mac, device)]
        yield from (["route", "-n", "get", str(one.ip)] for one in addresses)


if __name__ == "__main__":
    with SharedMacs(Path(sys.argv[1])).changed() as changing:
        result = changing.answer(int(sys.argv[2]), sys.argv[3:])
    sys.stdout.write(result.out)
    sys.stderr.write(result.err)
    sys.exit(result.status)
