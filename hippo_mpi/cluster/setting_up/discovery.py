"""Machines that announce their ssh server in the networks of this one, by multicast DNS. Browses only, announces nothing.

Whoever is in a network can announce anything: names are checked before anything is done with them, and never printed raw.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from ipaddress import IPv4Address

from hippo_mpi.cluster.hostfile import hostfile_of
from hippo_mpi.errors import LaunchError, UserError, install_hint

SERVICE = "_ssh._tcp"
MAX_FOUND = 200
_MAX_OUTPUT = 1 << 20
_ESCAPE = re.compile(r"\\(\d{3}|.)", re.DOTALL)


@dataclass(frozen=True)
class Announced:
    """An ssh server that was announced.

    Args:
        service: what people call the machine; whatever somebody has sent.
        host: its name, such as mini2.local; whatever somebody has sent.
        address: IPv4; empty: unknown.
        port: of its ssh server.
        interface: of this machine, behind which it is; empty: unknown.
    """

    service: str
    host: str
    address: str
    port: int
    interface: str

    @property
    def is_usable(self) -> bool:
        """Return True if its name may be given to ssh."""
        try:
            hostfile_of([{"ssh": self.host}], "")
        except UserError:
            return False
        return len(self.host) <= 253

    @property
    def order(self) -> tuple[str, str, str]:
        """Return what sorts machines, and names a machine on a link once."""
        return self.host, self.interface, self.address


def browse(timeout_s: float) -> list[Announced]:
    """Return what is announced, within so many seconds.

    Raises:
        LaunchError: nothing here can browse.
    """
    why = ""
    for is_there, way in _WAYS:
        if is_there():
            try:
                found = {one.order: one for one in way(timeout_s)}
                return [found[order] for order in sorted(found)][:MAX_FOUND]
            except OSError as error:
                why = f" ({error})"
    raise LaunchError(
        f"nothing here can look for machines{why}: {install_hint('cluster')}, or name them: setup mini2.local"
    )


# ---- Avahi, on Linux


def _by_avahi(timeout_s: float) -> Iterable[Announced]:
    words = ["avahi-browse", "--resolve", "--parsable", "--terminate", SERVICE]
    try:
        ended = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout_s + 5)
    except subprocess.TimeoutExpired as error:
        return read_avahi(_text(error.stdout))
    if ended.returncode:
        raise OSError(_text(ended.stderr).strip()[:100] or f"avahi-browse ended with status {ended.returncode}")
    return read_avahi(_text(ended.stdout))


def _text(data: bytes | None) -> str:
    return (data or b"")[:_MAX_OUTPUT].decode(errors="replace")


def read_avahi(text: str) -> Iterator[Announced]:
    """Read `avahi-browse --resolve --parsable`."""
    for line in text.splitlines():
        fields = line.split(";")  # names have \059 for it
        if len(fields) < 9 or fields[0] != "=" or fields[2] != "IPv4" or not fields[8].isdigit():
            continue
        if (address := _address(fields[7])) is not None:
            service, host = (_unescaped(fields[place]) for place in (3, 6))
            yield Announced(service, host, address, int(fields[8]), fields[1])


def _unescaped(field: str) -> str:
    """Return a field, of whose UTF-8 Avahi escapes each byte."""
    raw = _ESCAPE.sub(lambda found: chr(int(found[1])) if len(found[1]) == 3 else found[1], field)
    try:
        return raw.encode("latin-1").decode(errors="replace")
    except UnicodeEncodeError:
        return raw


def _address(text: str) -> str | None:
    try:
        return str(IPv4Address(text))
    except ValueError:
        return None


# ---- Apple's, which needs no permission to see the network


def _by_apple(timeout_s: float) -> Iterable[Announced]:
    part_s = max(1.0, timeout_s / 3)
    names = [name for name, _ in read_apple_names(_said(["-B", SERVICE, "local."], part_s))][:MAX_FOUND]
    with ThreadPoolExecutor(16) as pool:
        places = pool.map(lambda name: (name, read_apple_place(_said(["-L", name, SERVICE, "local."], part_s))), names)
        found = [(name, place) for name, place in places if place]
        hosts = {host for _, (host, _, _) in found if not host.startswith("-")}
        answers = pool.map(lambda host: (host, read_apple_address(_said(["-G", "v4", host], part_s))), hosts)
        addresses = dict(answers)
    return [Announced(name, host, addresses.get(host, ""), port, interface) for name, (host, port, interface) in found]


def _said(words: list[str], seconds: float) -> str:
    """Return what dns-sd says in some seconds; it never ends by itself."""
    running = subprocess.Popen(
        ["dns-sd", *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    ending = threading.Timer(seconds, running.terminate)
    ending.start()
    with running:
        assert running.stdout
        data = running.stdout.read(_MAX_OUTPUT)
        running.kill()
    ending.cancel()
    return _text(data)


def read_apple_names(text: str) -> Iterator[tuple[str, int]]:
    """Read `dns-sd -B`: names of services, with numbers of interfaces; none that could be an option."""
    for line in text.splitlines():
        found = re.match(r"\s*[\d:.]+\s+Add\s+\S+\s+(\d+)\s+\S+\s+_ssh\._tcp\.\s+(.+)$", line)
        if found and not found[2].startswith("-"):
            yield found[2], int(found[1])


def read_apple_place(text: str) -> tuple[str, int, str] | None:
    """Read `dns-sd -L`: host, port, and interface."""
    found = re.search(r" can be reached at (\S+?)\.?:(\d{1,5}) \(interface (\d+)\)", text)
    if not found:
        return None
    interface = ""
    with contextlib.suppress(OSError, OverflowError):
        interface = socket.if_indextoname(int(found[3]))
    return found[1], int(found[2]), interface


def read_apple_address(text: str) -> str:
    """Read `dns-sd -G v4`."""
    found = re.search(r"\sAdd\s+\S+\s+\d+\s+\S+\s+(\d+\.\d+\.\d+\.\d+)\s", text)
    return found[1] if found else ""


# ---- zeroconf, where it is installed


def _by_zeroconf(timeout_s: float) -> Iterable[Announced]:
    from zeroconf import ServiceBrowser, Zeroconf

    logging.getLogger("zeroconf").setLevel(logging.CRITICAL)  # it would print packets that it can't read
    names: set[str] = set()

    def changed(zeroconf: object, service_type: str, name: str, state_change: object) -> None:
        if len(names) < MAX_FOUND:
            names.add(name)

    kind, found = f"{SERVICE}.local.", []
    with contextlib.closing(Zeroconf()) as zeroconf:
        ServiceBrowser(zeroconf, kind, handlers=[changed])
        time.sleep(timeout_s / 2)
        ends_s = time.monotonic() + timeout_s / 2
        for name in sorted(names):
            left_ms = int(1e3 * (ends_s - time.monotonic()))
            info = zeroconf.get_service_info(kind, name, timeout=max(100, left_ms)) if left_ms > 0 else None
            if info and info.server:
                address = next((one for one in info.parsed_addresses() if _address(one)), "")
                found.append(
                    Announced(name.removesuffix(f".{kind}"), info.server.rstrip("."), address, info.port or 22, "")
                )
    return found


_WAYS: tuple[tuple[Callable[[], bool], Callable[[float], Iterable[Announced]]], ...] = (
    (lambda: bool(shutil.which("dns-sd")), _by_apple),
    (lambda: bool(shutil.which("avahi-browse")), _by_avahi),
    (lambda: importlib.util.find_spec("zeroconf") is not None, _by_zeroconf),
)
