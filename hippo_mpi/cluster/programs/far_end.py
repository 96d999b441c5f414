"""What programs share that are sent to hosts: lines of JSON both ways, a lifeline, and counters of interfaces.

Python 3.8, nothing but it: this is sent through ssh, and no file is left. See `host_program`.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

SILENCE_S = 10.0
"""Without a line from whoever has started it, a program ends: its starter's machine may be gone."""
COMMAND_S = 4.0
_printing = threading.Lock()


def say(message: dict[str, Any]) -> None:
    """Print a message as a line; end the program if nobody reads it."""
    line = (json.dumps(message) + "\n").encode()
    with _printing:
        try:
            while line:
                line = line[os.write(1, line) :]
        except OSError:
            os._exit(1)


def serve(handle: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Answer lines, each in a thread of its own, until standard input ends or falls silent; ends the program."""
    heard_s = [time.monotonic()]
    threading.Thread(target=_watch, args=(heard_s,), daemon=True).start()
    for line in iter(sys.stdin.readline, ""):
        heard_s[0] = time.monotonic()
        if line.strip():
            threading.Thread(target=_answer, args=(handle, json.loads(line)), daemon=True).start()
    os._exit(0)


def _watch(heard_s: list[float]) -> None:
    while time.monotonic() - heard_s[0] < SILENCE_S:
        time.sleep(1.0)
    os._exit(1)


def _answer(handle: Callable[[dict[str, Any]], dict[str, Any]], question: dict[str, Any]) -> None:
    try:
        answer = handle(question)
    except OSError as error:
        answer = {"error": error.strerror or str(error) or "timed out"}
    say({"id": question["id"], "answer": answer})


def output_of(*words: str) -> str:
    """Return what a command prints; nothing if it fails, isn't there, or doesn't end."""
    try:
        found = subprocess.run(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=COMMAND_S
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return found.stdout.decode("utf-8", "replace") if found.returncode == 0 else ""


def contents_of(path: str) -> str:
    """Return the contents of a file; nothing if it can't be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def counters() -> dict[str, list[int]]:
    """Return the bytes that each interface has received and sent, by its name."""
    if platform.system() == "Darwin":
        return read_netstat(output_of("/usr/sbin/netstat", "-ibn"))
    return read_proc_net_dev(contents_of("/proc/net/dev"))  # /sys/class/net may be that of another namespace


def read_proc_net_dev(text: str) -> dict[str, list[int]]:
    """Read /proc/net/dev."""
    found = {}
    for line in text.splitlines():
        name, colon, rest = line.strip().rpartition(":")
        numbers = rest.split()
        if colon and len(numbers) >= 9 and numbers[0].isdigit():
            found[name] = [int(numbers[0]), int(numbers[8])]
    return found


def read_netstat(text: str) -> dict[str, list[int]]:
    """Read macOS's `netstat -ibn`: of each interface the row of its link, which counts what all its addresses do."""
    found = {}
    for line in text.splitlines():
        words = line.split()
        if len(words) >= 10 and words[2].startswith("<Link#") and words[-5].isdigit() and words[-2].isdigit():
            found[words[0].rstrip("*")] = [int(words[-5]), int(words[-2])]
    return found
