"""The request broker: every request, and what has been answered of it, so that ranks and models may come and go.

When ranks fail nothing is lost: once new ones are ready, each answer goes on from its last token.
Ranks hold one model at a time. While requests wait for another model, no further requests for the present one begin; when
its last answer has ended, the other model is loaded, for all requests that wait for it by then.
Knows requests and the messages of rank 0. Must not know HTTP or how ranks are started.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import msgspec

from hippo_mpi.engine.messages import OutputMessage
from hippo_mpi.engine.request import Request, RequestOutput, SamplingParams, Timings, check_request
from hippo_mpi.errors import HippoError, RankError, UserError
from hippo_mpi.planning.layer_split import Machine
from hippo_mpi.serving.supervision.answer import Answer, Overloaded, Told
from hippo_mpi.serving.supervision.last_beat import LastBeat
from hippo_mpi.serving.supervision.messages import (
    Abort,
    Add,
    Beat,
    Begun,
    Order,
    Ready,
    Refused,
    Report,
    Taking,
    Waiting,
    line_of,
    read_report,
)
from hippo_mpi.serving.supervision.suspects import is_suspect, may_begin
from hippo_mpi.serving.supervision.wanted_models import WantedModels
from hippo_mpi.units import count_of, waiting_requests

_log = logging.getLogger(__name__)
_ANY = 1 << 31  # tokens of a context or a vocabulary: more than any model has


class RequestBroker:
    """Keeps requests between clients and ranks.

    Args:
        most_requests: how many may run or wait at once.
        model: the name of the model that is loaded first.
    """

    def __init__(self, most_requests: int, model: str) -> None:
        self._most_requests = most_requests
        self._answers: dict[int, Answer] = {}
        self._begun: set[int] = set()  # requests that the ranks have
        self._at_work: set[int] = set()  # requests of which a step has begun
        self._taking: int | None = None  # the request that rank 0 is reading
        self.was_ready = False
        """Whether the present ranks have been ready."""
        self._was_loaded = False  # whether the present model has been loaded in this turn
        self._num_failed_starts = 0  # in a row
        self._ids = itertools.count()
        self._writer: asyncio.StreamWriter | None = None
        self.model = model  # which the ranks hold, or are started with
        self._model_before: str | None = None  # the one to return to if the present one can't be loaded
        self._wanted = WantedModels()
        self.turn_is_over = asyncio.Event()
        self._abouts: dict[str, Ready] = {}
        self.layer_splits: dict[str, list[int]] = {}
        """Layers per rank with which a model is to be started, where work has shown that they are better."""
        self._new_split: list[int] | None = None  # for the present model, once its running answers have ended
        self.machines: list[Machine] = []  # memory budgets of the ranks that were ready last
        self._set_state(f"loading {model}")
        self.num_starts = 0
        self.num_restarts = 0  # after failures
        self.silent_hosts: list[str] = []  # hosts that the present ranks run without
        self.beat = LastBeat()
        self.has_progressed = False  # whether a token has come since the ranks became ready
        self.heard_s = 0.0  # time of the last output of any request
        self.on_output: Callable[[RequestOutput, float], None] = lambda output, before_s: None
        """Called with every output, and the time of the one before it (0: it is the first)."""
        self.on_early_end: Callable[[str], None] = lambda reason: None
        """Called when an answer ends without a last output: "abort" if its client has gone, or "error"."""

    @property
    def about(self) -> Ready | None:
        """What the last ranks with the present model could do; None: there were none."""
        return self._abouts.get(self.model)

    @property
    def is_ready(self) -> bool:
        """Whether ranks are there, with their model loaded."""
        return self._writer is not None

    @property
    def why_stuck(self) -> str:
        """Why ranks that are ready make no progress; empty if they do, as far as is known."""
        return self.beat.why_stuck if self.is_ready else ""

    @property
    def num_requests(self) -> int:
        """Requests that run or wait."""
        return len(self._answers)

    @property
    def state(self) -> str:
        """The state in words: "ready", or what is being waited for, and for how long."""
        if not self.is_ready:
            return f"{self._state} ({time.monotonic() - self._state_since_s:.0f} s)"
        if why := self.why_stuck:
            return why
        following = self._next_model()
        return "ready" if following is None else f"ready; {self._turn_of(following)}"

    def why_waiting(self, model: str) -> str:
        """Say why a request for a model isn't running; empty if it is, or only queues for the loaded model."""
        if not self.is_ready:
            return self.state if model == self.model else f"{self.state}; {model} is next"
        return "" if model == self.model else self._turn_of(model)

    def status(self) -> dict[str, object]:
        """Return what is public: the state, counts of requests (up to a second old) and of restarts."""
        waiting = len(self._answers) - len(self._begun) + self.beat.waiting
        running = max(0, len(self._answers) - waiting)
        return {
            "ready": self.is_ready and not self.why_stuck,
            "state": self.state,
            "uptime_s": round(self.beat.uptime_s),
            "requests": len(self._answers),
            "running": running,
            "waiting": len(self._answers) - running,
            "restarts": self.num_restarts,
            "beat_s": self.beat.at_s,  # when the ranks spoke last, on the clock of uptime_s
        }

    def _turn_of(self, model: str) -> str:
        count = len(self._begun)
        return f"{model} is next, after {count_of(count, 'answer')} of {self.model}" if count else f"{model} is next"

    def _set_state(self, state: str) -> None:
        self._state, self._state_since_s = state, time.monotonic()

    def submit(
        self,
        prompt: list[int],
        sampling: SamplingParams,
        model: str,
        tell: Callable[[Told], None] = lambda told: None,
        cache_salt: str = "",
    ) -> Answer:
        """Queue a request for a model; `tell` is called with each output, or the error.

        Raises:
            Overloaded: too many requests wait already.
            UserError: the request can never be answered.
        """
        if len(self._answers) >= self._most_requests:
            raise Overloaded(f"{self._most_requests} requests are already running or waiting")
        about = self._abouts.get(model)
        limits = (about.max_context, about.vocab_size) if about else (_ANY, _ANY)
        check_request(prompt, sampling, *limits)
        if sampling.seed is None:  # every answer draws numbers of its own, so that it can go on elsewhere
            sampling = replace(sampling, seed=secrets.randbits(63))
        return self._take_in(Request(next(self._ids), prompt, sampling, cache_salt=cache_salt), model, tell, ())

    def bring_back(
        self, request: Request, model: str, tell: Callable[[Told], None], before: Sequence[OutputMessage]
    ) -> Answer:
        """Go on with an answer that an earlier server has begun, after the outputs in `before`; no limits are checked again."""
        return self._take_in(replace(request, id=next(self._ids)), model, tell, before)

    def _take_in(
        self, request: Request, model: str, tell: Callable[[Told], None], before: Sequence[OutputMessage]
    ) -> Answer:
        line_of(Add(request))  # what can't be written must fail here, and not the ranks that are to read it
        answer = Answer(request, Timings(prompt_tokens=len(request.prompt)), model, tell)
        for told in before:
            answer.note(told)
        self._note_wanted(model)
        self._answers[request.id] = answer
        _log.debug("request %d for %s: %d prompt tokens", request.id, model, len(request.prompt))
        self._advance()
        return answer

    def abort(self, answer: Answer) -> None:
        """End an answer whose client has gone; unknown and ended ones are ignored."""
        number = answer.request.id
        if self._answers.pop(number, None) is not None:
            self.on_early_end("abort")
            if number in self._begun:
                self._tell(Abort(number))
            self._forget(number)

    async def load(self, model: str) -> None:
        """Load a model as soon as the running answers have ended; return when it is loaded.

        Raises:
            UserError: it can't be loaded.
        """
        self._note_wanted(model)
        loaded = self._wanted.add(model)
        self._advance()
        await loaded

    def take_split(self, counts: list[int]) -> None:
        """Start the ranks anew with other layers, as soon as the running answers have ended."""
        self._new_split = counts
        self._advance()

    # ---- whose turn it is

    def _advance(self) -> None:
        """Send the ranks what may begin, or signal that it is another model's turn."""
        if self._writer is None:
            return
        self._wanted.answer(self.model)
        if self._next_model() is None and self._new_split is None:
            self._begin_all()
        elif not self._begun:
            self.turn_is_over.set()

    def _note_wanted(self, model: str) -> None:
        """Log, once per turn, that a requested model waits for the running answers of another."""
        if model != self.model and self._begun and self._next_model() is None:
            _log.info("%s requested: %s", model, self.why_waiting(model))

    def _next_model(self) -> str | None:
        """Return the model that is waited for longest, if it isn't the present one."""
        waited_for = self._wanted.names + [answer.model for answer in self._answers.values()]
        return next((model for model in waited_for if model != self.model), None)

    def _begin_all(self) -> None:
        """Send the ranks all requests that may begin (suspects.py)."""
        failures = {n: answer.num_failures for n, answer in self._answers.items() if answer.model == self.model}
        for number in may_begin(failures, self._begun):
            self._begun.add(number)
            self._tell(Add(self._answers[number].resumed()))

    def _forget(self, number: int) -> None:
        """Drop an ended answer; it may have been the last before another model's turn."""
        self._begun.discard(number)
        self._at_work.discard(number)
        self._advance()

    def take_turn(self) -> bool:
        """Switch to the next model, or to another split of this one, if it is its turn; return whether it is."""
        is_due = self.turn_is_over.is_set() or not any(a.model == self.model for a in self._answers.values())
        self.turn_is_over.clear()
        other, split = self._next_model(), self._new_split
        if (other is None and split is None) or not is_due:
            self._advance()
            return False
        if split is not None:
            self.layer_splits[self.model], self._new_split = split, None
        if other is None:
            other = self.model
            _log.info("restarting %s with the layer split %s", other, ",".join(map(str, split or ())))
        else:
            self._model_before, self.model = self.model, other
            self._was_loaded, self._num_failed_starts = False, 0
            waiting = sum(answer.model == other for answer in self._answers.values())
            _log.info("switching from %s to %s; %s for it", self._model_before, other, waiting_requests(waiting))
        self._set_state(f"loading {other}")
        if self._writer is not None:
            self._writer.close()  # the ranks end
            self._writer = None
        self._end_life()
        return True

    def give_up_model(self, why: str) -> bool:
        """Return to the previous model, since this one can't be loaded; False if it has been, or there is no previous one."""
        if self._was_loaded or self._model_before is None:
            return False
        error = UserError(f"the model {self.model!r} can't be loaded: {why}")
        self._wanted.answer(self.model, error)
        for answer in list(self._answers.values()):
            if answer.model == self.model:
                self._fail(answer, error)
        _log.warning("%s; going back to %s", error, self._model_before)
        self.model, self._model_before = self._model_before, None
        self._num_failed_starts = 0
        self._set_state(f"loading {self.model}")
        return True

    # ---- the ranks

    def lose_ranks(self, why: str, most_failures: int) -> None:
        """Count a failure of the ranks against the requests that they were at work on.

        A request with more than `most_failures` consecutive failures is given up: it is what makes ranks fail. Failures
        to start count against every request that waits.
        """
        self._set_state(f"restarting the ranks: {why}")
        self._num_failed_starts += not self.was_ready
        if not self.was_ready:
            self.layer_splits.pop(self.model, None)
            if self.about is not None:  # the next ranks find out anew how to share the model
                self._abouts[self.model] = msgspec.structs.replace(self.about, layout=None)
        if self._num_failed_starts > most_failures:
            in_vain = f"its ranks failed {self._num_failed_starts} times while loading it, most recently: {why}"
            self._wanted.answer(self.model, UserError(f"the model {self.model!r} can't be loaded: {in_vain}"))
        at_work = {*self._at_work, *({self._taking} - {None})}
        for number, answer in list(self._answers.items()):
            if answer.model != self.model:
                continue
            answer.num_failures += self.was_ready and number in at_work
            answer.num_failed_starts += not self.was_ready
            count = max(answer.num_failures, answer.num_failed_starts)
            if count > most_failures:
                error = RankError(f"the ranks failed {count} times in a row, most recently: {why}")
                _log.warning("gave up on request %d: %s", number, error)
                self._fail(answer, error)
            elif is_suspect(answer.num_failures):
                _log.warning("request %d was running in each of the last %d failures", number, answer.num_failures)
        self._end_life()

    def _end_life(self) -> None:
        """Forget what was known of ranks that are gone."""
        self._at_work.clear()
        self._taking, self.was_ready = None, False

    def fail_all(self, error: RankError) -> None:
        """End every request with an error."""
        for answer in list(self._answers.values()):
            self._fail(answer, error)

    def _fail(self, answer: Answer, error: HippoError) -> None:
        del self._answers[answer.request.id]
        answer.fail(error)
        self.on_early_end("error")

    async def serve_ranks(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, silence_s: float) -> str:
        """Exchange messages with rank 0 for as long as it lives; return why it doesn't any more."""
        self.has_progressed = False
        try:
            while True:
                async with asyncio.timeout(silence_s):  # Python 3.11's wait_for loses cancellations
                    line = await reader.readline()
                if not line.endswith(b"\n"):
                    return "lost the connection to rank 0"
                self._take(read_report(line), writer)
        except TimeoutError:
            return f"no message from rank 0 for {silence_s:.0f} s"
        except (OSError, ValueError, msgspec.DecodeError) as error:
            return f"lost the connection to rank 0: {error}"
        finally:
            if self._writer is writer:
                self._writer = None
                self._set_state("the ranks have ended")
            self.beat.note(None)
            self._begun.clear()
            writer.close()

    def _take(self, report: Report, writer: asyncio.StreamWriter) -> None:
        match report:
            case OutputMessage():
                self._note(report)
            case Begun():
                self._at_work.update(number for number in report.request_ids if number in self._answers)
            case Waiting():
                self._at_work.discard(report.request_id)
            case Taking():
                self._taking = report.request_id
            case Refused():
                answer = self._answers.get(report.request_id)
                if answer is not None:
                    self._fail(answer, report.error.error())
                    self._forget(answer.request.id)
            case Beat():
                self.beat.note(report)
            case Ready():
                self._welcome(report, writer)

    def _welcome(self, about: Ready, writer: asyncio.StreamWriter) -> None:
        """Take ranks into service that have loaded their model."""
        self._abouts[self.model], self.machines = about, about.machines
        self._writer = writer
        self.was_ready = self._was_loaded = True
        self._num_failed_starts = 0
        for answer in self._answers.values():
            answer.num_failed_starts = 0
        self.num_starts += 1
        took_s = time.monotonic() - self._state_since_s
        waiting = sum(answer.model == self.model for answer in self._answers.values())
        _log.info("loaded %s in %.1f s: %s; %s", self.model, took_s, about.where, waiting_requests(waiting))
        self._begin_all()
        self._advance()

    def _note(self, told: OutputMessage) -> None:
        self.has_progressed, self.heard_s = True, time.monotonic()
        answer = self._answers.get(told.request_id)
        if answer is None:  # aborted meanwhile
            return
        before_s, was_suspect = answer.timings.finished_s, is_suspect(answer.num_failures)
        self.on_output(answer.take(told), before_s)
        if told.finish_reason is not None:
            del self._answers[told.request_id]
            self._forget(told.request_id)
        elif was_suspect:  # it is none any more, and the next one's turn
            self._advance()

    def _tell(self, order: Order) -> None:
        """Send an order to the ranks, if there are any; later ones are sent every request anew."""
        if self._writer is not None:
            self._writer.write(line_of(order))
