"""Whose turn it is among models: changes, changes that fail, and faults and aborts in the middle of them."""

from __future__ import annotations

import asyncio

import pytest

from hippo_mpi.errors import UserError
from hippo_mpi.serving.supervision.request_broker import RequestBroker
from tests.unit import fake_link
from tests.unit.fake_link import HANG_S, FakeRanks, numbers_of, ready_ranks, run
from tests.unit.test_front import MAX_FAILURES, ask, lose


def test_a_model_comes_when_the_answers_of_the_other_are_complete() -> None:
    async def work() -> None:
        front = RequestBroker(10, "m")
        ranks = await ready_ranks(front)
        begun = ask(front)
        other = ask(front, "n")
        late = ask(front)
        assert ranks.added == numbers_of([begun]) and not front.turn_is_over.is_set()
        assert front.state == "ready; n is next, after 1 answer of m"
        await ranks.say(fake_link.output(0, 7, "", "stop"))
        assert front.turn_is_over.is_set() and front.state == "ready; n is next"
        assert front.take_turn() and front.model == "n" and ranks.is_closed and not front.is_ready
        assert front.why_waiting("m").endswith("m is next")
        await ranks.end()
        ranks = await ready_ranks(front)
        assert ranks.added == numbers_of([other]) and not front.turn_is_over.is_set()
        await ranks.say(fake_link.output(1, 7, "", "stop"))
        assert front.take_turn() and front.model == "m"
        await ranks.end()
        ranks = await ready_ranks(front)
        assert ranks.added == numbers_of([late])
        await ranks.say(fake_link.output(2, 7, "", "stop"))
        assert front.num_requests == 0 and not front.turn_is_over.is_set() and front.state == "ready"
        await ranks.end()

    run(work())


@pytest.mark.parametrize("has_begun", [True, False])
def test_who_asked_for_another_model_goes_away(has_begun: bool) -> None:
    """Then the present one's answers go on at once, also if its turn was over already."""

    async def work() -> None:
        front = RequestBroker(10, "m")
        ranks = await ready_ranks(front)
        begun = [ask(front)] if has_begun else []
        other = ask(front, "n")
        late = ask(front)
        assert front.turn_is_over.is_set() is not has_begun
        front.abort(other)
        assert not front.take_turn() and front.model == "m"
        assert ranks.added == numbers_of([*begun, late]) and not front.turn_is_over.is_set()
        await ranks.end()

    run(work())


def test_load() -> None:
    async def work() -> None:
        front = RequestBroker(10, "m")
        ranks = await ready_ranks(front)
        await front.load("m")
        ask(front)
        loads = [asyncio.ensure_future(front.load("n")) for _ in range(2)]
        gone = asyncio.ensure_future(front.load("o"))
        await asyncio.sleep(0)
        gone.cancel()
        assert not front.turn_is_over.is_set() and front.state == "ready; n is next, after 1 answer of m"
        await ranks.say(fake_link.output(0, 7, "", "stop"))
        assert front.take_turn() and front.model == "n"
        await ranks.end()
        ranks = await ready_ranks(front)
        await asyncio.gather(*loads)
        assert not front.turn_is_over.is_set(), "nobody waits for o any more"
        await ranks.end()

    run(work())


def test_a_load_that_is_cancelled_before_its_turn_changes_nothing() -> None:
    async def work() -> None:
        front = RequestBroker(10, "m")
        ranks = await ready_ranks(front)
        loaded = asyncio.ensure_future(front.load("n"))
        await asyncio.sleep(0)
        late = ask(front)
        loaded.cancel()
        await asyncio.wait({loaded})
        is_taken = front.take_turn()
        await ranks.end()
        assert not is_taken and ranks.added == numbers_of([late])

    run(work())


def test_a_model_that_is_refused_is_given_up() -> None:
    """Whoever waits for it hears why; the model before comes back, and the other may be tried again."""

    async def work() -> None:
        front, ends = RequestBroker(10, "m"), list[str]()
        front.on_early_end = ends.append
        assert not front.give_up_model("nothing was before it")
        ranks = await ready_ranks(front)
        assert not front.give_up_model("it is loaded")
        begun, other = ask(front), ask(front, "n")
        loaded = asyncio.ensure_future(front.load("n"))
        late = ask(front)
        await ranks.say(fake_link.output(0, 7, "", "stop"))
        assert begun.outcome == "stop" and front.take_turn()
        await ranks.end()
        assert front.give_up_model("it is a fox")
        assert front.model == "m" and other.outcome == "error: the model 'n' can't be loaded: it is a fox"
        with pytest.raises(UserError, match="it is a fox"):
            await asyncio.wait_for(loaded, HANG_S)
        assert not front.give_up_model("there is none to return to")
        assert ends == ["error"] and front.state.startswith("loading m")
        ranks = await ready_ranks(front)
        assert ranks.added == numbers_of([late])
        ask(front, "n")
        await ranks.say(fake_link.output(late.request.id, 7, "", "stop"))
        assert front.take_turn() and front.model == "n"
        await ranks.end()

    run(work())


def test_a_fault_in_the_middle_of_a_change() -> None:
    """While the other model loads, with requests of both waiting; an abort there; then it is loaded after all."""

    async def work() -> None:
        front = RequestBroker(10, "m")
        ranks = await ready_ranks(front)
        begun, other, gone = ask(front), ask(front, "n"), ask(front, "n")
        late = ask(front)
        await ranks.say(fake_link.begun(0), fake_link.output(0, 7, "", "stop"))
        assert begun.outcome == "stop" and front.take_turn()
        await ranks.end()
        loading = FakeRanks(front)
        await loading.say(fake_link.beat())
        front.abort(gone)
        await loading.end()
        lose(front)
        assert front.model == "n" and (other.num_failed_starts, late.num_failed_starts) == (1, 0)
        ranks = await ready_ranks(front)
        assert ranks.added == numbers_of([other]) and other.num_failed_starts == 0
        await ranks.end(fake_link.begun(other.request.id))
        lose(front)
        assert front.model == "n" and other.num_failures == 1, "its answer isn't complete"
        assert not front.give_up_model("it was loaded in this turn")
        ranks = await ready_ranks(front)
        await ranks.say(fake_link.output(other.request.id, 7, "", "stop"))
        assert front.take_turn() and front.model == "m"
        await ranks.end()

    run(work())


def test_a_fault_when_a_change_is_due() -> None:
    """The ranks die between the last answer and the change: there is nothing to go on with, so it is made."""

    async def work() -> None:
        front = RequestBroker(10, "m")
        ranks = await ready_ranks(front)
        begun, other = ask(front), ask(front, "n")
        await ranks.end(fake_link.output(begun.request.id, 7, "", "stop"))
        assert front.turn_is_over.is_set()
        lose(front)
        assert front.model == "n" and not front.turn_is_over.is_set()
        ranks = await ready_ranks(front)
        assert ranks.added == numbers_of([other])
        await ranks.end()

    run(work())


def test_a_fault_before_a_change_is_due() -> None:
    """Answers that had begun come first, with the next ranks; those that hadn't wait for their model's next turn."""

    async def work() -> None:
        front = RequestBroker(10, "m")
        ranks = await ready_ranks(front)
        begun, other = ask(front), ask(front, "n")
        await ranks.end(fake_link.begun(0) + fake_link.output(0, 7))
        lose(front)
        assert front.model == "m"
        ranks = await ready_ranks(front)
        assert ranks.added == numbers_of([begun])
        await ranks.end()
        front.abort(begun)
        lose(front)
        assert front.model == "n" and front.num_requests == 1
        ranks = await ready_ranks(front)
        assert ranks.added == numbers_of([other])
        await ranks.end()

    run(work())


def test_nobody_is_left_when_a_change_fails_for_good() -> None:
    async def work() -> None:
        front = RequestBroker(10, "m")
        ranks = await ready_ranks(front)
        other = ask(front, "n")
        assert front.take_turn()
        await ranks.end()
        for _ in range(MAX_FAILURES + 1):
            assert front.model == "n"
            lose(front)
        assert "3 times in a row" in other.outcome and front.num_requests == 0
        assert front.give_up_model("its ranks failed") and front.model == "m"
        ranks = await ready_ranks(front)
        assert not ranks.told
        await ranks.end()

    run(work())
