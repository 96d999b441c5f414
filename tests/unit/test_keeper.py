"""The process beside a rank, without a starter."""

from __future__ import annotations

import subprocess
import sys
import time

_IMPATIENT = "from hippo_mpi.cluster.starting import keeper; keeper._ERRAND_S = 0.3; keeper.main()"


def test_it_ends_if_nobody_says_what_to_run() -> None:
    """As when the starter's machine is gone: then its lifeline doesn't end."""
    for said in (b"", b'{"words": ['):
        began_s = time.monotonic()
        with subprocess.Popen([sys.executable, "-c", _IMPATIENT], stdin=subprocess.PIPE) as keeper:
            assert keeper.stdin is not None
            try:
                keeper.stdin.write(said)
                keeper.stdin.flush()
                assert keeper.wait(20) == 1
            finally:
                keeper.kill()
        assert time.monotonic() - began_s >= 0.3
