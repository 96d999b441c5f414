"""Which code a rank runs, by what its files are: a version stays the same from commit to commit."""

from __future__ import annotations

import hashlib
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]


def source_digest(package: Path = _PACKAGE) -> str:
    """Return a short hash of a package's Python files and their names."""
    found = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        data = path.read_bytes()
        found.update(f"{path.relative_to(package).as_posix()} {len(data)}\n".encode() + data)
    return found.hexdigest()[:12]
