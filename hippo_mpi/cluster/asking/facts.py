"""What is known of each host: the probe's answer, read into dataclasses. What can't be read is unknown, never absent.

All of it may be made up, so every type is looked at here, once.
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

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
_UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
_MOST = 1e15  # of numbers of ours, in whatever unit
_T = TypeVar("_T")
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
        clock: None: unknown.
        open_files: that a process may have; -1: as many as it likes, or unknown.
        cache_free: bytes; None: unknown.
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
    clock: float | None
    open_files: int
    cache: str
    cache_free: int | None
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
        KeyError, TypeError, ValueError, AttributeError, RecursionError: it is no probe's answer.
    """
    outputs, is_linux = _outputs(raw["outputs"]), raw["system"] == "Linux"
    versions = outputs["versions"]
    mac = (_known(read_mac, printed(outputs)) or MacFacts()) if raw["system"] == "Darwin" else None
    return Facts(
        as_text(raw["system"]), as_text(raw["release"]), as_text(raw["name"]), as_text(raw["shell"]), as_number(raw["clock"]),
        _whole(raw["open_files"], -1), as_text(raw["cache"]), _whole(raw["cache_free"]),
        _versions(versions["out"]) if versions["status"] == 0 else {}, _last_line(as_text(versions.get("err"))),
        _texts(raw["environment"]), _of_addresses(raw["own"]),
        {address: reach for address, one in raw["reached"].items() if is_address(address) and (reach := _reach(one))},
        {int(port): why for port, why in _texts(raw["taken"]).items() if re.fullmatch(r"[0-9]{1,5}", port)},
        _known(_linux_interfaces if is_linux else _macos_interfaces, _output(outputs, "addresses")),
        _known(_linux_memory, _output(outputs, "memory")) if is_linux else _known(_macos_memory, outputs),
        _known(_processes, _output(outputs, "processes")),
        _first_process(_output(outputs, "processes")),
        _output(outputs, "machine").strip() or (mac.domain if mac else None),
        mac,
        _known(_linux_routes if is_linux else read_routes, _output(outputs, "routes")),
        as_text(raw.get("home")), as_text(raw.get("ranks_python")),
        (_known(_interfaces_off, _output(outputs, "addresses")) or ()) if is_linux else (),
        _known(_linux_footprints if is_linux else read_footprints, _output(outputs, "footprints")),
        _linux_firewall(outputs) if is_linux else mac.has_firewall if mac else None,
        _linux_governor(_output(outputs, "governor")),
        _output(outputs, "mpi").partition("\n")[0] or None,
        _known(_model, raw.get("model")),
        _output(outputs, "hub").strip() or None,
        (_known(read_linux, printed(outputs)) or LinuxFacts()) if is_linux else None,
        _of_addresses(raw.get("called", {})),
    )  # fmt: skip


def is_address(text: object) -> bool:
    """Return whether a text is an IP address."""
    return isinstance(text, str) and _known(ipaddress.ip_address, text) is not None


def _known(read: Callable[[Any], _T], found: Any) -> _T | None:
    """Return what was read; None if it can't be."""
    try:
        return read(found)
    except _UNREADABLE:
        return None


def as_text(found: object) -> str:
    """Return a text; an empty one for what is none."""
    return found if isinstance(found, str) else ""


def _texts(found: Mapping[str, Any]) -> dict[str, str]:
    return {name: one for name, one in found.items() if isinstance(one, str)}


def _of_addresses(found: Mapping[str, Any]) -> dict[str, str]:
    return {address: why for address, why in _texts(found).items() if is_address(address)}


def as_number(found: object) -> float | None:
    """Return a number; None for what is none, or endless."""
    return float(found) if type(found) in (int, float) and abs(found) < _MOST else None  # type: ignore[arg-type]


def _whole(found: object, unknown: _T = None) -> int | _T:  # type: ignore[assignment]
    return found if type(found) is int and -1 <= found < 1 << 63 else unknown


def _model(found: Mapping[str, Any]) -> tuple[int, int] | None:
    size, here = _whole(found["size"]), _whole(found["here"])
    return None if size is None or here is None else (size, here)


def _versions(text: str) -> dict[str, str | None]:
    found: dict[str, str | None] = json.loads(text)
    if not all(one is None or isinstance(one, str) for one in found.values()):
        raise TypeError("versions that are no texts")
    return found


def _outputs(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what of commands is as the probe has it."""
    return {name: one for name, one in found.items()
            if isinstance(one, dict) and isinstance(one.get("out"), str) and type(one.get("status", "")) in (int, type(None))}  # fmt: skip


def _output(outputs: Mapping[str, Any], name: str) -> str:
    found = outputs.get(name, {})
    return str(found["out"]) if found.get("status") == 0 else ""


def printed(outputs: Mapping[str, Any]) -> dict[str, str]:
    """Return what each command has printed, also if it failed in the end, as sysctl does for one unknown name."""
    return {name: one["out"] for name, one in _outputs(outputs).items() if one["status"] is not None}


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def _linux_interfaces(text: str, is_up: bool = True) -> tuple[Interface, ...]:
    """Read `ip -j addr`: the interfaces that are on, or those that are off."""
    return tuple(
        Interface(
            str(one["ifname"]),
            tuple(
                ipaddress.IPv4Interface(f"{a['local']}/{a['prefixlen']}")
                for a in one["addr_info"]
                if a["family"] == "inet"
            ),
            _whole(one.get("mtu")),
        )
        for one in json.loads(text)
        if "ifname" in one and ("UP" in one.get("flags", ())) == is_up
    )


def _interfaces_off(text: str) -> tuple[Interface, ...]:
    return _linux_interfaces(text, is_up=False)


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
    found = dict(re.findall(r"^(\w+):\s+(\d{1,15}) kB", text, re.MULTILINE))
    if not {"MemTotal", "MemAvailable"} <= found.keys() or not int(found["MemTotal"]):
        return None
    return int(found["MemTotal"]) << 10, int(found["MemAvailable"]) << 10


def _reach(one: Any) -> Reach | None:
    """Read how an address is reached; None: that isn't known.

    macOS keeps Python out of the local network at once, without asking the other host; Apple's own programs go on.
    """
    if not isinstance(one, dict) or not isinstance(one.get("why"), str):
        return None
    outputs = _outputs(one)
    interface = re.search(r"interface: (\S+)", printed(outputs).get("route", ""))
    seconds = as_number(one.get("seconds"))
    is_denied = seconds is not None and seconds < _AT_ONCE_S and outputs.get("nc", {}).get("status") == 0
    is_on_link = '"REACHABLE"' in printed(outputs).get("neighbor", "")
    source = one.get("source") if is_address(one.get("source")) else None
    return Reach(source, one["why"], interface[1] if interface else None, is_denied, is_on_link)


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
    lines = re.findall(r"^\s*(\d{1,15})\s+(\d+) (.+)$", text, re.MULTILINE)
    return tuple(Footprint(int(size) << 10, int(pid), name) for size, pid, name in lines) or None


def _linux_governor(text: str) -> str | None:
    """Read the driver and the governor; with a driver of its own that is called pstate, powersave slows nothing down."""
    words = text.split()
    return words[1] if len(words) == 2 and words[1] == "powersave" and "pstate" not in words[0] else None


def _linux_routes(text: str) -> tuple[ipaddress.IPv4Network, ...]:
    """Read `ip -j route`."""
    words = [str(one["dst"]) for one in json.loads(text)]
    return tuple(ipaddress.IPv4Network(word) for word in words if word != "default")


def _macos_memory(outputs: dict[str, Any]) -> tuple[int, int] | None:
    texts = printed(outputs)
    return read_memory(texts.get("memory", ""), read_settings(texts.get("settings", "")))[0]


def _processes(text: str) -> tuple[Process, ...] | None:
    lines = [line.split(None, 4) for line in text.splitlines()]
    ours = (words for words in lines if len(words) == 5 and "hippo_mpi." in words[4])
    return (
        tuple(Process(int(pid), int(parent), user, command) for pid, parent, user, _, command in ours) if text else None
    )


def _first_process(text: str) -> str:
    found = re.search(r"^\s*1\s+0\s+\S+\s+\S+\s+(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else ""
