"""What setup copies to other hosts: this project, and what it needs of this Python's packages; as tar streams."""

from __future__ import annotations

import hashlib
import io
import os
import re
import sys
import sysconfig
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path, PurePosixPath
from typing import Any

from hippo_mpi.cluster.setting_up.session import CHUNK
from hippo_mpi.config.bundled import BUNDLED

OURS = "hippo-mpi"
_PACKAGE = Path(__file__).parents[2]
_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)\s*(?:\[([^\]]*)\])?[^;]*(?:;(.*))?")
_EXTRA = re.compile(r"extra\s*==\s*['\"]([^'\"]+)['\"]")


@dataclass(frozen=True)
class Bundle:
    """Files that go to a host together.

    Args:
        name: of the folder there, which tells one content from another.
        files: paths of files, with the paths that they get.
        texts: what is written there beside them, by path.
    """

    name: str
    files: Sequence[tuple[Path, str]]
    texts: dict[str, bytes]

    @property
    def size(self) -> int:
        """Return its bytes."""
        return sum(path.stat().st_size for path, _ in self.files) + sum(map(len, self.texts.values()))

    def chunks(self) -> Iterator[bytes]:
        """Yield a tar archive of all files."""
        buffer = _Buffer()
        with tarfile.open(fileobj=buffer, mode="w|", bufsize=CHUNK, format=tarfile.GNU_FORMAT) as archive:
            for path, name in self.files:
                archive.add(path, name, recursive=False, filter=_plain)
                yield from buffer.taken()
            for name, data in self.texts.items():
                member = tarfile.TarInfo(name)
                member.size, member.mode = len(data), 0o755 if name.startswith("bin/") else 0o644
                archive.addfile(member, io.BytesIO(data))
        yield from buffer.taken()


class _Buffer(io.RawIOBase):
    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._parts.append(bytes(data))
        return len(data)

    def taken(self) -> Iterator[bytes]:
        parts, self._parts = self._parts, []
        yield from filter(None, parts)


def _plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    member.mode = 0o755 if member.mode & 0o100 else 0o644
    return member


def project() -> Bundle:
    """Return this project as ranks need it: the package, with what comes with it, and its metadata."""
    base = _PACKAGE.parent
    paths = {path for path in _PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    if base == BUNDLED:  # a checkout
        paths |= {*(base / "models").glob("*.yaml"), *(base / "launch").glob("grafana.json")}
        paths |= {path for folder in (base / "models").glob("story-*") for path in folder.rglob("*") if path.is_file()}
    files = [(path, path.relative_to(base).as_posix()) for path in sorted(paths)]
    own = distribution(OURS)
    info = f"{OURS.replace('-', '_')}-{own.version}.dist-info"
    texts = {f"{info}/METADATA": (own.read_text("METADATA") or "").encode()}
    digest = hashlib.sha256("".join(texts).encode())
    for path, name in files:
        data = path.read_bytes()
        digest.update(f"{name} {len(data)}\n".encode() + data)
    return Bundle(f"project-{digest.hexdigest()[:12]}", files, texts)


def closure(name: str = OURS) -> dict[str, Distribution]:
    """Return the distributions that a distribution needs, without its extras, by name; itself left out.

    What isn't installed here isn't needed on a machine like this one.
    """
    found: dict[str, Distribution] = {}
    seen, todo = set(), [(name, frozenset[str]())]
    while todo:
        wanted, extras = todo.pop()
        key = re.sub(r"[-_.]+", "-", wanted).lower()
        if (key, extras) in seen:
            continue
        seen.add((key, extras))
        try:
            one = distribution(wanted)
        except PackageNotFoundError:
            continue
        if key != name:
            found[key] = one
        for requirement in one.requires or ():
            if (parts := _REQUIREMENT.match(requirement)) and extras.issuperset(_EXTRA.findall(parts[3] or "")):
                asked = (extra.strip() for extra in (parts[2] or "").split(",") if extra.strip())
                todo.append((parts[1], frozenset(asked)))
    return found


def environment(found: dict[str, Distribution]) -> Bundle | None:
    """Return distributions as a bundle for an environment of the same Python; None: their files aren't all in one place."""
    site = Path("lib") / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    files: list[tuple[Path, str]] = []
    for one in found.values():
        if one.files is None or '"editable": true' in (one.read_text("direct_url.json") or ""):
            return None
        for file in one.files:
            path = Path(os.path.abspath(str(one.locate_file(file))))
            # Scripts name this Python by its path, and nothing that ranks do needs them.
            if ".." not in PurePosixPath(file).parts and path.is_file():
                files.append((path, (site / file).as_posix()))
    return Bundle(f"venv-{environment_digest(found)}", sorted(set(files), key=lambda pair: pair[1]), _scripts())


def _scripts() -> dict[str, bytes]:
    """Return this project's commands, for an environment wherever it is."""
    found = distribution(OURS).entry_points.select(group="console_scripts")
    line = '#!/bin/sh\nexec "$(dirname "$0")/python" -m {} "$@"\n'
    return {f"bin/{one.name}": line.format(one.module.removesuffix(".__main__")).encode() for one in found}


def environment_digest(found: dict[str, Distribution]) -> str:
    """Return what tells this set of packages, for this kind of Python, from others."""
    versions = sorted(f"{name}=={one.version}" for name, one in found.items())
    return digest_of([sysconfig.get_config_var("SOABI") or "", *versions])


def digest_of(words: Sequence[str]) -> str:
    """Return a short hash of words."""
    return hashlib.sha256(" ".join(words).encode()).hexdigest()[:12]


def tags(found: dict[str, Distribution]) -> set[str]:
    """Return the tags of the wheels that the distributions came from, such as cp311-cp311-macosx_14_0_arm64."""
    return {line[5:] for one in found.values() for line in _wheel_tags(one)}


def _wheel_tags(one: Distribution) -> list[str]:
    lines = [line for line in (one.read_text("WHEEL") or "").splitlines() if line.startswith("Tag: ")]
    return lines or ["Tag: unknown"]
