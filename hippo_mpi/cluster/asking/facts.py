"""What is known of each host: the probe's answer, read into dataclasses. What can't be read is unknown, never absent."""

from __future__ import annotations

import ipaddress
import json
import re
from dataclasses import dataclass, field
from typing import Any

from hippo_mpi.cluster.asking.linux import LinuxFacts, read_linux
from hippo_mpi.cluster.asking.macos import (
    Footprint,
    MacFacts,
    read_footprints,
    read_mac,
    read_memory,
    read_routes,
    read_settings,
)
from hippo_mpi.cluster.hostfile import Host

HAS_NO_PYTHON = "no Python"
"""What is wrong with a host on which the probe can't run."""
# What Docker, Podman, Kubernetes, libvirt, LXD, Incus, VMware, VirtualBox and macOS make for what runs on the host itself.
_OF_GUESTS = re.compile(
    r"(docker|podman|cni|cbr|virbr|lxcbr|lxdbr|incusbr|kube-bridge|weave|vmnet|vboxnet)\d*|cni-\w+|br-[0-9a-f]{12}|bridge1\d\d"
)
_AT_ONCE_S = 0.2  # far less than it takes to find out that nobody answers


@dataclass(frozen=True)
class Interface:
    """A network interface, with its addresses as in 10.205.0.1/30."""

    name: str
    addresses: tuple[ipaddress.IPv4Interface, ...]
    mtu: int | None = None

    @property
    def is_of_guests(self) -> bool:
        """Return True if it leads to containers or virtual machines on the host itself, and to no other host."""
        return bool(_OF_GUESTS.fullmatch(self.name))


@dataclass(frozen=True)
class Process:
    """A process of ours."""

    pid: int
    parent: int
    user: str
    command: str


@dataclass(frozen=True)
class Reach:
    """How another host's address is called.

    Args:
        source: from which own address; None: from none.
        why: why it isn't there; empty: it is.
        interface: by which interface; None: unknown.
        is_denied: whether macOS keeps Python, and not every program, from it.
        is_on_link: whether the other end of the link says that it has the address, though it isn't there for calls.
    """

    source: str | None
    why: str
    interface: str | None = None
    is_denied: bool = False
    is_on_link: bool = False


@dataclass(frozen=True)
class Facts:
    """What one host says of itself.

    Args:
        system: Linux or Darwin.
        name: its own.
        shell: that accounts log in to.
        versions: of Python and packages, in the ranks' Python; empty: there is none.
        interfaces: None: unknown.
        own: for each address that it should have, why it can't be listened on; empty: it can.
        reached: for each address that it should reach.
        taken: for each port that should be free and isn't, why.
        memory: total bytes, and those that are free; None: unknown.
        processes: of ours.
        first_process: the command of the process that lost ones are left to.
        machine: an id that no other machine has; None: unknown.
        mac: what only macOS says; None: it is another system.
        routes: to networks, without the one to everywhere; None: unknown.
        home: folder of the account.
        python: path of the ranks' Python.
        down: interfaces that are off, with their addresses.
        footprints: what processes hold; None: unknown.
        has_firewall: whether something may drop what comes in; None: unknown.
        governor: how the CPU's clock is set, if that slows it down.
        mpi: what mpirun calls itself; None: not asked, or there is none.
        model: bytes of the model's weights, and how many of them are here; None: not asked.
        hub: what the hub answers, a status or an error; None: not asked.
        linux: what only Linux says; None: it is another system.
        called: for addresses where a program of ours has listened, why it couldn't be called; empty: it could.
    """

    system: str
    release: str
    name: str
    shell: str
    clock: float
    open_files: int
    cache: str
    cache_free: int
    versions: dict[str, str | None]
    versions_error: str
    environment: dict[str, str]
    own: dict[str, str]
    reached: dict[str, Reach]
    taken: dict[int, str]
    interfaces: tuple[Interface, ...] | None
    memory: tuple[int, int] | None
    processes: tuple[Process, ...] | None
    first_process: str
    machine: str | None
    mac: MacFacts | None = None
    routes: tuple[ipaddress.IPv4Network, ...] | None = None
    home: str = ""
    python: str = ""
    down: tuple[Interface, ...] = ()
    footprints: tuple[Footprint, ...] | None = None
    has_firewall: bool | None = None
    governor: str | None = None
    mpi: str | None = None
    model: tuple[int, int] | None = None
    hub: str | None = None
    linux: LinuxFacts | None = None
    called: dict[str, str] = field(default_factory=dict)

    def interface_of(self, address: str) -> Interface | None:
        """Return the interface that has an address."""
        wanted = ipaddress.ip_address(address)
        return next((one for one in self.interfaces or () if any(a.ip == wanted for a in one.addresses)), None)

    def interface_towards(self, address: str) -> Interface | None:
        """Return the interface in whose network an address is."""
        wanted = ipaddress.ip_address(address)
        return next((one for one in self.interfaces or () if any(wanted in a.network for a in one.addresses)), None)


@dataclass(frozen=True)
class Probed:
    """A host, and what came of asking it.

    Args:
        host: of the hostfile.
        facts: None: it didn't answer.
        error: what ssh said then, or what is wrong with the answer.
        noise: what its shell prints at each login.
        asked_s: when it was asked, by our clock.
        took_s: how long the answer took.
        backend: that the hostfile asks for.
        envs: that it gives to every rank.
        model: that the ranks are to run.
        shortage: why it doesn't fit into the memory of all hosts; empty: it does; None: unknown.
    """

    host: Host
    facts: Facts | None = None
    error: str = ""
    noise: str = ""
    asked_s: float = 0.0
    raw: dict[str, Any] = field(default_factory=dict)
    took_s: float = 0.0
    backend: str | None = None
    envs: tuple[str, ...] = ()
    model: str | None = None
    shortage: str | None = None


def read_facts(raw: dict[str, Any]) -> Facts:
    """Return the facts in a probe's answer.

    Raises:
        KeyError, TypeError, ValueError: it is no probe's answer.
    """
    outputs, is_linux = raw["outputs"], raw["system"] == "Linux"
    versions = outputs["versions"]
    mac = read_mac(_printed(outputs)) if raw["system"] == "Darwin" else None
    return Facts(
        raw["system"], raw["release"], raw["name"], raw["shell"], float(raw["clock"]), int(raw["open_files"]), raw["cache"],
        int(raw["cache_free"]), json.loads(versions["out"]) if versions["status"] == 0 else {}, _last_line(versions["err"]),
        dict(raw["environment"]), dict(raw["own"]),
        {address: _reach(one) for address, one in raw["reached"].items()},
        {int(port): why for port, why in raw["taken"].items()},
        (_linux_interfaces if is_linux else _macos_interfaces)(_output(outputs, "addresses")),
        _linux_memory(_output(outputs, "memory")) if is_linux else _macos_memory(outputs),
        _processes(_output(outputs, "processes")),
        _first_process(_output(outputs, "processes")),
        _output(outputs, "machine").strip() or (mac.domain if mac else None),
        mac,
        (_linux_routes if is_linux else read_routes)(_output(outputs, "routes")),
        str(raw.get("home", "")), str(raw.get("ranks_python", "")),
        (_linux_interfaces(_output(outputs, "addresses"), is_up=False) or ()) if is_linux else (),
        (_linux_footprints if is_linux else read_footprints)(_output(outputs, "footprints")),
        _linux_firewall(outputs) if is_linux else mac.has_firewall if mac else None,
        _linux_governor(_output(outputs, "governor")),
        _output(outputs, "mpi").partition("\n")[0] or None,
        (int(raw["model"]["size"]), int(raw["model"]["here"])) if raw.get("model") else None,
        _output(outputs, "hub").strip() or None,
        read_linux(_printed(outputs)) if is_linux else None,
        {str(address): str(why) for address, why in raw.get("called", {}).items()},
    )  # fmt: skip


def _output(outputs: dict[str, Any], name: str) -> str:
    found = outputs.get(name, {})
    return str(found["out"]) if found.get("status") == 0 else ""


def _printed(outputs: dict[str, Any]) -> dict[str, str]:
    """Return what each command has printed, also if it failed in the end, as sysctl does for one unknown name."""
    return {name: str(one["out"]) for name, one in outputs.items() if one.get("status") is not None}


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def _linux_interfaces(text: str, is_up: bool = True) -> tuple[Interface, ...] | None:
    """Read `ip -j addr`: the interfaces that are on, or those that are off."""
    try:
        return tuple(
            Interface(
                one["ifname"],
                tuple(
                    ipaddress.IPv4Interface(f"{a['local']}/{a['prefixlen']}")
                    for a in one["addr_info"]
                    if a["family"] == "inet"
                ),
                one.get("mtu"),
            )
            for one in json.loads(text)
            if "ifname" in one and ("UP" in one.get("flags", ())) == is_up
        )
    except (ValueError, KeyError, TypeError):
        return None


def _macos_interfaces(text: str) -> tuple[Interface, ...] | None:
    """Read `ifconfig -a`."""
    found = []
    for block in re.split(r"\n(?=\S)", text):
        head = re.match(r"(\w+): flags=\w+<([^>]*)>.*?mtu (\d+)", block)
        if head and "UP" in head[2].split(","):
            pairs = re.findall(r"\n\s+inet (\S+).*? netmask (0x[0-9a-f]{8})", block)
            addresses = (ipaddress.IPv4Interface(f"{ip}/{bin(int(mask, 16)).count('1')}") for ip, mask in pairs)
            found.append(Interface(head[1], tuple(addresses), int(head[3])))
    return tuple(found) or None


def _linux_memory(text: str) -> tuple[int, int] | None:
    """Read /proc/meminfo."""
    found = dict(re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE))
    if not {"MemTotal", "MemAvailable"} <= found.keys():
        return None
    return int(found["MemTotal"]) << 10, int(found["MemAvailable"]) << 10


def _reach(one: dict[str, Any]) -> Reach:
    """Read how an address is reached.

    macOS keeps Python out of the local network at once, without asking the other host; Apple's own programs go on.
    """
    interface = re.search(r"interface: (\S+)", str(one.get("route", {}).get("out", "")))
    is_at_once = float(one.get("seconds", _AT_ONCE_S)) < _AT_ONCE_S
    is_denied = is_at_once and one.get("nc", {}).get("status") == 0
    is_on_link = '"REACHABLE"' in str(one.get("neighbor", {}).get("out", ""))
    return Reach(one["source"], one["why"], interface[1] if interface else None, is_denied, is_on_link)


def _linux_firewall(outputs: dict[str, Any]) -> bool | None:
    """Read `nft list ruleset`, which only root may ask: whether a chain of incoming packets drops any.

    For others, whether a firewall is said to be on.
    """
    if outputs.get("firewall", {}).get("status") != 0:
        said = _output(outputs, "firewall services").split()
        return True if "ENABLED=yes" in said or "active" in said else None
    chains = re.split(r"^\s*chain ", _output(outputs, "firewall"), flags=re.MULTILINE)
    return any("hook input" in chain and bool(re.search(r"\b(drop|reject)\b", chain)) for chain in chains)


def _linux_footprints(text: str) -> tuple[Footprint, ...] | None:
    """Read `ps -A -o rss=,pid=,comm=`."""
    lines = re.findall(r"^\s*(\d+)\s+(\d+) (.+)$", text, re.MULTILINE)
    return tuple(Footprint(int(size) << 10, int(pid), name) for size, pid, name in lines) or None


def _linux_governor(text: str) -> str | None:
    """Read the driver and the governor; with a driver of its own that is called pstate, powersave slows nothing down."""
    words = text.split()
    return words[1] if len(words) == 2 and words[1] == "powersave" and "pstate" not in words[0] else None


def _linux_routes(text: str) -> tuple[ipaddress.IPv4Network, ...] | None:
    """Read `ip -j route`."""
    try:
        words = [str(one["dst"]) for one in json.loads(text)]
        return tuple(ipaddress.IPv4Network(word) for word in words if word != "default")
    except (ValueError, KeyError, TypeError):
        return None


def _macos_memory(outputs: dict[str, Any]) -> tuple[int, int] | None:
    printed = _printed(outputs)
    return read_memory(printed.get("memory", ""), read_settings(printed.get("settings", "")))[0]


def _processes(text: str) -> tuple[Process, ...] | None:
    lines = [line.split(None, 4) for line in text.splitlines()]
    ours = (words for words in lines if len(words) == 5 and "hippo_mpi." in words[4])
    return (
        tuple(Process(int(pid), int(parent), user, command) for pid, parent, user, _, command in ours) if text else None
    )


def _first_process(text: str) -> str:
    found = re.search(r"^\s*1\s+0\s+\S+\s+\S+\s+(.+)$", text, re.MULTILINE)
    return found[1] if found else ""
