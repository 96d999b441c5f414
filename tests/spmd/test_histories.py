"""A few random histories of faults; `python tests/measure/serving.py histories` runs as many as one likes."""

from __future__ import annotations

import pytest

from tests.histories.driver import Driver
from tests.histories.stage import stage

SEEDS = (1, 5, 9)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_every_stream_is_as_in_peace() -> None:
    with stage() as found:
        driver = Driver(found)
        for seed in SEEDS:
            outcome = driver.run_seed(seed)
            assert outcome.is_good, f"{outcome}\n{found.running.running.err}"
