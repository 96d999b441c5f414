"""Settings of a host that matter to its ranks: what they are, what they should be, why, and the commands for it. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from hippo_mpi.cluster.asking.macos import read_power, read_settings
from hippo_mpi.cluster.cabling.address_plan import Command

NEXT_LOGIN, ALWAYS, REBOOT = "from the next login", "for good", "until reboot"
_BUFFER = 16 << 20
_FILES = 65_536
_LIMITS = "/etc/security/limits.d/90-hippo-mpi.conf"
_LIMITS_TEXT = f"* soft nofile {_FILES}\n* hard nofile {_FILES}\n"
_CPUS = "/sys/devices/system/cpu"
_PAGES = "/sys/kernel/mm/transparent_hugepage/enabled"
READ = {
    "Linux": {
        **{
            name: ["sh", "-c", f"cd /proc/sys/net/core && cat {name} && ls -l {name}"]
            for name in ("rmem_max", "wmem_max")
        },
        "files": ["sh", "-c", "ulimit -Sn; ulimit -Hn"],
        "limits": ["sh", "-c", f"[ -d {_LIMITS.rpartition('/')[0]} ] && {{ cat {_LIMITS} 2>/dev/null; true; }}"],
        "governors": ["sh", "-c", f"grep -H . {_CPUS}/cpu[0-9]*/cpufreq/scaling_governor"],
        "governor": ["sh", "-c", f"cat {_CPUS}/cpu0/cpufreq/scaling_available_governors"],
        "pages": ["cat", _PAGES],
    },
    "Darwin": {
        "settings": ["/usr/sbin/sysctl", "hw.memsize", "iogpu.wired_limit_mb"],
        "power": ["/usr/bin/pmset", "-g", "custom"],
        "files": ["/bin/sh", "-c", "ulimit -Sn; ulimit -Hn"],
    },
}
"""Commands that print what settings are, by system."""


@dataclass(frozen=True)
class Setting:
    """A setting as it is, and as it should be.

    Args:
        name, now, wanted: texts; `wanted` is None if it is well as it is.
        why: what it is good for.
        lasts: how long a change stays.
        command: that changes it; None: nothing here can.
    """

    name: str
    now: str
    wanted: str | None
    why: str
    lasts: str
    command: Command | None = None


def max_wired_mb(memory_bytes: int) -> int:
    """Return how many MB a Mac's GPU may have at most; with more, macOS itself runs short, and has been seen to panic."""
    return (memory_bytes - max(4_000_000_000, memory_bytes // 10)) >> 20


def settings_of(system: str, said: Mapping[str, str | None], wired_mb: int | None = None) -> list[Setting]:
    """Return the settings of a host.

    Args:
        system: Linux or Darwin.
        said: what `READ` printed there; None: that command failed.
        wired_mb: for a Mac's GPU, instead of as much as is safe.
    """
    texts = {name: text or "" for name, text in said.items()}
    if system == "Darwin":
        return list(_macos(texts, wired_mb))
    return list(_linux(texts)) if system == "Linux" else []


def _linux(said: Mapping[str, str]) -> Iterator[Setting]:
    for name, what in (("rmem_max", "receive"), ("wmem_max", "send")):
        now, _, mode = said[name].partition("\n")
        if now.isdigit():
            # In a container it may be what the machine has, whoever asks.
            wanted = str(_BUFFER) if int(now) < _BUFFER and mode[2:3] == "w" else None
            path = f"/proc/sys/net/core/{name}"
            why = f"bytes that a program may ask for to {what} on fast links"
            yield Setting(f"net.core.{name}", now, wanted, why, REBOOT, _echo(path, wanted, now) if wanted else None)
    yield from _open_files(said)
    yield from _governor(said)
    if found := re.search(r"\[(\w+)\]", said["pages"]):
        wanted = "madvise" if found[1] == "never" else None
        why = "ranks of a server keep the memory that they free, in huge pages"
        command = _echo(_PAGES, wanted, found[1]) if wanted else None
        yield Setting("transparent_hugepage", found[1], wanted, why, REBOOT, command)


def _echo(path: str, value: str, before: str) -> Command:
    do, undo = (("sh", "-c", f"echo {one} >{path}") for one in (value, before))
    return Command(do, undo)


def _open_files(said: Mapping[str, str]) -> Iterator[Setting]:
    words = said["files"].split()
    if not words:
        return
    soft = float("inf") if words[0] == "unlimited" else int(words[0])
    is_set = said["limits"] == _LIMITS_TEXT
    wanted = str(_FILES) if soft < _FILES // 16 and not is_set and not said["limits"] else None
    text = _LIMITS_TEXT.replace("\n", "\\n")
    command = Command(("sh", "-c", f"printf '{text}' >{_LIMITS}"), ("rm", "-f", _LIMITS)) if wanted else None
    now = f"{words[0]}, {_FILES} {NEXT_LOGIN}" if is_set and soft < _FILES else words[0]
    yield Setting(
        "open files", now, wanted, "a server has a connection per request", f"{ALWAYS}, {NEXT_LOGIN}", command
    )


def _governor(said: Mapping[str, str]) -> Iterator[Setting]:
    found = re.findall(rf"^({_CPUS}/cpu\d+/cpufreq/scaling_governor):(\w+)$", said["governors"], re.MULTILINE)
    if not found:
        return
    kinds = sorted({governor for _, governor in found})
    wanted = "performance" if "performance" in said["governor"].split() and kinds != ["performance"] else None
    command = None
    if wanted:
        do = "; ".join(f"echo {wanted} >{path}" for path, _ in found)
        undo = "; ".join(f"echo {before} >{path}" for path, before in found)
        command = Command(("sh", "-c", do), ("sh", "-c", undo))
    why = "short waits for the next rank let others slow the CPU down"
    yield Setting("CPU governor", ", ".join(kinds), wanted, why, REBOOT, command)


def _macos(said: Mapping[str, str], wired_mb: int | None) -> Iterator[Setting]:
    settings = read_settings(said["settings"])
    memory, limit = settings.get("hw.memsize", ""), settings.get("iogpu.wired_limit_mb", "")
    if memory.isdigit() and limit.isdigit():
        most = max_wired_mb(int(memory))
        value = min(wired_mb or most, most)
        wanted = str(value) if value > 0 and int(limit) != value else None
        do, undo = (("/usr/sbin/sysctl", f"iogpu.wired_limit_mb={one}") for one in (value, limit))
        why = f"MB that the GPU may hold, at most {most} here; 0 is two thirds to three quarters of the memory"
        yield Setting("iogpu.wired_limit_mb", limit, wanted, why, REBOOT, Command(do, undo) if wanted else None)
    power, _ = read_power(said["power"], "Now drawing from 'AC Power'")
    for name, value, why in (("sleep", 0, "a rank that sleeps is lost"), ("autorestart", 1, "back after a power cut")):
        if power and (now := power.get(name)) is not None:
            on, off = (("/usr/bin/pmset", "-c", name, str(one)) for one in (value, now))
            wanted = str(value) if now != value else None
            yield Setting(f"pmset {name}", str(now), wanted, why, ALWAYS, Command(on, off) if wanted else None)
    if files := said["files"].split():
        yield Setting("open files", files[0], None, "a server has a connection per request", ALWAYS)
