"""Every message and every change of state of the front: ranks that come, go and change models under its requests."""

from __future__ import annotations

import asyncio
import time

import pytest

from hippo_mpi.engine.messages import OutputMessage
from hippo_mpi.engine.request import Request, Resume, SamplingParams
from hippo_mpi.errors import ContextError, FieldError, ForeignError, HippoError, RankError, UserError
from hippo_mpi.serving.supervision.answer import Answer, Overloaded, ServerEnding, Told
from hippo_mpi.serving.supervision.request_broker import RequestBroker
from tests.unit import fake_link
from tests.unit.fake_link import HANG_S, FakeRanks, numbers_of, ready_ranks, run

MAX_FAILURES = 2
GREEDY = SamplingParams(max_tokens=9, seed=1)


def ask(front: RequestBroker, model: str = "m", told: list[Told] | None = None) -> Answer:
    return front.submit([1, 2], GREEDY, model, (lambda _: None) if told is None else told.append)


def lose(front: RequestBroker) -> None:
    """As the supervisor does."""
    front.lose_ranks("the test says so", MAX_FAILURES)
    front.take_turn()


def test_requests_wait_for_ranks_that_are_ready() -> None:
    async def work() -> None:
        front = RequestBroker(10, "m")
        early, other = ask(front), ask(front, "n")
        ranks = FakeRanks(front)
        assert not front.is_ready and front.state.startswith("loading m")
        await ranks.say(fake_link.beat())
        assert not ranks.told and not front.is_ready
        await ranks.say(fake_link.ready())
        assert front.is_ready and front.was_ready and front.num_starts == 1
        assert ranks.told == [early.request] and front.about is not None
        late = ask(front)  # n comes first: it has waited
        assert ranks.added == [0] and front.why_waiting("n") == "n is next, after 1 answer of m"
        front.abort(other)
        assert ranks.added == [0, 2]
        assert front.state == "ready" and front.why_waiting("m") == ""
        front.abort(early), front.abort(late)
        assert await ranks.end() == "lost the connection to rank 0"
        assert not front.is_ready and ranks.is_closed and front.state.startswith("the ranks have ended")

    run(work())


def test_outputs_come_to_whom_they_belong() -> None:
    async def work() -> None:
        front, told, counted = RequestBroker(10, "m"), list[Told](), list[tuple[int, float]]()
        front.on_output = lambda output, before_s: counted.append((output.request_id, before_s))
        ranks = await ready_ranks(front)
        first, second = ask(front, told=told), ask(front)
        await ranks.say(fake_link.output(0, 7, "a", state=5), fake_link.output(99, 7), fake_link.output(0, 8, "bc"))
        assert first.timings.token_ids == [7, 8] and first.emitted_chars == 3 and second.timings.token_ids == []
        assert [one.text for one in told if isinstance(one, OutputMessage)] == ["a", "bc"]
        assert counted[0] == (0, 0.0) and counted[1][0] == 0 and counted[1][1] > 0 and front.has_progressed
        await ranks.say(
            fake_link.output(0, 9, "", "stop"), fake_link.output(0, 10), fake_link.output(1, 3, "", "length")
        )
        assert (first.outcome, second.outcome) == ("stop", "length") and first.timings.token_ids == [7, 8, 9]
        assert front.num_requests == 0 and len(told) == 3
        front.abort(first)
        assert not ranks.aborted
        await ranks.end()

    run(work())


@pytest.mark.parametrize(
    "error", [UserError("a"), FieldError("tools", "b"), ContextError(9, 8), RankError("c"), ForeignError("d")]
)
def test_a_refusal_ends_one(error: HippoError) -> None:
    async def work() -> None:
        front, told, ends = RequestBroker(10, "m"), list[Told](), list[str]()
        front.on_early_end = ends.append
        ranks = await ready_ranks(front)
        ask(front, told=told), ask(front)
        await ranks.say(fake_link.taking(0), fake_link.refused(0, error), fake_link.taking(None))
        await ranks.say(fake_link.refused(0, error), fake_link.refused(77, error))
        assert [(type(one), str(one)) for one in told] == [(type(error), str(error))]
        assert front.num_requests == 1 and ends == ["error"]
        await ranks.end()

    run(work())


def test_abort_at_every_moment() -> None:
    async def work() -> None:
        front, ends = RequestBroker(10, "m"), list[str]()
        front.on_early_end = ends.append
        answers = [ask(front) for _ in range(5)]
        front.abort(answers[0])  # before there are ranks
        ranks = await ready_ranks(front)
        assert ranks.added == [1, 2, 3, 4]
        await ranks.say(fake_link.taking(1))
        front.abort(answers[1])  # while it is read
        await ranks.say(fake_link.taking(None), fake_link.begun(1, 2))
        front.abort(answers[2])  # before its first token
        await ranks.say(fake_link.output(2, None, "", "abort"), fake_link.output(3, 5))
        front.abort(answers[3])  # behind one
        front.abort(answers[3])
        await ranks.say(fake_link.output(3, 6), fake_link.output(3, None, "", "abort"))
        assert ranks.aborted == [1, 2, 3] and answers[3].timings.token_ids == [5]
        await ranks.end()
        front.abort(answers[4])  # while there are none
        lose(front)
        assert front.num_requests == 0 and ends == ["abort"] * 5
        again = await ready_ranks(front)
        assert not again.told
        await again.end()

    run(work())


def test_no_more_than_may_wait() -> None:
    async def work() -> None:
        front = RequestBroker(2, "m")
        answers = [ask(front), ask(front, "n")]
        with pytest.raises(Overloaded, match="2 requests are already running or waiting"):
            ask(front)
        front.abort(answers[1])
        ask(front)
        ranks = await ready_ranks(front)
        front.abort(answers[0])
        for wrong in ([], [fake_link.VOCAB_SIZE], [1] * fake_link.MAX_CONTEXT):
            with pytest.raises(UserError):
                front.submit(wrong, GREEDY, "m")
        assert front.submit([1], SamplingParams(), "m").request.sampling.seed is not None
        assert front.num_requests == 2
        await ranks.end()

    run(work())


def test_status_and_beats() -> None:
    async def work() -> None:
        front = RequestBroker(10, "m")
        ranks = await ready_ranks(front)
        ask(front), ask(front)
        assert front.status()["waiting"] == 0 and front.why_stuck == ""
        await ranks.say(fake_link.beat(waiting=1))
        assert front.status() | {"beat_s": 0} == {
            "ready": True, "state": "ready", "uptime_s": 0, "requests": 2, "running": 1, "waiting": 1, "restarts": 0,
            "beat_s": 0,
        }  # fmt: skip
        await ranks.say(fake_link.beat(stalled_s=9.0))
        assert front.state == front.why_stuck == "no rank has made progress for 9 s" and not front.status()["ready"]
        await ranks.say(fake_link.beat())
        front.beat._noted_s -= 6
        assert front.why_stuck == "no heartbeat from rank 0 for 6 s"
        await ranks.end()
        assert front.beat.ranks == [] and front.beat.at_s == 0 and front.why_stuck == "" and not front.status()["ready"]

    run(work())


def test_how_ranks_end() -> None:
    async def work() -> None:
        for last, why in (
            (b"", "lost the connection to rank 0"),
            (fake_link.beat()[:-3], "lost the connection to rank 0"),
            (b"fox\n", "lost the connection to rank 0: "),
            (b"\xff\xfe\n", "lost the connection to rank 0: "),
            (b"{" * 200, "lost the connection to rank 0: Separator is not found, and chunk exceed the limit"),
        ):
            ranks = FakeRanks(RequestBroker(10, "m"), limit=100)
            assert (await ranks.end(last)).startswith(why)
            assert ranks.is_closed
        ranks = FakeRanks(RequestBroker(10, "m"))
        assert await ranks.fail(ConnectionResetError("reset")) == "lost the connection to rank 0: reset"
        ranks = FakeRanks(RequestBroker(10, "m"), silence_s=0.05)
        assert await ranks.await_end() == "no message from rank 0 for 0 s"

    run(work())


def test_it_ends_when_it_is_cancelled() -> None:
    """Also in the moment at which ranks say something."""

    async def work() -> None:
        deaf = []
        for moment in range(8):
            ranks = FakeRanks(RequestBroker(10, "m"))
            await ranks.say(fake_link.beat())
            await ranks.be_cancelled(moment, fake_link.beat())
            deaf += [] if ranks.has_ended else [moment]
            await ranks.end()
        assert not deaf

    run(work())


@pytest.mark.parametrize(
    "line",
    [
        b"5",
        b"null",
        b"{}",
        b'{"type": "fox"}',
        b'{"type": "output"}',
        b'{"type": "begun", "request_ids": 3}',
        b'{"type": "ready"}',
    ],
)
def test_what_is_no_message_is_an_end(line: bytes) -> None:
    async def work() -> None:
        ranks = FakeRanks(RequestBroker(10, "m"))
        assert (await ranks.end(line + b"\n")).startswith("lost the connection to rank 0: ")

    run(work())


def test_an_answer_goes_on_with_the_next_ranks() -> None:
    """From its last token; not one that was aborted or is complete. A token in between clears all of suspicion."""

    async def work() -> None:
        front = RequestBroker(10, "m")
        ranks = await ready_ranks(front)
        goes_on, waits, _, gone = (ask(front) for _ in range(4))
        told = [fake_link.output(0, 7, "ab", state=3), fake_link.output(2, 1, "", "stop"), fake_link.begun(0, 1, 2, 3)]
        await ranks.say(*told)
        front.abort(gone)
        await ranks.end(fake_link.output(0, 8, "c", state=4))
        lose(front)
        assert front.state.startswith("restarting the ranks: the test says so")
        assert (goes_on.num_failures, waits.num_failures) == (1, 1)
        again = await ready_ranks(front)
        first, second = again.told
        assert isinstance(first, Request) and first.resume == Resume([7, 8], 3, [4]) and second == waits.request
        assert front.num_starts == 2
        await again.say(fake_link.begun(0), fake_link.output(0, 9))
        assert goes_on.num_failures == 0 and waits.num_failures == 1
        await again.end()

    run(work())


def test_a_fault_in_the_middle_of_the_recovery_of_another() -> None:
    """Before the next ranks are there, while they load, while they take up what they were told, and behind that."""

    async def work() -> None:
        front, told, ends = RequestBroker(10, "m"), list[Told](), list[str]()
        front.on_early_end = ends.append
        ranks = await ready_ranks(front)
        first, waits = ask(front, told=told), ask(front)
        await ranks.end(fake_link.begun(0) + fake_link.output(0, 7))
        lose(front)
        lose(front)  # no process could be started
        loading = FakeRanks(front)
        await loading.end(fake_link.beat())
        lose(front)
        assert (first.num_failures, first.num_failed_starts, waits.num_failed_starts) == (1, 2, 2)
        taking_up = await ready_ranks(front)
        assert first.num_failed_starts == waits.num_failed_starts == 0
        await taking_up.end(fake_link.taking(0))
        lose(front)
        assert first.num_failures == 2 and waits.num_failures == 0
        behind = await ready_ranks(front)
        assert isinstance(behind.told[0], Request) and behind.added == [1, 0]  # a suspect, behind the others
        await behind.end(fake_link.begun(1, 0) + fake_link.taking(None))
        lose(front)
        assert [str(one) for one in told[1:]] == ["the ranks failed 3 times in a row, most recently: the test says so"]
        assert ends == ["error"] and front.num_requests == 1 and waits.num_failures == 1
        front.fail_all(ServerEnding("the end"))
        assert front.num_requests == 0 and waits.outcome == "error: the end"

    run(work())


def test_a_suspect_makes_room_for_the_next_with_its_first_token() -> None:
    async def work() -> None:
        front = RequestBroker(10, "m")
        for _ in range(2):
            ranks = await ready_ranks(front)
            if not front.num_requests:
                ask(front), ask(front)
            await ranks.end(fake_link.begun(0, 1))
            lose(front)
        ranks = await ready_ranks(front)
        assert ranks.added == [0]
        await ranks.say(fake_link.output(0, 7))
        assert ranks.added == [0, 1]
        await ranks.say(fake_link.output(0, 8))
        assert ranks.added == [0, 1]
        await ranks.end()

    run(work())


def test_ranks_that_never_become_ready_end_whoever_waits_for_their_model() -> None:
    async def work() -> None:
        front = RequestBroker(10, "m")
        waits, other = ask(front), ask(front, "n")
        loaded = asyncio.ensure_future(front.load("m"))
        await asyncio.sleep(0)
        for _ in range(MAX_FAILURES):
            lose(front)
        assert front.num_requests == 2 and front.model == "m" and not loaded.done()
        lose(front)
        assert waits.outcome == "error: the ranks failed 3 times in a row, most recently: the test says so"
        assert front.model == "n", "the turn of who still waits"
        with pytest.raises(UserError, match="'m' can't be loaded: its ranks failed 3 times while loading it"):
            await asyncio.wait_for(loaded, HANG_S)
        ranks = await ready_ranks(front)
        assert ranks.added == numbers_of([other])
        await ranks.end()

    run(work())


def test_late_words_of_ranks_that_had_to_go_change_nothing() -> None:
    async def work() -> None:
        front = RequestBroker(10, "m")
        ranks = await ready_ranks(front)
        answer = ask(front)
        front.fail_all(ServerEnding("the end"))
        await ranks.say(fake_link.output(0, 7), fake_link.begun(0), fake_link.refused(0, UserError("late")))
        assert answer.outcome == "error: the end" and answer.timings.token_ids == []
        await ranks.end()
        assert time.monotonic() - front.heard_s < 60 and front.num_requests == 0

    run(work())


def test_an_answer_of_another_front_is_brought_back() -> None:
    async def work() -> None:
        front = RequestBroker(1, "m")
        before = [OutputMessage(5, "ab", 7, random_state=[9])]
        answer = front.bring_back(Request(5, [1, 2], GREEDY), "m", lambda _: None, before)
        ranks = await ready_ranks(front)
        (request,) = ranks.told
        assert isinstance(request, Request) and request.id == answer.request.id == 0
        assert request.resume == Resume([7], 2, [9]) and answer.timings.token_ids == [7]
        await ranks.say(fake_link.output(0, 8, "", "stop"))
        assert answer.timings.token_ids == [7, 8] and answer.outcome == "stop"
        await ranks.end()

    run(work())


def test_what_can_not_be_told_to_the_ranks_leaves_nothing() -> None:
    """It would fail again with every start of theirs, and take a place for ever."""

    async def work() -> None:
        front = RequestBroker(10, "m")
        ranks = await ready_ranks(front)
        with pytest.raises(UnicodeEncodeError):
            front.submit([1], SamplingParams(max_tokens=9, seed=1, stop_words=("\ud800",)), "m", lambda _: None)
        assert front.num_requests == 0
        answer = ask(front)
        assert ranks.told == [answer.request]
        await ranks.end()

    run(work())


def test_a_request_that_waits_with_its_grammar_is_nobody_s_suspect() -> None:
    """Else, in a long queue, each failure of the ranks would count against all that have a grammar."""

    async def work() -> None:
        front = RequestBroker(10, "m")
        ranks = await ready_ranks(front)
        running, waiting, compiling = ask(front), ask(front), ask(front)
        for _ in range(2):
            await ranks.end(fake_link.begun(0) + fake_link.begun(1) + fake_link.begun(2) + fake_link.waiting(1))
            lose(front)
            ranks = await ready_ranks(front)
        assert [one.num_failures for one in (running, waiting, compiling)] == [2, 0, 2]
        assert 1 in ranks.added
        await ranks.end()

    run(work())
