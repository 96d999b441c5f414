"""Requests on their way into the front and the journal: whole, or not at all."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hippo_mpi.engine.messages import OutputMessage
from hippo_mpi.engine.request import Request, SamplingParams
from hippo_mpi.errors import RankError
from hippo_mpi.serving.api.exchange import Exchange
from hippo_mpi.serving.api.exchanges import Exchanges, Keeping
from hippo_mpi.serving.api.journal import Journal
from hippo_mpi.serving.api.journal_records import Line, Record
from hippo_mpi.serving.supervision.answer import Overloaded
from hippo_mpi.serving.supervision.request_broker import RequestBroker

SAMPLING = SamplingParams(seed=1)


def record(num_choices: int = 1, **fields: Any) -> Record:
    requests = [Request(index, [1, 2], SAMPLING) for index in range(num_choices)]
    found = Record("cmpl-1", "", None, "/v1/completions", "m", 0, {}, requests, True, False, False)
    return replace(found, **fields)


def run(work: Callable[[RequestBroker, Journal, Exchanges], Coroutine[Any, Any, None]], path: Path) -> list[Exchange]:
    """Run with a front whose ranks never come; returns the exchanges that have ended."""
    over: list[Exchange] = []

    async def main() -> None:
        front, journal = RequestBroker(4, "m"), Journal(path)
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

    async def work(front: RequestBroker, _: Journal, exchanges: Exchanges) -> None:
        with pytest.raises(RecursionError):
            await exchanges.open(record(body={"metadata": deep}), lambda number: None)
        assert front.num_requests == 0

    run(work, tmp_path / "journal")


def test_what_is_refused_in_part_is_refused(tmp_path: Path) -> None:
    async def work(front: RequestBroker, _: Journal, exchanges: Exchanges) -> None:
        with pytest.raises(Overloaded):
            await exchanges.open(record(5), lambda number: None)
        assert front.num_requests == 0 and await exchanges.find("cmpl-1", "") is None

    run(work, tmp_path / "journal")


def test_a_request_that_ends_before_its_client_has_an_id_is_forgotten(tmp_path: Path) -> None:
    async def work(front: RequestBroker, journal: Journal, exchanges: Exchanges) -> None:
        opening = asyncio.ensure_future(exchanges.open(record(3), lambda number: None))
        await asyncio.sleep(0)
        assert front.num_requests == 3
        opening.cancel()
        await asyncio.wait([opening])
        assert opening.cancelled() and front.num_requests == 0
        assert await exchanges.find("cmpl-1", "") is None

    async def look(front: RequestBroker, *_: Any) -> None:
        assert front.num_requests == 0

    run(work, tmp_path / "journal")
    run(look, tmp_path / "journal")


def output(index: int, token: int | None, finish: str | None = None) -> OutputMessage:
    return OutputMessage(index, "a", token, 0, 0, 0, None, finish, None)


def test_what_has_been_told_of_each_answer() -> None:
    """Before this server and in it; an error ends those that haven't ended, whichever it came for."""
    before: list[Line] = [(1, output(1, 5)), (0, output(0, 6)), (1, output(1, None, "stop"))]
    ended = list[Exchange]()
    found = Exchange(record(3), None, ended.append, before)
    assert found.running == [0, 2]
    found.tell(0, output(0, 7))
    found.tell(2, RankError("gone"))
    found.tell(0, output(0, 8))
    assert ended == [found] and not found.running
    assert [[told.token for told in found.outputs_of(index)] for index in range(3)] == [[6, 7], [5, None], []]
    assert [found.outcome_of(index) for index in range(3)] == ["error: gone", "stop", "error: gone"]
    assert found.num_tokens == 3 * 2 + 3
    assert len(found.lines_so_far()) == 5


def test_telling_of_an_answer_costs_no_look_at_the_others() -> None:
    """Or writing down a request with many would hold up everything."""
    found = Exchange(record(4), None, lambda exchange: None)
    for index in (0, 1, 2, 3):
        found.tell(index, output(index, 5))
    assert found.outputs_of(2) is found.outputs_of(2)
