"""What a host says of itself: raw outputs of commands, and a few facts, as one JSON object. Python 3.8, nothing but it.

The doctor sends this file through ssh, with a call of `main` behind it. Nothing is judged and nothing is changed here,
and no file is left.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

COMMAND_S = 4.0
CONNECT_S = 2.0
VERSIONS = """
import importlib.metadata as m, json, platform
def of(name):
    try: return m.version(name)
    except m.PackageNotFoundError: return None
print(json.dumps({"Python": platform.python_version(), **{n: of(n) for n in ("hippo-mpi", "mlx", "mlx-lm")}}))
"""
MAC_SETTINGS = ["hw.memsize", "hw.model", "machdep.cpu.brand_string", "iogpu.wired_limit_mb", "kern.maxfilesperproc"]
SERVICE_SETTINGS = """
/usr/sbin/networksetup -listallnetworkservices | sed 1d | while IFS= read -r name; do
  echo "== ${name#\\*}"
  /usr/sbin/networksetup -getinfo "${name#\\*}"
done
"""
COMMANDS = {
    "Linux": {
        "addresses": ["ip", "-j", "addr"],
        "routes": ["ip", "-j", "route"],
        "memory": ["cat", "/proc/meminfo"],
        "processes": ["ps", "-A", "-ww", "-o", "pid=,ppid=,user=,etime=,args="],
        "machine": ["cat", "/etc/machine-id"],
    },
    "Darwin": {
        "addresses": ["/sbin/ifconfig", "-a"],
        "routes": ["/usr/sbin/netstat", "-rn", "-f", "inet"],
        "memory": ["/usr/bin/vm_stat"],
        "processes": ["/bin/ps", "-A", "-ww", "-o", "pid=,ppid=,user=,etime=,args="],
        "system": ["/usr/bin/sw_vers"],
        "settings": ["/usr/sbin/sysctl", *MAC_SETTINGS],
        "thunderbolt": ["/usr/sbin/system_profiler", "SPThunderboltDataType", "-json"],
        "ports": ["/usr/sbin/networksetup", "-listallhardwareports"],
        "services": ["/usr/sbin/networksetup", "-listnetworkserviceorder"],
        "service settings": ["/bin/sh", "-c", SERVICE_SETTINGS],
        "location": ["/usr/sbin/networksetup", "-getcurrentlocation"],
        "rdma": ["/usr/bin/rdma_ctl", "status"],
        "rdma devices": ["/usr/bin/ibv_devices"],
        "rdma ports": ["/usr/bin/ibv_devinfo"],
        "power": ["/usr/bin/pmset", "-g", "custom"],
        "power source": ["/usr/bin/pmset", "-g", "batt"],
        "heat": ["/usr/bin/pmset", "-g", "therm"],
        "encryption": ["/usr/bin/fdesetup", "status"],
        "firewall": ["/usr/libexec/ApplicationFirewall/socketfilterfw", "--getglobalstate"],
        "exo": ["/bin/launchctl", "print", "system/io.exo.networksetup"],
    },
}


def run(words: list[str]) -> dict[str, Any]:
    """Return what a command prints, by stream, and its status; None as status: there is no such command, or no end."""
    try:
        found = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, timeout=COMMAND_S)
        return {
            "out": found.stdout.decode("utf-8", "replace"), "err": found.stderr.decode("utf-8", "replace"),
            "status": found.returncode,
        }  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        return {"out": "", "err": str(error), "status": None}


def bind(address: str, port: int) -> str:
    """Return "" if an address and port can be listened on, else why not."""
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind((address, port))
            return ""
        except OSError as error:
            return error.strerror or str(error)


def reach(address: str) -> dict[str, str | None]:
    """Return by which own address another is called, and "" if it is there: a refused connection shows that, too."""
    source = None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        try:
            one.connect((address, 9))
            source = one.getsockname()[0]
        except OSError:
            pass
    try:
        socket.create_connection((address, 9), CONNECT_S).close()
        why = ""
    except ConnectionRefusedError:
        why = ""
    except OSError as error:
        why = error.strerror or "timed out"
    return {"source": source, "why": why}


def cache_folder() -> str:
    """Return the nearest folder that is there of where models are kept."""
    path = os.environ.get("HF_HOME") or os.path.join(os.path.expanduser("~"), ".cache", "huggingface")
    while not os.path.isdir(path):
        path = os.path.dirname(path)
    return path


def main(python: str, own: list[str], others: list[str], free: list[int]) -> None:
    """Print everything.

    Args:
        python: path of the ranks' Python on this host.
        own: addresses that the host should have.
        others: those that it should reach.
        free: ports on which nobody should listen.
    """
    commands = dict(COMMANDS.get(platform.system(), {}))
    commands["versions"] = [os.path.expanduser(python), "-c", VERSIONS]
    with ThreadPoolExecutor(16) as pool:
        outputs = {name: pool.submit(run, words) for name, words in commands.items()}
        reached = {address: pool.submit(reach, address) for address in others}
        facts = {
            "system": platform.system(), "release": platform.release(), "name": socket.gethostname(),
            "python": sys.executable, "home": os.path.expanduser("~"), "shell": os.environ.get("SHELL", ""),
            "clock": time.time(), "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
            "cache": cache_folder(), "cache_free": shutil.disk_usage(cache_folder()).free,
            "environment": {n: v for n, v in os.environ.items() if n.startswith("MLX_") or n == "SSH_CONNECTION"},
            "own": {address: bind(address, 0) for address in own},
            "taken": {str(port): why for port in free for why in [bind("", port)] if why},
            "outputs": {name: one.result() for name, one in outputs.items()},
            "reached": {address: one.result() for address, one in reached.items()},
        }  # fmt: skip
    print(json.dumps(facts))
