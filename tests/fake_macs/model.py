"""Macs that are only said to be there: a model of hardware and settings, and what macOS's commands print of it.

Written from descriptions of these commands; all ids are made up. Commands that change a setting change the model.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from dataclasses import dataclass, field
from ipaddress import IPv4Interface, IPv4Network
from typing import Any

GIB = 1 << 30
PAGE = 16384
_BRIDGE, _BRIDGE_PORT = "bridge0", "Thunderbolt Bridge"


@dataclass
class Answer:
    """What a command prints, and its status."""

    out: str
    err: str = ""
    status: int = 0


@dataclass
class FakePort:
    """A Thunderbolt port."""

    receptacle: int
    interface: str
    domain: str
    is_rdma_down: bool = False


@dataclass
class FakeService:
    """A network service; `words` are those that -setmanual has had."""

    name: str
    device: str
    method: str = "dhcp"
    words: tuple[str, ...] = ()
    is_on: bool = True


@dataclass
class FakeMac:
    """A Mac.

    Args:
        name: the one that ssh knows.
        seed: of its ids and the order of its interfaces.
        port_count: of Thunderbolt ports.
        thunderbolt: 4 or 5.
        rdma: whether it is on; None: macOS has no such command.
        lan: its address on Ethernet, with the length of its network.
        wifi: the same on Wi-Fi.
        routes: interfaces by which some addresses are called, whatever networks say.
        drops_packets: whether its firewall does.
        is_python_denied: whether Python may not use the local network.
    """

    name: str
    seed: int = 0
    port_count: int = 4
    thunderbolt: int = 5
    rdma: bool | None = False
    lan: str = "192.168.1.10/24"
    wifi: str = ""
    model: str = "Mac16,9"
    chip: str = "Apple M4 Max"
    title: str = "Mac Studio"
    version: str = "26.4"
    build: str = "25E241"
    memory: int = 64 * GIB
    wired: int = 4 * GIB
    held: int = 14 * GIB
    wired_limit_mb: int = 0
    sleep: int = 0
    low_power: int = 0
    is_on_battery: bool = False
    speed_limit: int | None = None
    is_encrypted: bool = False
    has_firewall: bool = False
    has_exo: bool = False
    location: str = "Automatic"
    shows_idle_domains: bool = True
    python: str = "/Users/anna/hippo/.venv/bin/python"
    mtus: dict[str, int] = field(default_factory=dict)
    routes: dict[str, str] = field(default_factory=dict)
    is_bridge_up: bool = True
    drops_packets: bool = False
    is_python_denied: bool = False
    ports: list[FakePort] = field(init=False)
    services: list[FakeService] = field(init=False)
    members: list[str] = field(init=False)

    def __post_init__(self) -> None:
        """Receptacles and interfaces are not in one order, as on real ones."""
        interfaces = [f"en{number + 2}" for number in range(self.port_count)]
        first = self.seed % max(1, self.port_count)
        interfaces = interfaces[first:] + interfaces[:first]
        self.ports = [
            FakePort(number + 1, name, self.made_up(f"port {number}")) for number, name in enumerate(interfaces)
        ]
        self.members = sorted(interfaces)
        self.services = [
            FakeService("Ethernet", "en0"), FakeService("Wi-Fi", "en1"), FakeService(_BRIDGE_PORT, _BRIDGE)
        ]  # fmt: skip

    def made_up(self, what: str) -> str:
        """An id that no other Mac has."""
        digest = hashlib.sha256(f"{self.name} {self.seed} {what}".encode()).digest()
        return str(uuid.UUID(bytes=digest[:16])).upper()

    @property
    def hardware_ports(self) -> list[tuple[str, str]]:
        ports = [(f"Thunderbolt {port.receptacle}", port.interface) for port in self.ports]
        return [("Ethernet", "en0"), ("Wi-Fi", "en1"), *ports, (_BRIDGE_PORT, _BRIDGE)]

    def port(self, receptacle: int) -> FakePort:
        return next(port for port in self.ports if port.receptacle == receptacle)

    def service(self, name: str) -> FakeService | None:
        return next((one for one in self.services if one.name == name), None)

    def service_on(self, device: str) -> FakeService | None:
        return next((one for one in self.services if one.device == device and one.is_on), None)


@dataclass
class FakeCable:
    """A cable between two ports, each a Mac's number and a receptacle.

    Args:
        gbps: that the ports have agreed on.
        dock: between them, on the first one's side, which then sees the other one below it.
        is_one_sided: whether the second one sees nothing.
    """

    ends: tuple[tuple[int, int], tuple[int, int]]
    gbps: int = 80
    dock: str | None = None
    is_one_sided: bool = False


@dataclass
class FakeCluster:
    """Macs, cables between them, and disks on some ports, by Mac and receptacle."""

    macs: list[FakeMac]
    cables: list[FakeCable] = field(default_factory=list)
    disks: dict[tuple[int, int], str] = field(default_factory=dict)

    def cable_at(self, mac: int, receptacle: int) -> FakeCable | None:
        return next((cable for cable in self.cables if (mac, receptacle) in cable.ends), None)

    def is_cabled(self, mac: int, interface: str) -> bool:
        ports = self.macs[mac].ports
        if interface == _BRIDGE:
            return any(self.is_cabled(mac, name) for name in self.macs[mac].members)
        return any(port.interface == interface and self.cable_at(mac, port.receptacle) for port in ports)

    def addresses(self, mac: int, interface: str) -> list[IPv4Interface]:
        """Of an interface as it is now: what has no cable has none, what has no fixed one gives itself one."""
        own = self.macs[mac]
        if interface in ("en0", "en1"):
            found = own.lan if interface == "en0" else own.wifi
            return [IPv4Interface(found)] if found else []
        if not self.is_cabled(mac, interface):
            return []
        service = own.service_on(interface)
        if service and service.method == "manual":
            return [IPv4Interface("/".join(service.words[:2]))]
        if service is None or service.method == "off" or interface in own.members:
            return []
        digest = hashlib.sha256(f"{own.name} {interface}".encode()).digest()
        return [IPv4Interface(f"169.254.{digest[0]}.{digest[1] % 254 + 1}/16")]

    # ---- commands

    def answer(self, mac: int, words: list[str]) -> Answer:
        """What a command prints; it may change the model."""
        own, name = self.macs[mac], words[0].rpartition("/")[2]
        rest = words[1:]
        if name == "networksetup":
            return self._networksetup(own, rest)
        if name == "ifconfig":
            return self._ifconfig(mac, rest)
        if name == "route" and rest[:2] == ["-n", "get"]:
            return Answer(self._route(mac, rest[2]))
        if name in ("rdma_ctl", "ibv_devices", "ibv_devinfo") and own.rdma is None:
            return Answer("", f"{name}: command not found\n", 127)
        known: dict[str, Any] = {
            "sw_vers": lambda: (
                f"ProductName:\t\tmacOS\nProductVersion:\t\t{own.version}\nBuildVersion:\t\t{own.build}\n"
            ),
            "system_profiler": lambda: json.dumps({"SPThunderboltDataType": self._buses(mac)}),
            "sysctl": lambda: _sysctl(own),
            "vm_stat": lambda: _vm_stat(own),
            "top": lambda: (
                f"Processes: 2 total\n\nMEM   PID  COMMAND\n{own.held // 2 >> 20}M+  812  python3.12\n{own.held // 2 >> 20}M  1    launchd\n"
            ),
            "netstat": lambda: self._netstat(mac),
            "rdma_ctl": lambda: "enabled\n" if own.rdma else "disabled\n",
            "ibv_devices": lambda: self._ibv_devices(own),
            "ibv_devinfo": lambda: self._ibv_devinfo(mac),
            "pmset": lambda: _pmset(own, rest),
            "fdesetup": lambda: f"FileVault is {'On' if own.is_encrypted else 'Off'}.\n",
            "socketfilterfw": lambda: (
                "Firewall is enabled. (State = 1)\n" if own.has_firewall else "Firewall is disabled. (State = 0)\n"
            ),
            "nc": lambda: "",
            "uname": lambda: "Darwin\n",
            "ipconfig": lambda: own.lan.partition("/")[0] + "\n",
        }
        if name == "nvram":
            return Answer("rdma-enable\t1\n") if own.rdma else Answer("", "nvram: Error getting variable\n", 1)
        if name == "launchctl":
            return (
                Answer("system/io.exo.networksetup = {\n}\n")
                if own.has_exo
                else Answer("", "Could not find service\n", 113)
            )
        return Answer(known[name]()) if name in known else Answer("", f"{name}: command not found\n", 127)

    def _buses(self, mac: int) -> list[dict[str, Any]]:
        own = self.macs[mac]
        buses = [self._bus(mac, port) for port in own.ports]
        return buses[::-1] if own.seed % 2 else buses  # which isn't the receptacles' order

    def _bus(self, mac: int, port: FakePort) -> dict[str, Any]:
        own, place = self.macs[mac], (mac, port.receptacle)
        items, rate = [], 0
        if cable := self.cable_at(mac, port.receptacle):
            here = cable.ends.index(place)
            other, receptacle = cable.ends[1 - here]
            seen = self._as_seen(self.macs[other], receptacle)
            if here == 0 and cable.dock:
                items.append(_device(cable.dock, [seen]))
            elif not (here == 1 and cable.is_one_sided):
                items.append(seen)
            rate = cable.gbps
        if disk := self.disks.get(place):
            items.append(_device(disk, []))
            rate = rate or 40
        idle = 120 if own.thunderbolt == 5 else 40
        tag = {
            "current_speed_key": f"{rate} Gb/s" if rate else f"Up to {idle} Gb/s",
            "link_status_key": "0x2" if rate else "0x100",
            "receptacle_id_key": str(port.receptacle),
            "receptacle_status_key": "receptacle_connected" if rate else "receptacle_no_devices_connected",
        }
        bus: dict[str, Any] = {
            "_name": f"thunderboltusb4_bus_{port.receptacle - 1}", "device_name_key": own.title,
            "receptacle_1_tag": tag, "switch_uid_key": "0x" + port.domain.replace("-", "")[:16], "vendor_name_key": "Apple Inc.",
        }  # fmt: skip
        if rate or own.shows_idle_domains:
            bus["domain_uuid_key"] = port.domain
        return bus | ({"_items": items} if items else {})

    def _as_seen(self, other: FakeMac, receptacle: int) -> dict[str, Any]:
        services = [{"_name": "service_ip", "protocol_id": 1}]
        if other.rdma:
            services.append({"_name": "unknown_xd_service", "protocol_id": 64087})
        return {
            "_name": other.title, "device_name_key": other.model, "domain_uuid_key": other.port(receptacle).domain,
            "services_title": services, "vendor_id_key": "0x0A27", "vendor_name_key": "Apple Inc.",
        }  # fmt: skip

    def _ifconfig(self, mac: int, rest: list[str]) -> Answer:
        own = self.macs[mac]
        if len(rest) == 3 and rest[0] == _BRIDGE and rest[1] in ("deletem", "addm"):
            if (rest[2] in own.members) == (rest[1] == "addm"):
                return Answer("", f"ifconfig: BRDG{rest[1].upper()[:3]} {rest[2]}: Invalid argument\n", 1)
            changed = {*own.members, rest[2]} if rest[1] == "addm" else {*own.members} - {rest[2]}
            own.members = sorted(changed)
            return Answer("")
        names = ["lo0", *(device for _, device in own.hardware_ports)]
        wanted = names if rest in ([], ["-a"]) else [name for name in names if name == rest[0]]
        if not wanted:
            return Answer("", f"ifconfig: interface {rest[0]} does not exist\n", 1)
        return Answer("".join(self._interface(mac, name) for name in wanted))

    def _interface(self, mac: int, name: str) -> str:
        own = self.macs[mac]
        if name == "lo0":
            return "lo0: flags=8049<UP,LOOPBACK,RUNNING,MULTICAST> mtu 16384\n\tinet 127.0.0.1 netmask 0xff000000\n\tinet6 ::1 prefixlen 128 \n"
        is_up = "UP," if name != _BRIDGE or own.is_bridge_up else ""
        text = f"{name}: flags=8863<{is_up}BROADCAST,SMART,RUNNING,SIMPLEX,MULTICAST> mtu {own.mtus.get(name, 1500)}\n"
        text += f"\tether 36:{own.seed % 256:02x}:00:00:00:{sum(name.encode()) % 256:02x}\n"
        for one in self.addresses(mac, name):
            mask = f"0x{int(one.netmask):08x}"
            text += f"\tinet {one.ip} netmask {mask} broadcast {one.network.broadcast_address}\n"
        if name == _BRIDGE:
            text += "".join(f"\tmember: {member} flags=3<LEARNING,DISCOVER>\n" for member in own.members)
        is_active = name == "en0" or self.is_cabled(mac, name)
        return f"{text}\tstatus: {'active' if is_active else 'inactive'}\n"

    def _networksetup(self, own: FakeMac, rest: list[str]) -> Answer:
        match rest:
            case ["-listallhardwareports"]:
                blocks = [
                    f"\nHardware Port: {name}\nDevice: {device}\nEthernet Address: N/A\n"
                    for name, device in own.hardware_ports
                ]
                return Answer("".join(blocks) + "\nVLAN Configurations\n===================\n")
            case ["-listallnetworkservices"]:
                names = [f"{'' if one.is_on else '*'}{one.name}\n" for one in own.services]
                return Answer("An asterisk (*) denotes that a network service is disabled.\n" + "".join(names))
            case ["-listnetworkserviceorder"]:
                return Answer(_service_order(own))
            case ["-getcurrentlocation"]:
                return Answer(f"{own.location}\n")
            case ["-setMTU", device, mtu]:
                own.mtus[device] = int(mtu)
                return Answer("")
            case ["-createnetworkservice", name, port] if own.service(name) is None:
                device = next(device for one, device in own.hardware_ports if one == port)
                own.services.append(FakeService(name, device))
                return Answer("")
            case [option, name, *words] if service := own.service(name):
                return _change(own, service, option, words)
        return Answer("** Error: The parameters were not valid.\n", status=4)

    def _networks(self, mac: int) -> list[tuple[IPv4Network, str]]:
        names = [device for _, device in self.macs[mac].hardware_ports]
        return [(one.network, name) for name in names for one in self.addresses(mac, name)]

    def _netstat(self, mac: int) -> str:
        head = "Routing tables\n\nInternet:\nDestination        Gateway            Flags               Netif Expire\n"
        lines = ["default            192.168.1.1        UGScg                 en0"]
        lines += [
            f"{_shortened(network):18} link#12            UCS                {name:>8}"
            for network, name in self._networks(mac)
        ]
        lines += [
            f"{to:18} link#12            UCS                {name:>8}" for to, name in self.macs[mac].routes.items()
        ]
        return head + "\n".join(lines) + "\n"

    def _route(self, mac: int, address: str) -> str:
        near = [
            (network.prefixlen, name) for network, name in self._networks(mac) if IPv4Interface(address).ip in network
        ]
        name = self.macs[mac].routes.get(address) or max(near, key=lambda one: one[0], default=(0, "en0"))[1]
        return f"   route to: {address}\ndestination: {address}\n  interface: {name}\n      flags: <UP,HOST,DONE>\n"

    def _ibv_devices(self, own: FakeMac) -> str:
        devices = [f"    rdma_{port.interface:12}\t{port.domain.replace('-', '')[:16].lower()}\n" for port in own.ports]
        return "    device          \t   node GUID\n    ------          \t----------------\n" + "".join(
            devices if own.rdma else []
        )

    def _ibv_devinfo(self, mac: int) -> str:
        text = ""
        for port in self.macs[mac].ports if self.macs[mac].rdma else ():
            cable = self.cable_at(mac, port.receptacle)
            ends = [self.macs[number] for number, _ in cable.ends] if cable and not cable.dock else []
            is_active = bool(ends) and not port.is_rdma_down and all(one.rdma for one in ends)
            state = "PORT_ACTIVE (4)" if is_active and len({one.build for one in ends}) == 1 else "PORT_DOWN (1)"
            text += f"hca_id:\trdma_{port.interface}\n\ttransport:\t\t\tThunderbolt (100)\n\t\tport:\t1\n\t\t\tstate:\t\t\t{state}\n\t\t\tlink_layer:\t\tThunderbolt\n\n"
        return text


def _device(name: str, below: list[dict[str, Any]]) -> dict[str, Any]:
    device: dict[str, Any] = {
        "_name": name,
        "device_name_key": name,
        "mode_key": "usb_four_v2",
        "vendor_name_key": "Made Up",
    }
    return device | ({"_items": below} if below else {})


def _sysctl(own: FakeMac) -> str:
    values = {
        "hw.memsize": own.memory, "hw.model": own.model, "machdep.cpu.brand_string": own.chip,
        "iogpu.wired_limit_mb": own.wired_limit_mb, "kern.maxfilesperproc": 61440,
    }  # fmt: skip
    return "".join(f"{name}: {value}\n" for name, value in values.items())


def _vm_stat(own: FakeMac) -> str:
    free = max(0, own.memory - max(own.wired, own.held))
    values = {
        "Pages free": free // 2,
        "Pages active": own.held,
        "Pages inactive": free // 2,
        "Pages speculative": 0,
        "Pages wired down": own.wired,
    }
    lines = [f"{name + ':':25}{value // PAGE:>20}.\n" for name, value in values.items()]
    return f"Mach Virtual Memory Statistics: (page size of {PAGE} bytes)\n" + "".join(lines)


def _pmset(own: FakeMac, rest: list[str]) -> str:
    if rest == ["-g", "batt"]:
        return f"Now drawing from '{'Battery' if own.is_on_battery else 'AC'} Power'\n"
    if rest == ["-g", "therm"]:
        limit = "" if own.speed_limit is None else f"\tCPU_Speed_Limit \t= {own.speed_limit}\n"
        return f"Note: No thermal warning level has been recorded\n{limit}"
    block = f" sleep                {own.sleep}\n lowpowermode         {own.low_power}\n autorestart          1\n"
    return f"Battery Power:\n{block}AC Power:\n{block}"


def _service_order(own: FakeMac) -> str:
    text = "An asterisk (*) denotes that a network service is disabled.\n"
    names = {device: name for name, device in own.hardware_ports}
    for number, one in enumerate(own.services, 1):
        text += f"({number if one.is_on else '*'}) {one.name}\n(Hardware Port: {names[one.device]}, Device: {one.device})\n\n"
    return text


def _change(own: FakeMac, service: FakeService, option: str, words: list[str]) -> Answer:
    """Options of networksetup that name a service."""
    match option, words:
        case "-getinfo", []:
            return Answer(_info(service))
        case "-setmanual", [_, _, *_]:
            service.method, service.words = "manual", tuple(words)
        case "-setdhcp", []:
            service.method, service.words = "dhcp", ()
        case "-setv4off", []:
            service.method, service.words = "off", ()
        case "-setnetworkserviceenabled", ["on" | "off"]:
            service.is_on = words[0] == "on"
        case "-removenetworkservice", []:
            own.services.remove(service)
        case _:
            return Answer("** Error: The parameters were not valid.\n", status=4)
    return Answer("")


def _info(service: FakeService) -> str:
    if service.method == "manual":
        address, mask, *router = service.words
        return f"Manual Configuration\nIP address: {address}\nSubnet mask: {mask}\nRouter: {[*router, '(null)'][0]}\nIPv6: Automatic\n"
    return "DHCP Configuration\nClient ID: \nIPv6: Automatic\n" if service.method == "dhcp" else "IPv6: Automatic\n"


def _shortened(network: IPv4Network) -> str:
    """As netstat writes it: without zeros at the end."""
    kept = str(network.network_address).split(".")[: max(1, (network.prefixlen + 7) // 8)]
    return ".".join(kept) + ("" if network.prefixlen == 8 * len(kept) else f"/{network.prefixlen}")
