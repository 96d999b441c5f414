"""hippo_mpi.audit: check the chain of an audit log that hippo_mpi.serve has written.

hippo_mpi.audit verify audit.jsonl
hippo_mpi.audit verify audit.jsonl --lines 7 --last-hash 5f0c...     # as printed before: is the end still there?
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import NoReturn

from hippo_mpi import config
from hippo_mpi.errors import HippoError, UserError, print_error
from hippo_mpi.serving.api.audit_log import files_of, read_chain


def make_parser() -> config.Parser:
    parser = config.Parser(prog="hippo_mpi.audit", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("verify",), help="verify: find lines that were changed, dropped or moved")
    parser.add_argument("log", type=Path, help="the log; older files beside it (LOG.1, LOG.2 ...) belong to it")
    parser.add_argument(
        "--last-hash", type=_sha256, help="of the last line when it was noted: finds lines dropped since"
    )
    parser.add_argument("--lines", type=config.whole, help="how many there were then; later ones are no mistake")
    return parser


def _sha256(text: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{64}", text.lower()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a hash of 64 hexadecimal digits")
    return text.lower()


def verify(log: Path, last_hash: str | None, num_lines: int | None) -> None:
    """Print that a log is whole, and the options with which a later call finds out whether it still is.

    Args:
        last_hash, num_lines: what was noted of it before; None: not noted.

    Raises:
        UserError: it isn't; all mistakes, a line each.
    """
    files = files_of(log)
    if not files:
        raise UserError(f"there is no audit log {log}")
    chain = read_chain(files, last_hash, num_lines)
    if chain.mistakes:
        raise UserError("\nerror: ".join(chain.mistakes))
    print(f"whole: {chain.num_lines:,} line{'s' * (chain.num_lines != 1)} in {len(files)} file{'s' * (len(files) > 1)}")
    print(f"--lines {chain.num_lines} --last-hash {chain.last_hash}")


def main() -> NoReturn:
    try:
        arguments = make_parser().parse_args()
        verify(arguments.log, arguments.last_hash, arguments.lines)
    except HippoError as error:
        print_error(str(error))
        sys.exit(error.exit_code)
    sys.exit(0)


if __name__ == "__main__":
    main()
