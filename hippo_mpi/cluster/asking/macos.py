"""What is known of a Mac beyond what every host says: outputs of macOS's commands, read.

What can't be read is unknown (None), never absent. All parsers are pure, and none of them raises.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from hippo_mpi.cluster.asking.thunderbolt import Port, read_hardware_ports, read_ports

_BOTH = re.compile(r"^\((?:\d+|\*)\) (.+)\n\(Hardware Port: (.*), Device: (\S*)\)", re.MULTILINE)


@dataclass(frozen=True)
class Bridge:
    """A bridge of interfaces.

    Args:
        name: bridge0 is the Thunderbolt Bridge.
        members: interfaces, whose frames it passes on.
        is_up: whether it does so.
    """

    name: str
    members: tuple[str, ...]
    is_up: bool


@dataclass(frozen=True)
class Service:
    """A network service: the settings of an interface, under a name.

    Args:
        name: by which `networksetup` knows it.
        interface: whose settings these are.
        is_on: whether they are in force.
        method: manual, manual with dhcp router, dhcp, off, or another word of macOS's; None: unknown.
        address: of a manual service, its mask, and its router if it has one.
    """

    name: str
    interface: str
    is_on: bool = True
    method: str | None = None
    address: tuple[str, ...] = ()


@dataclass(frozen=True)
class Footprint:
    """What a process holds of the memory."""

    bytes: int
    pid: int
    command: str


@dataclass(frozen=True)
class MacFacts:
    """What one Mac says of itself.

    Args:
        model: such as Mac16,11.
        chip: such as Apple M4 Pro.
        version: of macOS, such as 26.4.
        build: of macOS; two Macs must have the same for RDMA.
        ports: of Thunderbolt.
        bridges: of interfaces.
        hardware_ports: interfaces, by the names of their ports.
        services: in the order in which macOS takes them.
        location: that is in force, such as Automatic.
        rdma: whether it is on; None: unknown, or macOS has none.
        rdma_at_boot: whether it will be on after the next start.
        rdma_devices: whether the port of each is active; its value None: unknown.
        settings: numbers and texts of `sysctl`, by name.
        wired_bytes: memory that can't be paged out.
        power: settings of `pmset` on the current source, such as sleep.
        is_on_battery: now.
        speed_limit: of the CPU, in percent, as heat leaves it; None: unknown.
        is_encrypted: whether FileVault is on.
        has_firewall: whether the application firewall is on.
        has_exo: whether exo's daemon was seen.
    """

    model: str | None = None
    chip: str | None = None
    version: str | None = None
    build: str | None = None
    ports: tuple[Port, ...] | None = None
    bridges: tuple[Bridge, ...] | None = None
    hardware_ports: Mapping[str, str] | None = None
    services: tuple[Service, ...] | None = None
    location: str | None = None
    rdma: bool | None = None
    rdma_at_boot: bool | None = None
    rdma_devices: Mapping[str, bool | None] | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    wired_bytes: int | None = None
    power: Mapping[str, int] | None = None
    is_on_battery: bool | None = None
    speed_limit: int | None = None
    is_encrypted: bool | None = None
    has_firewall: bool | None = None
    has_exo: bool = False

    @property
    def domain(self) -> str | None:
        """Return an id that no other Mac has: that of its first Thunderbolt port that has one."""
        return next((port.domain for port in self.ports or () if port.domain), None)

    def port_of(self, interface: str) -> Port | None:
        """Return the Thunderbolt port of an interface."""
        return next((port for port in self.ports or () if port.interface == interface), None)

    def is_cable(self, interface: str) -> bool:
        """Return True if an interface is a Thunderbolt port's, or a bridge."""
        return self.port_of(interface) is not None or any(bridge.name == interface for bridge in self.bridges or ())

    def bridge_of(self, interface: str) -> Bridge | None:
        """Return the bridge that has an interface as a member."""
        return next((bridge for bridge in self.bridges or () if interface in bridge.members), None)

    def service_of(self, interface: str) -> Service | None:
        """Return the first service of an interface that is on."""
        return next((one for one in self.services or () if one.interface == interface and one.is_on), None)


def read_bridges(text: str) -> tuple[Bridge, ...] | None:
    """Read the bridges of `ifconfig -a`."""
    found = []
    for block in re.split(r"\n(?=\S)", text):
        if head := re.match(r"(bridge\d+): flags=\w+<([^>]*)>", block):
            members = tuple(re.findall(r"\n\s+member: (\S+)", block))
            found.append(Bridge(head[1], members, "UP" in head[2].split(",")))
    return tuple(found) if text.strip() else None


def read_services(order: str, infos: str) -> tuple[Service, ...] | None:
    """Read `networksetup -listnetworkserviceorder`, and `-getinfo` of each service behind a line "== name"."""
    blocks = dict(re.findall(r"^== (.+)\n((?:(?!== ).*\n?)*)", infos, re.MULTILINE))
    found = []
    for match in _BOTH.finditer(order):
        method, address = _info(blocks.get(match[1], ""))
        found.append(Service(match[1], match[3], not match[0].startswith("(*)"), method, address))
    return tuple(found) or None


def _info(text: str) -> tuple[str | None, tuple[str, ...]]:
    """Read `networksetup -getinfo`."""
    head, *_ = [*text.splitlines(), ""]
    if head.startswith("DHCP"):
        return "dhcp", ()
    if head.startswith("Manual"):
        method = "manual with dhcp router" if head.startswith("Manually Using DHCP") else "manual"
        values = dict(re.findall(r"^(IP address|Subnet mask|Router): (\S+)$", text, re.MULTILINE))
        numbers = [values.get(name, "") for name in ("IP address", "Subnet mask", "Router")]
        return method, tuple(one for one in numbers if re.fullmatch(r"[\d.]+", one))
    if re.search(r"^IPv4: Off$", text, re.MULTILINE) or (text.strip() and "IP address" not in text):
        return "off", ()
    return (head.split()[0].lower() if head.split() else None), ()


def read_rdma_devices(devices: str, info: str) -> dict[str, bool | None] | None:
    """Read `ibv_devices` and `ibv_devinfo`."""
    if "device" not in devices:
        return None
    states = {}
    for block in re.split(r"(?m)^(?=hca_id:)", info):
        name, state = re.match(r"hca_id:\s*(\S+)", block), re.search(r"state:\s*(PORT_\w+)", block)
        if name and state:
            states[name[1]] = state[1] == "PORT_ACTIVE"
    return {name: states.get(name) for name in re.findall(r"^\s*(rdma_\w+)\s", devices, re.MULTILINE)}


def read_settings(text: str) -> dict[str, str]:
    """Read `sysctl NAME...`."""
    return dict(re.findall(r"^([\w.]+): ([ -~]{1,200})$", text, re.MULTILINE))


def read_memory(vm_stat: str, settings: Mapping[str, str]) -> tuple[tuple[int, int] | None, int | None]:
    """Return (total, free) bytes, and wired ones, of `vm_stat` and the settings."""
    page = re.search(r"page size of (\d{1,9}) bytes", vm_stat)
    pages = {name: int(count) for name, count in re.findall(r"^Pages ([\w ]+):\s+(\d{1,15})\.", vm_stat, re.MULTILINE)}
    total = settings.get("hw.memsize", "")
    if not page or not {"free", "inactive", "wired down"} <= pages.keys():
        return None, None
    free = sum(pages.get(name, 0) for name in ("free", "inactive", "speculative", "purgeable"))
    memory = (int(total), min(int(total), free * int(page[1]))) if total.isdigit() and int(total) else None
    return memory, pages["wired down"] * int(page[1])


def read_footprints(text: str) -> tuple[Footprint, ...] | None:
    """Read `top -l 1 -stats mem,pid,command`."""
    lines = re.findall(r"^(\d{1,15})([BKMG])[+-]?\s+(\d+)[*+-]?\s+(.+)$", text, re.MULTILINE)
    found = (Footprint(int(size) << 10 * "BKMG".index(unit), int(pid), name.strip()) for size, unit, pid, name in lines)
    return tuple(found) or None


def read_power(text: str, source: str) -> tuple[dict[str, int] | None, bool | None]:
    """Read `pmset -g custom` and the source of `pmset -g batt`: settings in force, and whether a battery gives power."""
    drawn = re.search(r"Now drawing from '([^']+)'", source)
    is_on_battery = drawn[1].startswith("Battery") if drawn else None
    blocks = dict(re.findall(r"^(\w+) Power:\n((?:[ \t]+.*\n?)*)", text, re.MULTILINE))
    block = blocks.get("Battery" if is_on_battery else "AC")
    return ({name: int(value) for name, value in re.findall(r"^\s+(\w+)\s+(\d+)\b", block, re.MULTILINE)}
            if block else None), is_on_battery  # fmt: skip


def read_routes(text: str) -> tuple[ipaddress.IPv4Network, ...] | None:
    """Read `netstat -rn -f inet`; the default route is none of a network's."""
    found = []
    for word in re.findall(r"^(\d[\d./]*)\s", text, re.MULTILINE):
        address, _, length = word.partition("/")
        parts = address.strip(".").split(".")
        bits = length or str(8 * len(parts))  # 10.205 means 10.205.0.0/16
        try:
            found.append(ipaddress.IPv4Network(f"{'.'.join([*parts, '0', '0', '0'][:4])}/{bits}", strict=False))
        except ValueError:
            continue
    return tuple(found) if "Destination" in text else None


def _version(text: str, name: str) -> str | None:
    found = re.search(rf"^{name}:\s*(\S+)", text, re.MULTILINE)
    return found[1] if found else None


def _one_of(text: str, words: Mapping[str, bool]) -> bool | None:
    """Return what a command's only line says."""
    return words.get(text.strip())  # exactly: "not enabled" is none of them


def read_mac(outputs: Mapping[str, str]) -> MacFacts:
    """Return what macOS's commands say, from what each has printed."""

    def of(name: str) -> str:
        return outputs.get(name, "")

    settings, hardware_ports = read_settings(of("settings")), read_hardware_ports(of("ports"))
    power, is_on_battery = read_power(of("power"), of("power source"))
    limit = re.search(r"CPU_Speed_Limit\s*=\s*(\d+)", of("heat"))
    return MacFacts(
        settings.get("hw.model"),
        settings.get("machdep.cpu.brand_string"),
        _version(of("system"), "ProductVersion"),
        _version(of("system"), "BuildVersion"),
        read_ports(of("thunderbolt"), hardware_ports),
        read_bridges(of("addresses")),
        hardware_ports,
        read_services(of("services"), of("service settings")),
        of("location").strip() or None,
        _one_of(of("rdma"), {"enabled": True, "disabled": False}),
        _one_of(re.sub(r"\s+", " ", of("rdma at boot")), {"rdma-enable 1": True, "rdma-enable 0": False}),
        read_rdma_devices(of("rdma devices"), of("rdma ports")),
        settings,
        read_memory(of("memory"), settings)[1],
        power,
        is_on_battery,
        int(limit[1]) if limit else None,
        _one_of(of("encryption"), {"FileVault is On.": True, "FileVault is Off.": False}),
        _firewall(of("firewall")),
        "io.exo.networksetup = {" in of("exo"),
    )


def _firewall(text: str) -> bool | None:
    found = re.search(r"\(State = (\d)\)", text)
    return found[1] != "0" if found else None
