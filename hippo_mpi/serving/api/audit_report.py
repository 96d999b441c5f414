"""Sums over an audit log: requests, tokens and errors, by key, model and day."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hippo_mpi.serving.api.audit_chain import lines_of

GROUPS = ("key", "model", "endpoint", "day", "month")


@dataclass
class Sums:
    """The sums of a group of requests."""

    requests: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    errors: int = 0  # requests of which an answer ended with an error
    aborted: int = 0  # requests of which an answer was aborted by the client

    def take(self, record: dict[str, Any]) -> None:
        """Add a request's record."""
        outcomes = [str(choice["outcome"]) for choice in record["choices"]]
        self.requests += 1
        self.prompt_tokens += record["prompt_tokens"]
        self.answer_tokens += sum(choice["tokens"] for choice in record["choices"])
        self.errors += any(outcome.startswith("error") for outcome in outcomes)
        self.aborted += "abort" in outcomes


@dataclass
class Report:
    """Sums by group, and what they don't include.

    Args:
        by: the names of GROUPS that make up a group, in the order of the keys of `groups`.
        groups: the sums.
        num_lost: requests that couldn't be written to the log.
        num_unreadable: lines that couldn't be read.
    """

    by: tuple[str, ...]
    groups: dict[tuple[str, ...], Sums] = field(default_factory=dict)
    num_lost: int = 0
    num_unreadable: int = 0

    def rows(self) -> list[dict[str, Any]]:
        """Return the groups with their sums, sorted."""
        return [
            {**dict(zip(self.by, group, strict=True)), **asdict(self.groups[group])} for group in sorted(self.groups)
        ]

    def table(self) -> str:
        """Return the groups as a text table, with their total in the last row."""
        total = Sums(
            *(sum(column) for column in zip(*(asdict(one).values() for one in self.groups.values()), strict=True))
        )
        names = [*self.by, *asdict(total)]
        rows = [[str(row[name]) if name in self.by else f"{row[name]:,}" for name in names] for row in self.rows()]
        last = ["all", *[""] * (len(self.by) - 1)][: len(self.by)]
        rows = [[name.replace("_", " ") for name in names], *rows, [*last, *(f"{n:,}" for n in asdict(total).values())]]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        count = len(self.by)
        return "\n".join(
            "  ".join(
                cell.ljust(w) if i < count else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        )


def make_report(files: Sequence[Path], by: Sequence[str], since: datetime | None = None) -> Report:
    """Add up a log's requests.

    Args:
        files: of the log.
        by: names of GROUPS; days and months are in UTC.
        since: requests that ended before aren't counted; None: all are.

    Raises:
        UserError: a file can't be read.
    """
    report = Report(tuple(by))
    for record in _records(files, report):
        when = datetime.fromtimestamp(record["time"], UTC)
        if since is not None and when < since:
            continue
        report.num_lost += record.get("lost", 0)
        if "choices" in record:
            named = {**record, "key": record["key"] or "none", "day": f"{when:%Y-%m-%d}", "month": f"{when:%Y-%m}"}
            report.groups.setdefault(tuple(str(named[name]) for name in by), Sums()).take(record)
    return report


def _records(files: Sequence[Path], report: Report) -> Iterator[dict[str, Any]]:
    for path in files:
        for line in lines_of(path):
            try:
                record = json.loads(line)
                is_record = isinstance(record, dict) and isinstance(record["time"], float | int)
            except (ValueError, KeyError, RecursionError):
                is_record = False
            if is_record:
                yield record
            else:
                report.num_unreadable += 1
