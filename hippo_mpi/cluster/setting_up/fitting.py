"""How a host gets the packages that ranks need: copied from here if they fit there, else by pip. Pure."""

from __future__ import annotations

import platform
import re
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import Distribution, distribution
from typing import Any

from hippo_mpi.cluster.setting_up.packing import OURS, tags
from hippo_mpi.errors import LaunchError

_PLATFORM = re.compile(r"(macosx|manylinux|musllinux)_(\d+)_(\d+)_(\w+)|(linux)_(\w+)")
_OLD = {"manylinux1_": "manylinux_2_5_", "manylinux2010_": "manylinux_2_12_", "manylinux2014_": "manylinux_2_17_"}
_LOWEST = (3, 11)


@dataclass(frozen=True)
class There:
    """A host's Python, its system, and what setup has put there.

    Args:
        glibc, macos: versions, as in 2.35; empty: it has none.
        release: of the system.
        free_bytes: of the disk with the home folder.
        links: what `project` and `venv` lead to, if they are there.
    """

    system: str
    machine: str
    python: tuple[int, ...]
    abi: str
    glibc: str
    macos: str
    release: str = ""
    free_bytes: int = 0
    links: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, said: Any) -> There:
        """Return what `agent.hello` has said.

        Raises:
            LaunchError: it is something else.
        """
        try:
            texts = {name: str(said[name]) for name in ("system", "machine", "abi", "glibc", "macos", "release")}
            links = {str(name): str(to) for name, to in said["links"].items()}
            return cls(python=tuple(map(int, said["python"])), free_bytes=int(said["free_bytes"]), links=links, **texts)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise LaunchError(f"an answer that can't be read: {str(said)[:80]!a}") from None

    @property
    def version(self) -> str:
        """Return Python's version."""
        return _dotted(self.python)


def why_not(found: Mapping[str, Distribution], there: There) -> str:
    """Return why distributions of this Python can't be copied to a host; empty: they can."""
    if there.python[:2] != sys.version_info[:2] or there.abi != (sysconfig.get_config_var("SOABI") or ""):
        return f"Python {_dotted(there.python)} there, {platform.python_version()} here"
    for name, one in found.items():
        if not any(fits(tag, there) for tag in tags({name: one})):
            return f"{name} here is built for {min(tags({name: one})).rpartition('-')[2]}"
    return ""


def fits(tag: str, there: There) -> bool:
    """Return True if a wheel with this tag, of the same Python, runs on a host."""
    where = tag.rpartition("-")[2]
    for old, new in _OLD.items():
        where = where.replace(old, new)
    if where == "any":
        return True
    if not (parts := _PLATFORM.fullmatch(where)):
        return False
    if parts[5]:  # built on this machine
        return _is_arch(parts[6], there) and _version(there.glibc) >= _version(platform.libc_ver()[1])
    wanted = int(parts[2]), int(parts[3])
    if parts[1] == "macosx":
        return (there.system == "Darwin" and (parts[4] == "universal2" or _is_arch(parts[4], there))) and _version(
            there.macos
        ) >= wanted
    return (
        parts[1] == "manylinux"
        and there.system == "Linux"
        and _is_arch(parts[4], there)
        and _version(there.glibc) >= wanted
    )


def _is_arch(arch: str, there: There) -> bool:
    return arch == there.machine


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def pinned() -> list[str]:
    """Return the requirements of this project, without extras, with the versions that are here."""
    found = []
    for line in distribution(OURS).requires or ():
        wanted, _, marker = line.partition(";")
        if "extra" in marker:
            continue
        name = re.match(r"[\w.-]+(\[[^\]]*\])?", wanted.strip())
        assert name
        version = distribution(name[0].partition("[")[0]).version
        found.append(f"{name[0]}=={version}" + (f"; {marker.strip()}" if marker else ""))
    return found


def check(name: str, there: There) -> None:
    """Check that ranks can run with a host's Python.

    Raises:
        LaunchError: they can't.
    """
    if there.python[:2] < _LOWEST:
        own = f"{sys.version_info[0]}.{sys.version_info[1]}"
        raise LaunchError(
            f"{name} has Python {_dotted(there.python)}, and ranks need {_dotted(_LOWEST)} or later: install {own} there,"
            f" as this machine has (`uv python install {own}`, or python.org)"
        )
