"""The start of an audit log: its end is found, and what kills, power cuts and older versions left there is repaired."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from hippo_mpi.durable_files import sync_folder
from hippo_mpi.errors import UserError
from hippo_mpi.serving.api.audit_chain import (
    Anchor,
    Chain,
    ChainKey,
    anchor_path_of,
    files_of,
    hash_of,
    lines_of,
    make_key,
    numbers_of,
    read_anchor,
    read_chain,
    read_key,
)

_log = logging.getLogger(__name__)
_GAP = "no anchor found, although the key is older than this start: earlier lines may have been dropped unnoticed"


def find_end(log: Path, key_path: Path) -> tuple[ChainKey, Anchor, list[dict[str, Any]]]:
    """Find a log's key and end, and set aside what is behind its last valid line.

    With an anchor only what follows it is read; without one, everything is. A log of an older version, which had no
    key, is renamed to a numbered file, and the chain goes on from its last line in a new one.

    Returns:
        The key, which is made if there is none; the end; and notes that are to become the log's next lines.

    Raises:
        UserError: lines are missing or were changed, or have no MAC although the key is older; or the key is missing.
        OSError: something can't be written.
    """
    key = read_key(key_path)
    if key is None and anchor_path_of(log).exists():
        raise UserError(f"no key file {key_path} for the audit log {log}: give --audit-key, or {_anew(log)}")
    if key and key_path.stat().st_mode & 0o077:
        _log.warning("other users may access the audit log's key %s: chmod 600", key_path)
    anchor = read_anchor(log, key) if key else None
    if key and anchor:
        end = _after_anchor(log, key, anchor)
        return key, end, _set_tail_aside(log, end)
    chain = read_chain(files_of(log), key)
    if chain.mistakes:
        raise UserError(f"{chain.mistakes[0]}: see hippo_mpi.audit verify, or {_anew(log)}")
    end = _end_of(chain, log)
    notes = _set_tail_aside(log, end)
    if key:
        _log.warning("audit log %s: %s", log, _GAP)
        notes.append({"note": _GAP, "gap": True})
    if chain.num_unkeyed and not chain.is_keyed:
        _log.info("audit log %s: its %d lines have no MACs; new ones will", log, chain.num_lines)
        end = _numbered(log, end)
    return key or make_key(key_path), end, notes


def _anew(log: Path) -> str:
    return f"move {log}* away to start over"


def _after_anchor(log: Path, key: ChainKey, anchor: Anchor) -> Anchor:
    """Return the end of the last valid line that follows the anchor."""
    files = files_of(log, anchor.file)
    if anchor.end and (not files or not _has_line(files[0], anchor)):
        raise UserError(
            f"the audit log {log} lacks line {anchor.num_lines:,}, which its anchor records: its end was dropped or"
            f" changed; see hippo_mpi.audit verify, or {_anew(log)}"
        )
    chain = Chain(key, anchor.num_lines, anchor.last_hash, is_keyed=True)
    end = replace(anchor, file=max([anchor.file, *(number + 1 for number in numbers_of(log))]))
    for path in files:  # several if the log was continued in a new file just before a kill
        is_anchored = path == files[0] and anchor.end > 0
        if not is_anchored:
            end = replace(end, start=0, end=0)
        for number, line in enumerate(lines_of(path, end.end), start=2 if is_anchored else 1):
            if not line.endswith(b"\n") or not chain.take(path, number, line[:-1]):
                break
            end = end.followed_by(line[:-1])
        if path != log and end.end < path.stat().st_size:
            raise UserError(
                f"{path} has unexpected data after its last valid line: see hippo_mpi.audit verify, or {_anew(log)}"
            )
    return end if log.exists() else replace(end, start=0, end=0)


def _has_line(path: Path, anchor: Anchor) -> bool:
    with path.open("rb") as stream:
        stream.seek(anchor.start)
        line = stream.read(anchor.end - anchor.start)
    return hash_of(line.removesuffix(b"\n")) == anchor.last_hash


def _end_of(chain: Chain, log: Path) -> Anchor:
    number = max([0, *numbers_of(log)]) + 1
    end = log.stat().st_size - chain.torn_bytes if log.exists() else 0
    return Anchor(chain.num_lines, chain.last_hash, number, max(end - chain.last_bytes, 0), end)


def _set_tail_aside(log: Path, end: Anchor) -> list[dict[str, Any]]:
    """Move what is behind the last line (half a line, or what a power cut left) to a file; return a note of it."""
    num_bytes = log.stat().st_size - end.end if log.exists() else 0
    if not num_bytes:
        return []
    aside = log.with_name(f"{log.name}.torn-{time.time_ns()}")
    note = f"{num_bytes} bytes after the last line, left by a kill or a power cut, were removed"
    with contextlib.suppress(OSError), log.open("rb") as stream:  # on a full disk it is only cut off
        stream.seek(end.end)
        with aside.open("xb") as copy:
            copy.write(stream.read())
        note += f" (copy: {aside.name})"
    os.truncate(log, end.end)
    _log.warning("audit log %s: %s", log, note)
    return [{"note": note}]


def _numbered(log: Path, end: Anchor) -> Anchor:
    """Rename a file without a key to a numbered one; return the end with a new file."""
    if not log.exists():
        return end
    log.rename(log.with_name(f"{log.name}.{end.file}"))
    sync_folder(log.parent)
    return replace(end, file=end.file + 1, start=0, end=0)
