"""hippo_mpi.audit: verify an audit log of hippo_mpi.serve, or summarise it.

hippo_mpi.audit verify audit.jsonl
hippo_mpi.audit verify audit.jsonl --lines 7 --last-hash 5f0c...     # as printed before: is the end still there?
hippo_mpi.audit report audit.jsonl --by key,day --since 2026-11-01
echo -n "the prompt" | hippo_mpi.audit digest audit.jsonl           # as it stands in the log
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar, NoReturn

from hippo_mpi.config import checks
from hippo_mpi.config.parser import OptionsParser, changed, option
from hippo_mpi.errors import HippoError, UserError, print_error
from hippo_mpi.serving.api.audit_chain import (
    Anchor,
    Chain,
    ChainKey,
    anchor_path_of,
    files_of,
    key_path_of,
    lines_of,
    read_anchor,
    read_chain,
    read_key,
)
from hippo_mpi.serving.api.audit_report import GROUPS, make_report

_MAX_MISTAKES = 20  # printed; the rest are only counted


def _log_path(text: str) -> Path:
    """Resolve links: a log's key, anchor and older files are beside the file itself."""
    return Path(text).resolve()


def _sha256(text: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{64}", text.lower()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a hash of 64 hexadecimal digits")
    return text.lower()


def _groups(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if not set(names) <= set(GROUPS) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of some of {','.join(GROUPS)}")
    return names


def _time(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a date or time such as 2026-11-01T12:00") from None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


@dataclass(frozen=True, kw_only=True)
class _VerifyOptions:
    """What was noted of a log before."""

    GROUP: ClassVar = "verify"
    last_hash: str | None = option(
        None, "hash of the last line as noted earlier; also finds a log that was rewritten since", check=_sha256
    )
    lines: int | None = option(None, "number of lines at that time; later ones are fine", check=checks.whole)


@dataclass(frozen=True, kw_only=True)
class _ReportOptions:
    """How a log is added up."""

    GROUP: ClassVar = "report"
    by: tuple[str, ...] | None = option(
        None, f"some of {','.join(GROUPS)} (days and months in UTC); default: key,model,day", check=_groups
    )
    since: datetime | None = option(None, "date or time of the first request, such as 2026-11-01", check=_time)
    json: bool = option(False, "print a JSON object instead of a table")


@dataclass(frozen=True, kw_only=True)
class AuditOptions(_VerifyOptions, _ReportOptions):
    """All options of hippo_mpi.audit."""

    what: str = option(
        "",
        "verify: find lines that were changed, dropped or moved; report: add up requests, tokens and errors;"
        " digest: print what the log has in place of the text on standard input",
        "what",
        choices=("verify", "report", "digest"),
    )
    log: Path = option(
        Path(), "the log; older files beside it (LOG.1, LOG.2 ...) are read, too", "log", check=_log_path
    )
    audit_key: Path | None = option(None, "file with the log's key; default: LOG.key", check=Path)


def make_parser() -> OptionsParser[AuditOptions]:
    """Return the parser of the command's options."""
    return OptionsParser(AuditOptions, prog="hippo_mpi.audit", description=(__doc__ or "").splitlines()[0])


def verify(log: Path, key_path: Path | None = None, last_hash: str | None = None, num_lines: int | None = None) -> None:
    """Verify that a log is complete and unchanged; print so, with the options that let a later call check it again.

    Args:
        log: the newest file to check; older files of the log are beside it.
        key_path: of the log's key; None: the default place beside the log.
        last_hash: of the last line, as an earlier call printed it; None: unknown.
        num_lines: of the log, as an earlier call printed it; None: unknown.

    Raises:
        UserError: it isn't; the message has a line for each mistake. Or a file is missing.
    """
    files = _files(log)
    key = _given_key(key_path) if key_path else read_key(key_path_of(log))
    anchor = read_anchor(log, key) if key else None
    chain = read_chain(files, key, anchor, last_hash, num_lines)
    is_current = not re.search(r"\.[0-9]+$", log.name) and log in files
    if not chain.mistakes and (mistake := _unknown(log, chain, is_current, anchor)):
        chain.mistakes.append(mistake)
    if chain.mistakes:
        count = len(chain.mistakes)
        more = [f"... and {count - _MAX_MISTAKES:,} more"] * (count > _MAX_MISTAKES)
        raise UserError("\nerror: ".join([*chain.mistakes[:_MAX_MISTAKES], *more]))
    here = chain.num_lines - (chain.num_before or 0)
    print(f"intact: {here:,} line{'s' * (here != 1)} in {len(files)} file{'s' * (len(files) > 1)}")
    for line in (*_remarks(chain), *chain.notes):
        print(line)
    if chain.is_keyed and not is_current:
        print("these are older files: only the next file can prove that their end is complete")
    print(f"--lines {chain.num_lines} --last-hash {chain.last_hash}")


def _unknown(log: Path, chain: Chain, is_current: bool, anchor: Anchor | None) -> str | None:
    """Return why a log without mistakes may still be incomplete, or None if it can't be."""
    path = anchor_path_of(log)
    if is_current and chain.key is None and path.exists():
        return f"no key file {key_path_of(log)}, although {path} exists: give --audit-key"
    if is_current and chain.key and anchor is None:
        return f"{path} is missing or damaged: can't check whether the end was dropped"
    if chain.noted_at < chain.last_gap:
        note = next(note for note in reversed(chain.notes) if note.startswith(f"line {chain.last_gap:,}: "))
        return f"{note}; if that is expected: --lines {chain.num_lines} --last-hash {chain.last_hash}"
    return None


def _remarks(chain: Chain) -> list[str]:
    """Return lines about what is no mistake in a log, but worth knowing."""
    remarks = []
    if chain.num_before is None:
        remarks.append("earlier lines are in other files")
    elif chain.num_before:
        remarks.append(f"the {chain.num_before:,} earlier lines are in other files")
    if chain.num_unkeyed:
        remarks.append(
            f"{chain.num_unkeyed:,} of them were written without a key: they could have been rewritten until the first line"
            " with a key followed"
        )
    if chain.torn_bytes:
        remarks.append(
            f"an incomplete line ({chain.torn_bytes:,} bytes) follows: being written, or left by a killed server"
        )
    return remarks


def report(log: Path, by: tuple[str, ...], since: datetime | None, as_json: bool) -> None:
    """Print the requests, tokens and errors of a log, summed by group.

    Args:
        log: the newest file; older files of the log are beside it.
        by: names of GROUPS.
        since: the time from which requests count; None: all of them.
        as_json: print a JSON object instead of a table.

    Raises:
        UserError: there is no such log.
    """
    totals = make_report(_files(log), by, since)
    if as_json:
        rest = {"requests_not_written": totals.num_lost, "unreadable_lines": totals.num_unreadable}
        print(json.dumps({"groups": totals.rows(), **rest}, indent=1))
        return
    print(totals.table() if totals.groups else "no requests")
    if totals.num_lost:
        print(f"{totals.num_lost:,} more could not be logged")
    if totals.num_unreadable:
        print(f"{totals.num_unreadable:,} lines could not be read: see hippo_mpi.audit verify {log}")


def digest(log: Path, key_path: Path | None, text: str) -> None:
    """Print the digest that stands for a text in a log.

    Raises:
        UserError: there is no key, the log wasn't written with it, or the text is empty.
    """
    key = _given_key(key_path or key_path_of(log))
    first_lines = (next(lines_of(file), b"").removesuffix(b"\n") for file in _files(log))
    if not read_anchor(log, key) and not any(map(key.is_sealed, first_lines)):
        raise UserError(f"{log} was not written with this key: give --audit-key")
    if not text:
        raise UserError("standard input is empty: pipe the text in, as in: echo -n TEXT | hippo_mpi.audit ...")
    print(key.text_digest(text))


def _given_key(path: Path) -> ChainKey:
    key = read_key(path)
    if key is None:
        raise UserError(f"no such key file: {path}; give --audit-key")
    return key


def _files(log: Path) -> list[Path]:
    files = files_of(log)
    if not files:
        raise UserError(f"no such audit log: {log}")
    return files


def _run(options: AuditOptions) -> None:
    for what, kind in (("verify", _VerifyOptions), ("report", _ReportOptions)):
        given = [field.name for field in fields(kind) if field.name in changed(options)]
        if given and options.what != what:
            raise UserError(f"--{given[0].replace('_', '-')} is for {what}, not for {options.what}")
    if options.what == "verify":
        verify(options.log, options.audit_key, options.last_hash, options.lines)
    elif options.what == "report":
        report(options.log, options.by or ("key", "model", "day"), options.since, options.json)
    else:
        digest(options.log, options.audit_key, sys.stdin.read())


def main() -> NoReturn:
    """Run the command and exit with its status."""
    try:
        _run(make_parser().read())
    except HippoError as error:
        print_error(str(error))
        sys.exit(error.exit_code)
    sys.exit(0)


if __name__ == "__main__":
    main()
