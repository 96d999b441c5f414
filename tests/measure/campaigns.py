"""Campaigns against servers and runs, for tests/measure/serving.py: each takes from minutes to hours."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from tests.histories.campaign import run_campaign
from tests.measure.hostile import measure_hostile
from tests.measure.moments import WAYS, measure_moments
from tests.measure.soak import measure_soak
from tests.measure.starter import measure_starter

CAMPAIGNS: dict[str, Callable[[argparse.Namespace], object]] = {
    "histories": lambda given: run_campaign(given.count or 200, given.seed, given.minutes),
    "moments": lambda given: measure_moments(given.count or 50, given.seed, given.ways),
    "hostile": lambda given: measure_hostile(given.count or 10_000, given.seed),
    "starter": lambda given: measure_starter(given.count or 20, given.seed),
    "soak": lambda given: measure_soak(given.minutes or 30, given.seed, given.fault_every),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=1, help="of a campaign; of its first history (default: 1)")
    parser.add_argument("--minutes", type=float, help="of soak (30); after which no history begins any more")
    parser.add_argument("--fault-every", type=float, default=60, help="seconds between faults of soak; 0: none (60)")
    parser.add_argument("--ways", action="append", choices=WAYS, help="of moments, may be given several times; all")
