"""Hosts for tests that have nothing of this project: their own file system, accounts, name and processes, by namespaces.

Each has a network namespace of `cabled_hosts`, and in it an overlay over this machine's root on a tmpfs, in which /work,
/root and /tmp are empty, an account `anna` with a home of her own, and an sshd. Host 0 is this machine, in its namespace.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests import ranks
from tests.cabled_hosts import CAN_MAKE, SSHD, Host, cabled_hosts

CAN_MAKE = CAN_MAKE and bool(SSHD) and bool(shutil.which("unshare"))
WHY_NOT = "needs root, ip (iproute2), unshare (util-linux) and sshd, to make hosts of namespaces"
ACCOUNT = "anna"
HOME = "/srv/people/anna"
PASSWORD = "swordfish"
_HIDDEN = ("work", "root", "tmp", "var/tmp", "home", "srv", *(f"{Path(sys.prefix).parts[1]}",))
# Runs as the first process of the host's namespaces; its arguments are a folder, a name, a size, an address and a shell.
_INIT = """
set -e
mount --make-rprivate /
mount -t tmpfs -o size="$3",mode=755 bare "$1"
mkdir "$1/upper" "$1/work" "$1/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$1/upper,workdir=$1/work" "$1/root"
cd "$1/root"
for folder in $HIDDEN; do [ ! -d "$folder" ] || mount -t tmpfs -o size="$3",mode=755 hidden "$folder"; done
chmod 1777 tmp var/tmp
mount -t proc proc proc
mount --rbind /dev dev
mount --rbind /sys sys
hostname "$2"
mkdir -p run/sshd "srv/people"
chroot . useradd --create-home --home-dir "$HOME_THERE" --shell "$5" "$ACCOUNT"
echo "$ACCOUNT:$PASSWORD" | chroot . chpasswd
mkdir -m 700 ".$HOME_THERE/.ssh" tmp/sshd
cp "$KEYS/host" tmp/sshd/host; chmod 600 tmp/sshd/host
if [ -n "$AUTHORIZED" ]; then cp "$KEYS/user.pub" ".$HOME_THERE/.ssh/authorized_keys"; else rmdir ".$HOME_THERE/.ssh"; fi
printf '%s' "$PROFILE" >".$HOME_THERE/.profile"; cp ".$HOME_THERE/.profile" ".$HOME_THERE/.bashrc"
mkdir -p ".$HOME_THERE/.config/fish"; printf '%s' "$PROFILE" >".$HOME_THERE/.config/fish/config.fish"
chroot . chown -R "$ACCOUNT:" "$HOME_THERE"
exec chroot . "$SSHD" -D -e -f /dev/null -h /tmp/sshd/host -o ListenAddress="$4" -o StrictModes=no
"""


@dataclass
class BareHost:
    """A host, and the process that holds its namespaces."""

    host: Host
    pid: int

    @property
    def name(self) -> str:
        return self.host.name

    @property
    def home(self) -> Path:
        """anna's home, as seen from here."""
        return Path(f"/proc/{self.pid}/root{HOME}")

    def run(self, *words: str, account: str = ACCOUNT) -> subprocess.CompletedProcess[str]:
        """Run a command there."""
        inside = [
            "nsenter",
            "--target",
            str(self.pid),
            "--all",
            "--root",
            "--wd",
            "su",
            account,
            "-s",
            "/bin/sh",
            "-c",
            shlex.join(words),
        ]
        return subprocess.run(inside, capture_output=True, text=True, timeout=60)

    def state(self) -> dict[str, str]:
        """What is in anna's home: kind, mode, and content or target of everything, by path."""
        return {str(path.relative_to(self.home)): _state(path) for path in sorted(self.home.rglob("*"))}


def _state(path: Path) -> str:
    found = path.lstat()
    kind = stat.filemode(found.st_mode)
    if stat.S_ISLNK(found.st_mode):
        return f"{kind} {os.readlink(path)}"
    return f"{kind} {hashlib.sha256(path.read_bytes()).hexdigest()}" if stat.S_ISREG(found.st_mode) else kind


@dataclass
class Bare:
    """This machine as host 0, and the bare hosts."""

    here: Host
    hosts: list[BareHost]
    folder: Path
    env: dict[str, str]

    def command(self, *words: str) -> list[str]:
        """The command line of hippo_mpi.cluster on host 0."""
        return self.here.command([sys.executable, "-m", "hippo_mpi.cluster", *words])

    def ssh(self, host: BareHost, command: str) -> subprocess.CompletedProcess[str]:
        """Log in from host 0."""
        words = self.here.command(["ssh", host.name, command])
        return subprocess.run(words, env={**os.environ, **self.env}, capture_output=True, text=True, timeout=60)

    def cluster(self, *words: str, timeout_s: float = 200.0) -> subprocess.CompletedProcess[str]:
        """Run hippo_mpi.cluster on host 0, in a folder of its own."""
        return subprocess.run(
            self.command(*words), cwd=self.folder, env={**os.environ, **self.env}, capture_output=True, text=True,
            stdin=subprocess.DEVNULL, timeout=timeout_s,
        )  # fmt: skip


@contextlib.contextmanager
def bare_hosts(
    count: int, folder: Path, shell: str = "/bin/bash", profile: str = "", size: str = "4g", has_key: bool = True
) -> Iterator[Bare]:
    """So many bare hosts, in a LAN with this machine.

    Args:
        count: of hosts.
        folder: for keys, settings, and the commands of host 0.
        shell: that anna logs in to.
        profile: what is in her shell's start files.
        size: of each host's disk.
        has_key: whether she lets our key in.
    """
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    with cabled_hosts(1 + count, [], lan=True) as hosts, contextlib.ExitStack() as stack:
        started = []
        for host in hosts[1:]:
            place = folder / host.name
            place.mkdir()
            started.append(stack.enter_context(_started(host, place, shell, profile, size, has_key)))
        yield Bare(hosts[0], started, folder, _ssh_settings(hosts, folder))


@contextlib.contextmanager
def _started(host: Host, place: Path, shell: str, profile: str, size: str, has_key: bool) -> Iterator[BareHost]:
    told = {
        "HIDDEN": " ".join(dict.fromkeys(_HIDDEN)), "HOME_THERE": HOME, "ACCOUNT": ACCOUNT, "PASSWORD": PASSWORD,
        "KEYS": str(place.parent), "AUTHORIZED": "1" if has_key else "", "PROFILE": profile, "SSHD": SSHD,
    }  # fmt: skip
    words = [
        "nsenter",
        f"--net=/run/netns/{host.namespace}",
        "unshare",
        "--mount",
        "--uts",
        "--pid",
        "--fork",
        "--kill-child",
    ]
    command = [*words, "sh", "-c", _INIT, "sh", str(place), host.name, size, host.lan, shell]
    daemon = ranks.start(command, told)
    try:
        daemon.await_output("Server listening", "stderr")
        yield BareHost(host, _first_process(daemon.process.pid))
    finally:
        daemon.process.send_signal(signal.SIGKILL)
        ranks.end([daemon])


def _first_process(pid: int) -> int:
    """The first process of the new process namespace, which unshare has forked."""
    ends_s = time.monotonic() + 10
    while time.monotonic() < ends_s:
        below = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        if below:
            return int(below[0])
        time.sleep(0.01)
    raise AssertionError("no process in the namespaces")


def _ssh_settings(hosts: Sequence[Host], folder: Path) -> dict[str, str]:
    """The environment in which ssh knows the hosts, as anna's."""
    known = (folder / "host.pub").read_text().split()[:2]
    (folder / "known").write_text("".join(f"{host.name} {' '.join(known)}\n" for host in hosts[1:]))
    config = "".join(f"Host {host.name}\n HostName {host.lan}\n HostKeyAlias {host.name}\n" for host in hosts[1:])
    (folder / "config").write_text(
        f"{config}Host *\n User {ACCOUNT}\n IdentityFile {folder / 'user'}\n IdentitiesOnly yes\n IdentityAgent none\n"
        f" UserKnownHostsFile {folder / 'known'}\n"
    )
    wrapper = folder / "bin" / "ssh"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder / "config"} "$@"\n')
    wrapper.chmod(0o755)
    (folder / "home").mkdir()
    return {"PATH": f"{wrapper.parent}:{ranks.BIN}:{os.environ['PATH']}", "HOME": str(folder / "home")}
