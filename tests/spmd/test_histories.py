"""A random history of faults; `python tests/measure/serving.py histories` runs as many as one likes."""

from __future__ import annotations

import pytest

from tests.histories.driver import Driver
from tests.histories.history import draw_history
from tests.histories.stage import SIGNALS, stage

SEED = 133  # with a fault during the recovery from another, and streams of all four APIs


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_every_stream_is_as_in_peace() -> None:
    with stage() as found:
        outcome = Driver(found).run(draw_history(SEED, num_streams=6, kinds=list(SIGNALS)))
        assert outcome.is_good, f"{outcome}\n{found.running.running.err}"
