"""What a host says of itself: raw outputs of commands, and a few facts, as one JSON object. Python 3.8, nothing but it.

The doctor sends this file through ssh, with a call of `main` behind it. Nothing is judged and nothing is changed here,
and no file is left.
"""

from __future__ import annotations

import errno
import glob
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

CONNECT_S = 2.0
VERSIONS = """
import importlib.metadata as m, json, platform
def of(name):
    try: return m.version(name)
    except m.PackageNotFoundError: return None
print(json.dumps({"Python": platform.python_version(), **{n: of(n) for n in ("hippo-mpi", "mlx", "mlx-lm")}}))
"""
MAC_SETTINGS = ["hw.memsize", "hw.model", "machdep.cpu.brand_string", "iogpu.wired_limit_mb", "kern.maxfilesperproc"]
GOVERNOR = "/sys/devices/system/cpu/cpu0/cpufreq/"
SERVICE_SETTINGS = """
/usr/sbin/networksetup -listallnetworkservices | sed 1d | while IFS= read -r name; do
  echo "== ${name#\\*}"
  /usr/sbin/networksetup -getinfo "${name#\\*}"
done
"""
HUB = """
import os, sys, urllib.error, urllib.request
home = os.environ.get("HF_HOME") or os.path.expanduser("~/.cache/huggingface")
token = os.environ.get("HF_TOKEN", "")
try: token = token or open(home + "/token").read().strip()
except OSError: pass
url = os.environ.get("HF_ENDPOINT", "https://huggingface.co") + "/api/models/" + sys.argv[1]
request = urllib.request.Request(url, headers={"Authorization": "Bearer " + token} if token else {})
try: print(urllib.request.urlopen(request, timeout=5).status)
except urllib.error.HTTPError as error: print(error.code)
except OSError as error: print(error)
"""
# Each line behind the name of its file; that there are none is no failure.
SUPPLIES = "cd /; grep -Hs . sys/class/power_supply/*/uevent; true"
HEAT = """cd /; cd sys/class/thermal &&
grep -Hs . */type */cur_state */max_state */temp */trip_point_*_type */trip_point_*_temp; true
"""
# For all, since only root may see rules.
FIREWALLS = "grep -s '^ENABLED=yes' /etc/ufw/ufw.conf; systemctl is-active firewalld nftables 2>/dev/null; true"
SLEEP = """cd /
ls -l etc/systemd/system/sleep.target etc/systemd/system/suspend.target 2>/dev/null | sed -n 's|.*-> /dev/null$|masked|p'
for of in usr/lib etc; do grep -hs '^ *IdleAction' $of/systemd/logind.conf; done
for of in usr/lib run etc; do grep -hs '^ *IdleAction' $of/systemd/logind.conf.d/*.conf; done; true
"""
COMMANDS = {
    "Linux": {
        "addresses": ["ip", "-j", "addr"],
        "routes": ["ip", "-j", "route"],
        "memory": ["cat", "/proc/meminfo"],
        "footprints": ["ps", "-A", "-o", "rss=,pid=,comm="],
        "processes": ["ps", "-A", "-ww", "-o", "pid=,ppid=,user=,etime=,args="],
        "machine": ["cat", "/etc/machine-id"],
        "firewall": ["sh", "-c", "PATH=$PATH:/usr/sbin:/sbin nft list ruleset"],
        "firewall services": ["sh", "-c", FIREWALLS],
        "links": ["ip", "-j", "-d", "link"],
        "sleep": ["sh", "-c", SLEEP],
        "supplies": ["sh", "-c", SUPPLIES],
        "heat": ["sh", "-c", HEAT],
        "governor": ["cat", GOVERNOR + "scaling_driver", GOVERNOR + "scaling_governor"],
    },
    "Darwin": {
        "addresses": ["/sbin/ifconfig", "-a"],
        "routes": ["/usr/sbin/netstat", "-rn", "-f", "inet"],
        "memory": ["/usr/bin/vm_stat"],
        "footprints": ["/usr/bin/top", "-l", "1", "-stats", "mem,pid,command"],
        "processes": ["/bin/ps", "-A", "-ww", "-o", "pid=,ppid=,user=,etime=,args="],
        "system": ["/usr/bin/sw_vers"],
        "settings": ["/usr/sbin/sysctl", *MAC_SETTINGS],
        "thunderbolt": ["/usr/sbin/system_profiler", "SPThunderboltDataType", "-json"],
        "ports": ["/usr/sbin/networksetup", "-listallhardwareports"],
        "services": ["/usr/sbin/networksetup", "-listnetworkserviceorder"],
        "service settings": ["/bin/sh", "-c", SERVICE_SETTINGS],
        "location": ["/usr/sbin/networksetup", "-getcurrentlocation"],
        "rdma": ["/usr/bin/rdma_ctl", "status"],
        "rdma at boot": ["/usr/sbin/nvram", "rdma-enable"],
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


def run(words: list[str], limit_s: float) -> dict[str, Any]:
    """Return what a command prints, by stream, and its status; None as status: there is no such command, or no end."""
    try:
        found = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, timeout=limit_s)
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


def reach(address: str, limit_s: float) -> dict[str, Any]:
    """Return how another address is called, and "" if it is there: a refused connection shows that, too.

    If not, on Linux whether the other end of the link still says that it has that address. On macOS also which interface
    leads there, and if Python isn't let, whether Apple's own nc is.
    """
    found: dict[str, Any] = {"source": None, "why": "", "number": 0}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        try:
            one.connect((address, 9))
            found["source"] = one.getsockname()[0]
        except OSError:
            pass
    began_s = time.monotonic()
    try:
        socket.create_connection((address, 9), CONNECT_S).close()
    except ConnectionRefusedError:
        pass
    except OSError as error:
        found["why"], found["number"] = error.strerror or "timed out", error.errno
    found["seconds"] = time.monotonic() - began_s
    if found["why"] and platform.system() == "Linux":
        found["neighbor"] = run(["ip", "-j", "neigh", "show", "to", address], limit_s)
    if platform.system() == "Darwin":
        found["route"] = run(["/sbin/route", "-n", "get", address], limit_s)
        if found["number"] == errno.EHOSTUNREACH:
            found["nc"] = run(["/usr/bin/nc", "-z", "-G", "2", address, "22"], limit_s)
    return found


def is_path(model: str) -> bool:
    """Return whether a model is a folder's path, and no repo of the hub."""
    return model.startswith(("/", "./", "../", "~")) or model.count("/") > 1


def model_bytes(model: str) -> dict[str, int] | None:
    """Return the bytes of a model's weights, and how many of them are here; None: it comes with the package."""
    home = os.environ.get("HF_HOME") or os.path.join(os.path.expanduser("~"), ".cache", "huggingface")
    name = model.replace("/", "--")
    folders = [os.path.expanduser(model), f"{home}/hub/models--{name}/snapshots/*", f"{home}/hippo_mpi/{name}--*"]
    if "/" not in model and not os.path.isdir(folders[0]):
        return None
    folders += [glob.escape(folder) for folder in synced_folders(f"{home}/hippo_mpi", model)]
    sizes, here = [0], [0]
    for folder in [path for pattern in folders for path in glob.glob(pattern)]:
        files = [os.stat(path) for path in glob.glob(f"{folder}/*.safetensors") if os.path.exists(path)]
        sizes.append(sum(one.st_size for one in files))
        here.append(sum(min(one.st_size, one.st_blocks * 512) for one in files))
    return {"size": max(sizes), "here": max(here)}


def synced_folders(views: str, model: str) -> list[str]:
    """Return where sync has put what it calls so, of a folder of another machine."""
    found, path = [], os.path.abspath(os.path.expanduser(model))
    for note in glob.glob(f"{glob.escape(views)}/local--*/.hippo-hub.json"):
        try:
            with open(note) as file:
                said = json.load(file)
            if model in said["models"] or path == said["origin"]:
                found.append(os.path.dirname(note))
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
    return found


def cache_folder() -> str:
    """Return the nearest folder that is there of where models are kept."""
    path = os.environ.get("HF_HOME") or os.path.join(os.path.expanduser("~"), ".cache", "huggingface")
    while not os.path.isdir(path):
        path = os.path.dirname(path)
    return path


def main(
    python: str,
    own: list[str],
    others: list[str],
    free: list[int],
    model: str | None = None,
    backend: str | None = None,
    limit_s: float = 8.0,
) -> None:
    """Print everything.

    Args:
        python: path of the ranks' Python on this host.
        own: addresses that the host should have.
        others: those that it should reach.
        free: ports on which nobody should listen.
        model: that the ranks are to run; None: not known.
        backend: that they are to use; None: not known.
        limit_s: for each command.
    """
    commands = dict(COMMANDS.get(platform.system(), {}))
    python = os.path.expanduser(python)
    commands["versions"] = [python, "-c", VERSIONS]
    if backend == "mpi":
        commands["mpi"] = ["env", f"PATH={os.path.dirname(python)}:{os.environ.get('PATH', '')}", "mpirun", "--version"]
    if model and "/" in model and not is_path(model) and not os.path.exists(os.path.expanduser(model)):
        commands["hub"] = [sys.executable, "-c", HUB, model]
    with ThreadPoolExecutor(16) as pool:
        outputs = {name: pool.submit(run, words, limit_s) for name, words in commands.items()}
        reached = {address: pool.submit(reach, address, limit_s) for address in others}
        facts = {
            "system": platform.system(), "release": platform.release(), "name": socket.gethostname(),
            "python": sys.executable, "home": os.path.expanduser("~"), "ranks_python": python, "shell": os.environ.get("SHELL", ""),
            "clock": time.time(), "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
            "cache": cache_folder(), "cache_free": shutil.disk_usage(cache_folder()).free,
            "environment": {n: v for n, v in os.environ.items() if n.startswith("MLX_") or n == "SSH_CONNECTION"},
            "model": model_bytes(model) if model else None,
            "own": {address: bind(address, 0) for address in own},
            "taken": {str(port): why for port in free for why in [bind("", port)] if why},
            "outputs": {name: one.result() for name, one in outputs.items()},
            "reached": {address: one.result() for address, one in reached.items()},
        }  # fmt: skip
    print(json.dumps(facts))
