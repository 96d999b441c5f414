"""What a host does, once a second, as lines of JSON: memory, how busy it is, and its interfaces. See `far_end`."""

from __future__ import annotations

import os
import platform
import re
import threading
import time
from typing import Any

from hippo_mpi.cluster.programs.far_end import contents_of, counters, output_of, say, serve

_INTERVAL_S = 1.0
_SEARCH_LOOKS = 5  # processes are searched for ours, and macOS is asked for what takes longer, every so many looks
_OURS = "hippo_mpi."


def main() -> None:
    """Look every second, until standard input ends."""
    threading.Thread(target=_look_often, daemon=True).start()
    serve(lambda question: {})


def _look_often() -> None:
    look = MacLook() if platform.system() == "Darwin" else LinuxLook()
    before, before_s = counters(), time.monotonic()
    due_s = before_s
    while True:
        due_s = max(due_s + _INTERVAL_S, time.monotonic())
        time.sleep(max(0.0, due_s - time.monotonic()))
        now, now_s = counters(), time.monotonic()
        passed_s = now_s - before_s
        links = {
            name: [max(0.0, both[way] - before[name][way]) / passed_s for way in (0, 1)]
            for name, both in now.items()
            if name in before
        }
        say({"links": links, **look.now()})
        before, before_s = now, now_s


class LinuxLook:
    """Looks at /proc."""

    def __init__(self) -> None:
        self._looks = 0
        self._ours: list[str] = []
        self._times = read_stat(contents_of("/proc/stat"))

    def now(self) -> dict[str, Any]:
        """Return the present state."""
        if self._looks % _SEARCH_LOOKS == 0:
            self._ours = [pid for pid in os.listdir("/proc") if pid.isdigit() and _is_ours(pid)]
        self._looks += 1
        before, self._times = self._times, read_stat(contents_of("/proc/stat"))
        total, free = read_meminfo(contents_of("/proc/meminfo"))
        pages = sum(_resident_pages(pid) for pid in self._ours)
        return {
            "memory": {"total": total, "free": free, "ours": pages * os.sysconf("SC_PAGE_SIZE")},
            "cpu": busy_share(before, self._times), "gpu": None,
        }  # fmt: skip


def _is_ours(pid: str) -> bool:
    return _OURS in contents_of(f"/proc/{pid}/cmdline") and int(pid) != os.getpid()


def _resident_pages(pid: str) -> int:
    words = contents_of(f"/proc/{pid}/statm").split()
    return int(words[1]) if len(words) > 1 else 0


def read_stat(text: str) -> tuple[int, int]:
    """Read /proc/stat: ticks of all cores that were idle, and all."""
    numbers = [int(word) for word in text.partition("\n")[0].split()[1:9] if word.isdigit()]
    return sum(numbers[3:5]), sum(numbers)


def busy_share(before: tuple[int, int], after: tuple[int, int]) -> float:
    """Return the share of the time between that was not idle."""
    passed = after[1] - before[1]
    return round(1 - (after[0] - before[0]) / passed, 4) if passed > 0 else 0.0


def read_meminfo(text: str) -> tuple[int, int]:
    """Read /proc/meminfo: bytes in all, and free."""
    found = dict(re.findall(r"^(MemTotal|MemAvailable):\s+(\d+) kB", text, re.MULTILINE))
    return int(found.get("MemTotal", 0)) << 10, int(found.get("MemAvailable", 0)) << 10


class MacLook:
    """Asks macOS's commands; those that take longer every few seconds."""

    def __init__(self) -> None:
        self._looks = 0
        self._total = int(output_of("/usr/sbin/sysctl", "-n", "hw.memsize").strip() or 0)
        self._seldom: dict[str, Any] = {}
        self._ours = 0

    def now(self) -> dict[str, Any]:
        """Return the present state."""
        if self._looks % _SEARCH_LOOKS == 0:
            self._ours, busy = read_ps(output_of("/bin/ps", "-A", "-ww", "-o", "rss=,%cpu=,args="))
            gpu = read_ioreg(output_of("/usr/sbin/ioreg", "-r", "-d", "1", "-w", "0", "-c", "IOAccelerator"))
            self._seldom = {"cpu": min(1.0, busy / (os.cpu_count() or 1)), "gpu": gpu}
        self._looks += 1
        free = read_vm_stat(output_of("/usr/bin/vm_stat"))
        return {"memory": {"total": self._total, "free": free, "ours": self._ours}, **self._seldom}


def read_ps(text: str) -> tuple[int, float]:
    """Read `ps -o rss=,%cpu=,args=`: bytes of our processes, and cores that all processes keep busy."""
    ours, busy = 0, 0.0
    for line in text.splitlines():
        words = line.split(None, 2)
        if len(words) == 3 and words[0].isdigit():
            busy += float(re.sub(r"[^\d.]", "", words[1].replace(",", ".")) or 0) / 100
            if _OURS in words[2] and "sys.stdin.readline" not in words[2]:
                ours += int(words[0]) << 10
    return ours, busy


def read_vm_stat(text: str) -> int:
    """Read `vm_stat`: bytes that are free, or would be at once."""
    size = re.search(r"page size of (\d+) bytes", text)
    found = dict(re.findall(r"^Pages (free|inactive|speculative|purgeable):\s+(\d+)\.", text, re.MULTILINE))
    return sum(map(int, found.values())) * int(size[1]) if size else 0


def read_ioreg(text: str) -> float | None:
    """Read `ioreg -c IOAccelerator`: the share of the time that the busiest GPU works; None: it doesn't say."""
    shares = re.findall(r'"Device Utilization %"\s*=\s*(\d+)', text)
    return max(map(int, shares)) / 100 if shares else None
