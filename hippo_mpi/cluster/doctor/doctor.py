"""Says of each host what it is, and what is wrong with the hosts of a run; what was asked can be kept and judged again."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hippo_mpi.cluster.asking.facts import Facts, Probed, as_number, as_text, read_facts
from hippo_mpi.cluster.asking.remote import ask
from hippo_mpi.cluster.doctor.checks import diagnose
from hippo_mpi.cluster.doctor.findings import ERROR, INFO, Finding
from hippo_mpi.cluster.doctor.listening import with_calls
from hippo_mpi.cluster.doctor.shares import with_plan
from hippo_mpi.cluster.hostfile import Hostfile, hostfile_of
from hippo_mpi.errors import LaunchError, RankError, UserError
from hippo_mpi.transport.ports import THIS_MACHINE
from hippo_mpi.units import show_bytes, visible

_SAVED = ("error", "noise", "asked_s", "took_s", "raw", "backend", "envs", "model", "shortage")
_TIMEOUT_S = 5.0  # for hosts to answer after a run that has failed
# What tells one machine or person from another; each becomes a number, the same everywhere.
_PRIVATE = re.compile(
    r"(?P<mac>\b(?:[0-9a-f]{2}:){5}[0-9a-f]{2}\b)|(?P<uuid>\b[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}\b)"
    r"|(?<=/home/)(?P<user>[\w.-]+)|(?<=/Users/)(?P<account>[\w.-]+)|(?P<id>\b[0-9a-f]{32}\b)|(?P<guid>\b(?:0x)?[0-9A-Fa-f]{16}\b)"
)


def first_error(hostfile: Hostfile) -> Finding | None:
    """Return what keeps ranks of several hosts from working, after a run that has failed; None if nothing is found."""
    if all(host.ssh == THIS_MACHINE for host in hostfile.hosts):
        return None
    found = diagnose(examine(hostfile, (), _TIMEOUT_S))
    return found[0] if found and found[0].weight == ERROR else None


def examine(hostfile: Hostfile, ports: Sequence[int], timeout_s: float, model: str | None = None) -> list[Probed]:
    """Ask hosts everything; the arguments are those of `ask`."""
    hosts = with_calls(ask(hostfile, ports, timeout_s, model), timeout_s)
    return with_plan(hosts, model) if model else hosts


def lines_of(hosts: Sequence[Probed], findings: Sequence[Finding]) -> Iterator[str]:
    """Return what people are told: a line per host, then the findings."""
    width = max(len(host.host.ssh) for host in hosts)
    for host in hosts:
        about = _line_of(host.facts) if host.facts else f"is not known: {host.error}"
        yield visible(f"{host.host.ssh:{width}}  {about}")
    for one in findings:
        yield visible(f"{one.weight}: {one.check} on {one.host}: {one.found}")
        yield visible(f"  {one.fix}")
    if all(one.weight == INFO for one in findings):
        yield "nothing is wrong"


def _line_of(facts: Facts) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in facts.versions.items() if version)
    memory = (
        f"{show_bytes(facts.memory[1])} of {show_bytes(facts.memory[0])} free" if facts.memory else "memory unknown"
    )
    addresses = ", ".join(
        f"{a.ip} {one.name}" for one in facts.interfaces or () for a in one.addresses if not a.ip.is_loopback
    )
    system = f"{facts.system} {facts.release}"
    if mac := facts.mac:
        system = ", ".join(filter(None, (mac.model, mac.chip, mac.version and f"macOS {mac.version}"))) or system
    return f"{system}; {packages or 'no Python for ranks'}; {memory}; {addresses or 'no address'}"


def to_json(hosts: Sequence[Probed], findings: Sequence[Finding]) -> str:
    """Return hosts and findings as a JSON object."""
    about = [
        {"host": host.host.ssh, "answered": host.facts is not None, "error": host.error or None}
        | ({"versions": host.facts.versions, "memory": host.facts.memory} if host.facts else {})
        for host in hosts
    ]
    return json.dumps({"hosts": about, "findings": [asdict(one) for one in findings]}, indent=1)


def exit_code(hosts: Sequence[Probed], findings: Sequence[Finding]) -> int:
    """Return 0, 2 for errors, or 3 if a host doesn't answer."""
    if any(host.facts is None for host in hosts):
        return RankError.exit_code
    return UserError.exit_code if any(one.weight == ERROR for one in findings) else 0


def save(hosts: Sequence[Probed], path: Path) -> None:
    """Write down what hosts have answered, with numbers for addresses of hardware, ids and people's names.

    Raises:
        UserError: it can't be written.
    """
    asked = [{"host": asdict(host.host)} | {name: getattr(host, name) for name in _SAVED} for host in hosts]
    numbers: dict[str, str] = {}

    def number_of(found: re.Match[str]) -> str:
        return numbers.setdefault(found[0], f"{found.lastgroup}-{len(numbers)}")

    try:
        path.write_text(json.dumps(_replaced(asked, number_of), indent=1))
    except OSError as error:
        raise UserError(f"--save {path}: {error.strerror}") from None


def _replaced(value: Any, number_of: Callable[[re.Match[str]], str]) -> Any:
    """Return a value of JSON in whose texts what is private is replaced; numbers and names of fields stay."""
    if isinstance(value, str):
        return _PRIVATE.sub(number_of, value)
    if isinstance(value, dict):
        return {name: _replaced(one, number_of) for name, one in value.items()}
    return [_replaced(one, number_of) for one in value] if isinstance(value, list | tuple) else value


def read_saved(path: Path) -> list[Probed]:
    """Return what `save` has written down.

    Raises:
        UserError: it can't be read, or is something else.
    """
    try:
        hosts = [_probed(one) for one in json.loads(path.read_text())]
    except OSError as error:
        raise UserError(f"--from {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, LaunchError):
        hosts = []
    if not hosts:
        raise UserError(f"--from {path} is not what --save writes")
    return hosts


def _probed(one: dict[str, Any]) -> Probed:
    (host,) = hostfile_of([one["host"]], "host").hosts
    facts = read_facts(one["raw"]) if one["raw"] else None
    texts = {name: one[name] if isinstance(one.get(name), str) else None for name in ("backend", "model", "shortage")}
    return Probed(
        host, facts, as_text(one["error"]), as_text(one["noise"]), as_number(one["asked_s"]) or 0.0, one["raw"],
        as_number(one.get("took_s")) or 0.0, envs=tuple(map(as_text, one.get("envs", ()))), **texts,
    )  # fmt: skip
