"""The state of a server as a table: what `./launch/serve status` prints.

python -m hippo_mpi.serving.server_status URL [--json]
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

from hippo_mpi.cluster.top.server_answers import fetch_status
from hippo_mpi.config.parser import OptionsParser, option
from hippo_mpi.config.serve_options import API_KEYS
from hippo_mpi.errors import UserError, print_error
from hippo_mpi.serving.addresses import TRUST_HINT, is_untrusted, url_to_ask
from hippo_mpi.serving.page.cluster_view import COLUMNS, ClusterView

_LOOK_INTERVAL_S = 1.2  # longer than the second after which rank 0 reports anew how busy the ranks are


@dataclass(frozen=True, kw_only=True)
class StatusOptions:
    """All options of ./launch/serve status."""

    url: str = option("", f"of the server; its key from {API_KEYS}", "url")
    json: bool = option(False, "print the server's answer as JSON")


def report(status: dict[str, Any], url: str, rows: list[list[str]]) -> str:
    """Return the status of a server as text.

    Args:
        status: the body of GET /ready.
        url: to show as the server's.
        rows: a row per rank, in the order of COLUMNS.
    """
    requests = f"{status['running']:,} running, {status['waiting']:,} waiting"
    pairs = {
        "state": status["state"],
        "URL": url,
        "model": status.get("model", "unknown"),
        "uptime": str(timedelta(seconds=status["uptime_s"])),
        "requests": requests,
        "restarts": f"{status['restarts']:,}",
        "no answer": ", ".join(status.get("silent_hosts", [])),
    }
    lines = [f"{name:<9} {value}" for name, value in pairs.items() if value]
    return "\n".join([*lines, "", *(_table(rows) if rows else [_why_no_ranks(status)])])


def _why_no_ranks(status: dict[str, Any]) -> str:
    if status["ready"] and "ranks" not in status:
        return f"Set {API_KEYS} to a key of the server to see its ranks."
    return "No ranks are ready."


def _table(rows: list[list[str]]) -> list[str]:
    columns = list(zip(COLUMNS, *rows, strict=True))
    widths = [max(len(cell) for cell in column) for column in columns]
    return ["  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in (COLUMNS, *rows)]


def show(argv: list[str]) -> None:
    """Print the status of a server.

    Raises:
        UserError: it doesn't answer.
    """
    description = (__doc__ or "").splitlines()[0]
    options = OptionsParser(StatusOptions, prog="./launch/serve status", description=description).read(argv)
    if not options.url:
        raise UserError("it isn't listening yet: see ./launch/serve logs")
    url = url_to_ask(options.url)
    try:
        status = fetch_status(url)
        if options.json:
            print(json.dumps(status))
            return
        view = ClusterView(lambda: fetch_status(url))
        view.look()
        if view.rows:
            time.sleep(_LOOK_INTERVAL_S)
            view.look()
    except (OSError, ValueError) as error:
        advice = f" ({TRUST_HINT})" if is_untrusted(error) else ""
        raise UserError(f"{options.url} doesn't answer: {error}{advice}") from None
    print(report(status, options.url, view.rows))


def main() -> NoReturn:
    """Run the command and exit with its status."""
    try:
        show(sys.argv[1:])
    except UserError as error:
        print_error(str(error))
        sys.exit(error.exit_code)
    sys.exit(0)


if __name__ == "__main__":
    main()
