"""What can be wrong with the hosts of a run: a check each, from the facts to findings. Nothing is asked or changed here.

A check's name is stable, for --check and for people who search. It says which host, what was found, and what to do.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence

from hippo_mpi.cluster.asking.facts import HAS_NO_PYTHON, Facts, Probed, Process
from hippo_mpi.cluster.doctor import address_checks, cable_checks, linux_checks, mac_checks, model_checks, rdma_checks
from hippo_mpi.cluster.doctor.findings import ERROR, WARNING, WEIGHTS, Check, Finding, known
from hippo_mpi.transport.ports import THIS_MACHINE
from hippo_mpi.units import count_of, show_bytes

_MIN_FREE_BYTES = 2 << 30
_MIN_OPEN_FILES = 1024
_MOST_OFF_S = 5.0  # between clocks, beyond what the answer took
_RANK = re.compile(r"\S*python\S* (-m |\S*/)hippo_mpi\.(generate|chat|batch|benchmark)( |$)")
_SHELL = re.compile(r"(^|/)((ba|da|z|fi|k)?sh|python[\d.]*)$")
_SIMPLE_SHELLS = ("bash", "zsh")


def diagnose(hosts: Sequence[Probed], only: Sequence[str] = ()) -> list[Finding]:
    """Return what is wrong, errors first, and of these, causes first; of some checks only, if any are named."""
    found = [one for check in CHECKS for one in check(hosts)]
    absent = {one.host for one in found if one.check == "cable-absent" and one.weight == ERROR}
    found = [one for one in found if one.check != "link-down" or one.host not in absent]  # which says why
    return sorted((one for one in found if not only or one.check in only), key=lambda one: WEIGHTS.index(one.weight))


# ---- getting in


def _ssh(hosts: Sequence[Probed]) -> Iterator[Finding]:
    for host in hosts:
        name, said = host.host.ssh, host.error
        if host.facts is not None or not said or said == HAS_NO_PYTHON:
            continue
        if name == THIS_MACHINE:  # which isn't asked through ssh
            is_busy = said.startswith("no answer")
            fix = "end what keeps it busy, or wait longer: doctor --timeout 60" if is_busy else "please report this"
            weight = WARNING if is_busy else ERROR
            yield Finding("no-answer", name, f"this machine hasn't said what it is: {said}", fix, weight)
        elif "Host key verification failed" in said or "IDENTIFICATION HAS CHANGED" in said:
            fix = f"log in once and compare the fingerprint: ssh {name}; if its system was installed anew: ssh-keygen -R {name}"
            yield Finding("ssh-host-key", name, said, fix)
        elif "Permission denied" in said:
            yield Finding("ssh-refused", name, said, f"give it your key: ssh-copy-id {name}")
        elif "resolve" in said:
            yield Finding("ssh-refused", name, said, "check the name, or use the machine's address")
        elif "refused" in said:
            fix = "start its ssh server (macOS: System Settings > General > Sharing > Remote Login)"
            yield Finding("ssh-refused", name, said, fix)
        else:
            yield Finding(
                "ssh-refused", name, said, f"is the machine on, awake and in the network? try: ssh {name} true"
            )


def _ssh_noise(hosts: Sequence[Probed]) -> Iterator[Finding]:
    for host in hosts:
        if host.noise:
            said = host.noise.splitlines()[0][:60]
            fix = "mlx.launch takes it for an answer: print it only in interactive shells (./launch/run doesn't mind)"
            yield Finding("ssh-noise", host.host.ssh, f"its shell prints {said!a} at each login", fix, WARNING)


def _login_shell(hosts: Sequence[Probed]) -> Iterator[Finding]:
    for _, host, facts in known(hosts):
        shell = facts.shell.rpartition("/")[2]
        if host.host.ssh != THIS_MACHINE and shell and shell not in _SIMPLE_SHELLS:
            fix = "only mlx.launch minds: use ./launch/run, or chsh -s /bin/bash"
            yield Finding("login-shell", host.host.ssh, f"accounts there log in to {shell}", fix, WARNING)


def _python(hosts: Sequence[Probed]) -> Iterator[Finding]:
    for host in hosts:
        if host.error == HAS_NO_PYTHON:
            yield Finding(
                "python-missing", host.host.ssh, "no Python of 3.8 or later was found", "install Python 3.11 or later"
            )
    for _, host, facts in known(hosts):
        if not facts.versions and mac_checks.is_private(facts):
            continue  # which is said already
        if not facts.versions:
            where = host.host.python or "the path that this machine has"
            fix = (
                f"./launch/cluster setup {host.host.ssh} copies this machine's; if it has its own, name it in the hostfile:"
                ' "python": "~/hippo/.venv/bin/python"'
            )
            yield Finding("path-differs", host.host.ssh, f"{where} is no Python: {facts.versions_error}", fix)
        elif not facts.versions.get("hippo-mpi"):
            yield Finding(
                "python-missing",
                host.host.ssh,
                "its Python has no hippo_mpi",
                f"./launch/cluster setup {host.host.ssh}",
            )


def _versions(hosts: Sequence[Probed]) -> Iterator[Finding]:
    asked = [(host.host.ssh, facts.versions) for _, host, facts in known(hosts) if facts.versions]
    for name, versions in asked[1:]:
        first, own = asked[0]
        for package in ("mlx", "mlx-lm", "hippo-mpi", "Python"):
            here, there = own.get(package), versions.get(package)
            if package == "Python":
                here, there = _minor(here), _minor(there)
            if here != there and here and there:
                weight = WARNING if package == "Python" else ERROR
                fix = (
                    f"install the same there: pip install {package}=={here}"
                    if package != "Python"
                    else f"use Python {here} there"
                )
                yield Finding("versions-differ", name, f"{package} {there}, but {here} on {first}", fix, weight)


def _minor(version: str | None) -> str | None:
    return ".".join(version.split(".")[:2]) if version else None


# ---- machines


def _names(hosts: Sequence[Probed]) -> Iterator[Finding]:
    by_machine = defaultdict[str, set[str]](set)
    for _, host, facts in known(hosts):
        if facts.machine:
            by_machine[f"{facts.machine} {facts.name}"].add(host.host.ssh)
    for names in by_machine.values():
        if len(names) > 1:
            found = f"{' and '.join(sorted(names))} are one machine"
            yield Finding(
                "names-same", sorted(names)[0], found, "use one name for it; a machine twice has two ranks", WARNING
            )


def stale_ranks(facts: Facts) -> list[Process]:
    """Return the ranks of a host whose starter is gone, so that they are left to the system's first process.

    In a container that may be a shell, whose own children they are.
    """
    if not facts.first_process or _SHELL.search(facts.first_process.split()[0]):
        return []
    return [one for one in facts.processes or () if one.parent == 1 and _RANK.match(one.command)]


def _stale_ranks(hosts: Sequence[Probed]) -> Iterator[Finding]:
    for _, host, facts in known(hosts):
        if lost := stale_ranks(facts):
            pids = " ".join(str(one.pid) for one in lost)
            found = f"{count_of(len(lost), 'rank')} whose starter is gone (pid {pids})"
            fix = "if nobody needs them: hippo_mpi.cluster stop, with the same hosts"
            yield Finding("stale-ranks", host.host.ssh, found, fix, WARNING)


def _room(hosts: Sequence[Probed]) -> Iterator[Finding]:
    for _, host, facts in known(hosts):
        if facts.cache_free is not None and facts.cache_free < _MIN_FREE_BYTES:
            found = f"{show_bytes(facts.cache_free)} are free in {facts.cache}, where models are kept"
            yield Finding("disk-full", host.host.ssh, found, "make room, or set HF_HOME to another disk")
        if facts.memory and facts.memory[1] < facts.memory[0] // 4:
            total, free = facts.memory
            found = f"{show_bytes(free)} of {show_bytes(total)} are free"
            if largest := max(facts.footprints or (), key=lambda one: one.bytes, default=None):
                found += f"; {largest.command} (pid {largest.pid}) holds {show_bytes(largest.bytes)}"
            fix = "end what takes it, or expect fewer layers there"
            yield Finding("memory-taken", host.host.ssh, found, fix, WARNING)
        if 0 <= facts.open_files < _MIN_OPEN_FILES:
            fix = f"./launch/cluster tune {host.host.ssh} --apply"
            yield Finding("open-files", host.host.ssh, f"a process may open {facts.open_files} files", fix, WARNING)


def _environment(hosts: Sequence[Probed]) -> Iterator[Finding]:
    for _, host, facts in known(hosts):
        given = "MLX_METAL_FAST_SYNCH=1" in host.envs
        if given or facts.environment.get("MLX_METAL_FAST_SYNCH") == "1":
            fix = "unset it: it has been seen to hang GPUs until a reboot (mlx #3142)"
            where = 'is 1 in the hostfile\'s "envs"' if given else "is 1"
            yield Finding("fast-synch", host.host.ssh, f"MLX_METAL_FAST_SYNCH {where}", fix, WARNING)
        if facts.governor:
            found = f"its CPU's clock is set by the governor {facts.governor}"
            yield Finding("low-power", host.host.ssh, found, "sudo cpupower frequency-set -g performance", WARNING)
        off_s = facts.clock - host.asked_s if host.asked_s and facts.clock is not None else 0.0
        off_s = min(off_s, max(0.0, off_s - host.took_s))  # it looked at its clock some time in between
        if abs(off_s) > _MOST_OFF_S:
            yield Finding("clock", host.host.ssh, f"its clock is {off_s:+.0f} s off", "set it by NTP", WARNING)


CHECKS: tuple[Check, ...] = (
    _ssh, *mac_checks.BEFORE, _python, _versions, *cable_checks.CHECKS, *address_checks.CHECKS, *rdma_checks.CHECKS,
    *model_checks.CHECKS, _stale_ranks, _room, _ssh_noise, _login_shell, *mac_checks.AFTER, *linux_checks.CHECKS, _names, _environment,
)  # fmt: skip
"""Causes before what they lead to."""
NAMES = (
    "ssh-refused", "ssh-host-key", "no-answer", "ssh-noise", "login-shell", "python-missing", "path-differs", "versions-differ",
    "names-same", "stale-ranks", "disk-full", "memory-taken", "open-files", "fast-synch", "clock",
    *address_checks.NAMES, *cable_checks.NAMES, *rdma_checks.NAMES, *model_checks.NAMES, *mac_checks.NAMES,
)  # fmt: skip
"""Of all checks."""
