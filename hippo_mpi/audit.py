"""hippo_mpi.audit: check the chain of an audit log that hippo_mpi.serve has written.

hippo_mpi.audit verify audit.jsonl
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NoReturn

from hippo_mpi import config
from hippo_mpi.errors import HippoError, UserError, print_error
from hippo_mpi.serving.api.audit_log import check, files_of


def make_parser() -> config.Parser:
    parser = config.Parser(prog="hippo_mpi.audit", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("verify",), help="verify: find lines that were changed, dropped or moved")
    parser.add_argument("log", type=Path, help="the log; older files beside it (LOG.1, LOG.2 ...) belong to it")
    return parser


def verify(log: Path) -> None:
    """Print that a log is whole.

    Raises:
        UserError: it isn't; all mistakes, a line each.
    """
    files = files_of(log)
    if not files:
        raise UserError(f"there is no audit log {log}")
    mistakes, last = check(files)
    if mistakes:
        raise UserError("\nerror: ".join(mistakes))
    count = sum(path.read_bytes().count(b"\n") for path in files)
    print(f"{count:,} lines in {len(files)} file{'s' * (len(files) > 1)} are whole; the last one's hash is {last}")


def main() -> NoReturn:
    try:
        verify(make_parser().parse_args().log)
    except HippoError as error:
        print_error(str(error))
        sys.exit(error.exit_code)
    sys.exit(0)


if __name__ == "__main__":
    main()
