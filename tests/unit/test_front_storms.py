"""Random arrivals, aborts, refusals, model changes and failures under a front: each answer gets each token once, in
order, and ends once; and nothing is left."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hippo_mpi.engine.request import Request
from hippo_mpi.errors import RankError, UserError
from hippo_mpi.serving.supervision.answer import Overloaded
from hippo_mpi.serving.supervision.request_broker import RequestBroker
from tests.unit import fake_link
from tests.unit.fake_link import Client, FakeRanks

MAX_FAILURES, MAX_REQUESTS, MAX_STEPS = 2, 8, 400
MODELS = st.sampled_from(["m", "n", "o"])


class FrontStorm(RuleBasedStateMachine):
    """What clients and ranks do, and between them what the supervisor does."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.front = RequestBroker(MAX_REQUESTS, "m")
        self.clients: list[Client] = []
        self.loads: list[asyncio.Future[None]] = []
        self.ranks: FakeRanks | None = None
        self.rows: dict[int, tuple[Request, int]] = {}  # with the next token of each
        self.num_told = self.failures = 0

    def wait(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(work)

    def say(self, *lines: bytes) -> None:
        assert self.ranks is not None
        self.wait(self.ranks.say(*lines))
        self.supervise()

    def supervise(self) -> None:
        """Let another model have its turn, and the ranks hear what they were told."""
        if self.ranks is None:
            return
        if self.front.turn_is_over.is_set() and self.front.take_turn():
            self.end_ranks()
            self.failures = 0
            return
        for one in self.ranks.told[self.num_told :]:
            if isinstance(one, Request):
                assert one.id not in self.rows, "it was told of a request twice"
                self.rows[one.id] = one, len(one.resume.tokens) if one.resume else 0
            else:
                self.rows.pop(one, None)
        self.num_told = len(self.ranks.told)

    def end_ranks(self, last: bytes = b"") -> None:
        assert self.ranks is not None
        self.wait(self.ranks.end(last))
        self.ranks, self.num_told = None, 0
        self.rows.clear()

    @rule(model=MODELS, num_tokens=st.integers(1, 4))
    def ask(self, model: str, num_tokens: int) -> None:
        if self.front.num_requests == MAX_REQUESTS:
            with pytest.raises(Overloaded):
                Client(self.front, model, num_tokens)
        else:
            self.clients.append(Client(self.front, model, num_tokens))
        self.supervise()

    @precondition(lambda self: self.clients)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        client = data.draw(st.sampled_from(self.clients[-6:]))
        client.leave()
        self.supervise()
        if self.ranks is not None and self.front.was_ready:  # they begin it before they hear of that
            self.say(fake_link.begun(client.answer.request.id))

    @rule(model=MODELS, stays=st.booleans())
    def load(self, model: str, stays: bool) -> None:
        self.loads.append(self.loop.create_task(self.front.load(model)))
        self.wait(asyncio.sleep(0))
        if not stays:
            self.loads[-1].cancel()
        self.wait(asyncio.sleep(0))
        self.supervise()

    @precondition(lambda self: self.ranks is None)
    @rule(is_ready=st.booleans())
    def start(self, is_ready: bool = True) -> None:
        self.front.has_progressed = False

        async def begin() -> FakeRanks:
            return FakeRanks(self.front)

        self.ranks = self.wait(begin())
        self.say(*([fake_link.ready()] if is_ready else [fake_link.beat()]))

    @precondition(lambda self: self.ranks is not None)
    @rule(count=st.integers(1, 4))
    def step(self, count: int) -> None:
        """A step of some rows, after some words about them."""
        if not self.front.was_ready:
            self.say(fake_link.ready())
        for number, (_, token) in list(self.rows.items())[:count]:
            if self.ranks is None or number not in self.rows:
                continue  # it was another model's turn
            self.say(fake_link.taking(number), fake_link.taking(None), fake_link.begun(number))
            is_last = token + 1 == self.rows[number][0].prompt[0]
            self.rows[number] = self.rows[number][0], token + 1
            if is_last:
                del self.rows[number]
            self.say(fake_link.output(number, token, "x", "length" if is_last else None))

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def refuse(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.rows)))
        del self.rows[number]
        self.say(fake_link.taking(number), fake_link.refused(number, UserError("no")), fake_link.taking(None))

    @precondition(lambda self: self.ranks is not None)
    @rule(last=st.sampled_from(["nothing", "half a line", "taking", "begun", "invalid"]), is_refused=st.booleans())
    def fail(self, last: str, is_refused: bool) -> None:
        """They end; if they weren't ready, perhaps with a status that says that the model can't be loaded."""
        words = {
            "nothing": b"",
            "half a line": fake_link.beat()[:9],
            "taking": fake_link.taking(next(iter(self.rows), None)),
            "begun": fake_link.begun(*self.rows),
            "invalid": b"fox\n",
        }
        was_ready = self.front.was_ready
        self.end_ranks(words[last])
        self.failures = 1 if self.front.has_progressed else self.failures + 1
        is_refused = is_refused and not was_ready and self.front.num_starts > 0
        if (is_refused or self.failures > MAX_FAILURES) and self.front.give_up_model("no such file"):
            self.failures = 0
        else:
            self.front.lose_ranks("no reason", MAX_FAILURES)
            self.front.take_turn()

    @invariant()
    def what_the_front_knows_is_so(self) -> None:
        front = self.front
        assert front._begun <= front._answers.keys() and front._at_work <= front._answers.keys()
        assert all(front._answers[number].model == front.model for number in front._begun)
        assert front._begun == self.rows.keys()
        assert front.num_requests == sum(not client.has_ended for client in self.clients)
        status = front.status()
        assert status["requests"] == front.num_requests == int(str(status["running"])) + int(str(status["waiting"]))

    def teardown(self) -> None:
        for _ in range(MAX_STEPS):
            if not self.front.num_requests and all(loaded.done() for loaded in self.loads):
                break
            if self.ranks is None:
                self.start()
            else:
                self.step(MAX_REQUESTS)
        assert self.front.num_requests == 0 and all(loaded.done() for loaded in self.loads)
        for client in self.clients:
            client.check()
        if self.ranks is not None:
            self.end_ranks()
        front = self.front
        assert not front._answers and not front._begun and not front._at_work and front._writer is None
        for loaded in self.loads:
            if not loaded.cancelled():
                assert loaded.exception() is None or isinstance(loaded.exception(), UserError | RankError)
        assert not asyncio.all_tasks(self.loop)
        self.loop.close()


TestFrontStorm = FrontStorm.TestCase
TestFrontStorm.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)
