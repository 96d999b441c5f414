"""What can be wrong with a Mac beside its cables: privacy settings, memory, power, the firewall, other daemons."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hippo_mpi.cluster.asking.facts import Facts, Probed
from hippo_mpi.cluster.asking.macos import MacFacts
from hippo_mpi.cluster.doctor.findings import INFO, WARNING, Check, Finding, as_root, known
from hippo_mpi.transport.ports import THIS_MACHINE
from hippo_mpi.units import show_bytes

_PRIVATE_FOLDERS = ("Documents", "Desktop", "Downloads", "Library/Mobile Documents")
_MIN_LEFT_BYTES = 4 << 30  # for macOS, beside what the GPU may hold
FIREWALL = "/usr/libexec/ApplicationFirewall/socketfilterfw"


def macs(hosts: Sequence[Probed]) -> list[tuple[Probed, Facts, MacFacts]]:
    """Return the Macs that answered."""
    return [(host, facts, facts.mac) for _, host, facts in known(hosts) if facts.mac]


def is_private(facts: Facts) -> bool:
    """Return True if macOS keeps ssh sessions out of where the ranks' Python is."""
    folders = [f"{facts.home}/{name}/" for name in _PRIVATE_FOLDERS] if facts.home else []
    return facts.mac is not None and facts.python.startswith(("/Volumes/", *folders))


def _path_private(hosts: Sequence[Probed]) -> Iterator[Finding]:
    for host, facts, _ in macs(hosts):
        if is_private(facts) and not facts.versions:
            fix = (
                "move the project, such as to ~/hippo-mpi, or turn on System Settings > General > Sharing > Remote Login >"
                " Allow full disk access for remote users"
            )
            found = f"macOS keeps ssh sessions out of {facts.python}: {facts.versions_error or 'not permitted'}"
            yield Finding("path-private", host.host.ssh, found, fix)


def _privacy(hosts: Sequence[Probed]) -> Iterator[Finding]:
    for host, facts, _ in macs(hosts):
        for address, reach in facts.reached.items():
            if reach.is_denied:
                found = f"Python may not connect to {address} ({reach.why}), though nc reaches it"
                fix = (
                    "turn on your terminal in System Settings > Privacy & Security > Local Network, or use Terminal, or"
                    " name this machine in the hostfile by its own name, so that ssh starts its rank"
                )
                yield Finding("local-network-privacy", host.host.ssh, found, fix)


def _firewall(hosts: Sequence[Probed]) -> Iterator[Finding]:
    """Check the firewalls that are on, if no call was made; whether one is passed is found with the neighbors."""
    called = {address for _, _, facts in known(hosts) for address in facts.called}
    for host, facts, mac in macs(hosts):
        if mac.has_firewall and len(hosts) > 1 and not called & {*host.host.ips}:
            fix = as_root(FIREWALL, "--add", facts.python, "--unblockapp", facts.python)
            found = "its firewall is on, and asks on its screen whether Python may be reached"
            yield Finding("firewall", host.host.ssh, found, fix, WARNING)


def _wired(hosts: Sequence[Probed]) -> Iterator[Finding]:
    for host, facts, mac in macs(hosts):
        if not facts.memory:
            continue
        total, name = facts.memory[0], host.host.ssh
        if mac.wired_bytes is not None and facts.footprints is not None:
            held = sum(one.bytes for one in facts.footprints)
            if mac.wired_bytes - held > total // 5:
                found = f"{show_bytes(mac.wired_bytes)} of {show_bytes(total)} are wired, but all processes hold {show_bytes(held)}"
                fix = "restart it: a rank that was killed may have left its memory behind"
                yield Finding("wired-stranded", name, found, fix, WARNING)
        limit = mac.settings.get("iogpu.wired_limit_mb", "")
        most = total - max(_MIN_LEFT_BYTES, total // 10)
        if limit.isdigit() and int(limit) << 20 > most:
            found = (
                f"the GPU may hold {show_bytes(int(limit) << 20)} of {show_bytes(total)}, which leaves macOS too little"
            )
            fix = f"sudo sysctl iogpu.wired_limit_mb={most >> 20}, or less: macOS has been seen to panic"
            yield Finding("wired-limit", name, found, fix, WARNING)
        elif limit.isdigit() and 0 < int(limit) << 20 < total // 2:
            found = f"the GPU may hold only {show_bytes(int(limit) << 20)} of {show_bytes(total)}"
            yield Finding(
                "wired-limit", name, found, "sudo sysctl iogpu.wired_limit_mb=0, which is macOS's own", WARNING
            )


def _daemons(hosts: Sequence[Probed]) -> Iterator[Finding]:
    for host, _, mac in macs(hosts):
        if mac.has_exo or (mac.location or "").lower() == "exo":
            found = "exo's daemon is loaded" if mac.has_exo else f"its network location is {mac.location!a}"
            fix = "it sets network interfaces anew: end it by exo's uninstall script, then: networksetup -switchtolocation Automatic"
            yield Finding("other-daemon", host.host.ssh, found, fix, WARNING)


def _power(hosts: Sequence[Probed]) -> Iterator[Finding]:
    for host, _, mac in macs(hosts):
        power, name = mac.power or {}, host.host.ssh
        if mac.is_on_battery:
            yield Finding("sleeps", name, "it runs on its battery", "plug it in", WARNING)
        elif minutes := power.get("sleep"):
            fix = "sudo pmset -a sleep 0 autorestart 1, and keep a notebook's lid open"
            yield Finding("sleeps", name, f"it sleeps after {minutes} min", fix, WARNING)
        if power.get("lowpowermode") == 1 or power.get("powermode") == 1:
            yield Finding("low-power", name, "its low power mode is on", "sudo pmset -a lowpowermode 0", WARNING)
        if mac.speed_limit is not None and mac.speed_limit < 100:
            found = f"heat leaves its CPU {mac.speed_limit} % of its speed"
            yield Finding("hot", name, found, "give it air; see pmset -g therm", WARNING)
        if mac.is_encrypted and name != THIS_MACHINE:
            found = "FileVault is on: after a power cut nobody gets in by key"
            fix = "then log in once by password: by ssh since macOS 26, before that at its keyboard"
            yield Finding("filevault-reboot", name, found, fix, INFO)


BEFORE: tuple[Check, ...] = (_path_private, _privacy)
"""Checks that name the cause of what others would see."""
AFTER: tuple[Check, ...] = (_firewall, _daemons, _wired, _power)
NAMES = (
    "path-private", "local-network-privacy", "firewall", "wired-stranded", "wired-limit", "other-daemon", "sleeps",
    "low-power", "hot", "filevault-reboot",
)  # fmt: skip
