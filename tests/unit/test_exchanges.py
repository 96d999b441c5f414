"""Requests on their way into the front and the journal: whole, or not at all."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hippo_mpi.engine.request import Request, SamplingParams
from hippo_mpi.serving.api.exchange import Exchange
from hippo_mpi.serving.api.exchanges import Exchanges, Keeping
from hippo_mpi.serving.api.journal import Journal
from hippo_mpi.serving.api.journal_records import Record
from hippo_mpi.serving.supervision.front import Front, Overloaded

SAMPLING = SamplingParams(seed=1)


def record(num_choices: int = 1, **fields: Any) -> Record:
    requests = [Request(index, [1, 2], SAMPLING) for index in range(num_choices)]
    found = Record("cmpl-1", "", None, "/v1/completions", "m", 0, {}, requests, True, False, False)
    return replace(found, **fields)


def run(work: Callable[[Front, Journal, Exchanges], Coroutine[Any, Any, None]], path: Path) -> list[Exchange]:
    """Run with a front whose ranks never come; returns the exchanges that have ended."""
    over: list[Exchange] = []

    async def main() -> None:
        front, journal = Front(4, "m"), Journal(path)
        exchanges = Exchanges(front, journal, Keeping(60, 0), over.append)
        exchanges.start(["m"])
        try:
            await asyncio.wait_for(work(front, journal, exchanges), 20)
        finally:
            exchanges.close()

    asyncio.run(main())
    return over


def test_a_record_that_cannot_be_written_leaves_no_answers_at_work(tmp_path: Path) -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]

    async def work(front: Front, _: Journal, exchanges: Exchanges) -> None:
        with pytest.raises(RecursionError):
            await exchanges.open(record(body={"metadata": deep}), lambda number: None)
        assert front.num_requests == 0

    run(work, tmp_path / "journal")


def test_what_is_refused_in_part_is_refused(tmp_path: Path) -> None:
    async def work(front: Front, _: Journal, exchanges: Exchanges) -> None:
        with pytest.raises(Overloaded):
            await exchanges.open(record(5), lambda number: None)
        assert front.num_requests == 0 and await exchanges.find("cmpl-1", "") is None

    run(work, tmp_path / "journal")


def test_a_request_that_ends_before_its_client_has_an_id_is_forgotten(tmp_path: Path) -> None:
    async def work(front: Front, journal: Journal, exchanges: Exchanges) -> None:
        opening = asyncio.ensure_future(exchanges.open(record(3), lambda number: None))
        await asyncio.sleep(0)
        assert front.num_requests == 3
        opening.cancel()
        await asyncio.wait([opening])
        assert opening.cancelled() and front.num_requests == 0
        assert await exchanges.find("cmpl-1", "") is None

    async def look(front: Front, *_: Any) -> None:
        assert front.num_requests == 0

    run(work, tmp_path / "journal")
    run(look, tmp_path / "journal")
