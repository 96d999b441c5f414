"""The front's memory: every request, and what has been answered of it, so that ranks may come and go.

Ranks that are gone take nothing with them: when others are ready, each answer goes on from its last token.
Knows requests and ranks' messages. Must not know HTTP or how ranks are started.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import secrets
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from typing import Any

from hippo_mpi.engine.engine import check_request
from hippo_mpi.engine.request import Request, RequestOutput, Resume, SamplingParams, Timings
from hippo_mpi.errors import RankError, UserError
from hippo_mpi.serving.rank_link import About, ToldOutput, line_of, read_output, request_object


class Overloaded(UserError):
    """More requests than may wait."""


@dataclass(eq=False)
class Answer:
    """A request that is being answered: what was told of it so far."""

    request: Request
    timings: Timings
    emitted_chars: int = 0
    random_state: list[int] | None = None
    outcome: str = "abort"  # or its finish reason, or its error
    num_failures: int = 0  # of ranks that were at work on it, one after another, without a token of it between
    _told: asyncio.Queue[RequestOutput | UserError | RankError] = field(default_factory=asyncio.Queue)

    def resumed(self) -> Request:
        """The request for ranks that know nothing of it."""
        if not self.timings.token_ids:
            return self.request
        resume = Resume(self.timings.token_ids, self.emitted_chars, self.random_state)
        return replace(self.request, resume=resume)

    def take(self, told: ToldOutput) -> RequestOutput:
        """Note what came, and hand it on."""
        self.num_failures = 0
        if told.token is not None:
            self.timings.note(told.token)
        if len(self.timings.token_ids) <= 1:  # after a restart the prompt is read again, which is no cache's doing
            self.timings.cached_tokens = told.cached_tokens
        self.emitted_chars += len(told.text)
        self.random_state = told.random_state
        self.outcome = told.finish_reason or self.outcome
        output = RequestOutput(told.request_id, told.text, told.token, self.timings, told.logprobs, told.finish_reason)
        self._told.put_nowait(output)
        return output

    def fail(self, error: UserError | RankError) -> None:
        self.outcome = f"error: {error}"
        self._told.put_nowait(error)

    async def outputs(self) -> AsyncIterator[RequestOutput]:
        """What comes, to the end.

        Raises:
            UserError: the ranks refuse it.
            RankError: the ranks can't be brought back.
        """
        while True:
            output = await self._told.get()
            if isinstance(output, Exception):
                raise output
            yield output
            if output.finish_reason is not None:
                return


class Front:
    """Between clients and ranks.

    Args:
        most_requests: that may be under way or wait at once.
    """

    def __init__(self, most_requests: int) -> None:
        self._most_requests = most_requests
        self._answers: dict[int, Answer] = {}
        self._ids = itertools.count()
        self._writer: asyncio.StreamWriter | None = None
        self.about: About | None = None  # of the last ranks that were ready
        self.state = "the ranks are starting"
        self.num_starts = 0
        self.has_progressed = False  # since the last ranks became ready
        self.on_output: Callable[[RequestOutput, float], None] = lambda output, before_s: None
        """For counting: told of every output, and when the one before it came (0: it is the first)."""

    @property
    def is_ready(self) -> bool:
        return self._writer is not None

    @property
    def num_requests(self) -> int:
        """Under way or waiting."""
        return len(self._answers)

    def submit(self, prompt: list[int], sampling: SamplingParams) -> Answer:
        """Ask for an answer.

        Raises:
            Overloaded: too many wait already.
            UserError: it can never be answered.
        """
        if len(self._answers) >= self._most_requests:
            raise Overloaded(f"{self._most_requests} requests are under way or wait already")
        if self.about is not None:
            check_request(prompt, sampling, self.about.max_context, self.about.vocab_size)
        if sampling.seed is None:  # every answer draws numbers of its own, so that it can go on elsewhere
            sampling = replace(sampling, seed=secrets.randbits(63))
        request = Request(next(self._ids), prompt, sampling)
        answer = Answer(request, Timings(prompt_tokens=len(prompt)))
        self._answers[request.id] = answer
        self._tell(add=request_object(request))
        return answer

    def abort(self, answer: Answer) -> None:
        """Nobody wants the rest of an answer; unknown and ended ones are ignored."""
        if self._answers.pop(answer.request.id, None) is not None:
            self._tell(abort=answer.request.id)

    def lose_ranks(self, why: str, most_failures: int) -> None:
        """Ranks have failed. A request that has seen so many failures without a token between is given up: it may be
        what they fail of."""
        self.state = f"the ranks are being started again: {why}"
        for number, answer in list(self._answers.items()):
            answer.num_failures += 1
            if answer.num_failures > most_failures:
                del self._answers[number]
                answer.fail(RankError(f"the ranks failed {answer.num_failures} times in a row, last: {why}"))

    def fail_all(self, error: RankError) -> None:
        """Give every request up."""
        for answer in self._answers.values():
            answer.fail(error)
        self._answers.clear()

    async def serve_ranks(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, silence_s: float) -> str:
        """Work with these ranks as long as they live; returns why they don't any more."""
        self.has_progressed = False
        try:
            while True:
                line = await asyncio.wait_for(reader.readline(), silence_s)
                if not line.endswith(b"\n"):
                    return "rank 0 is gone"
                self._take(json.loads(line), writer)
        except TimeoutError:
            return f"rank 0 said nothing for {silence_s:.0f} s"
        except (OSError, ValueError) as error:
            return f"rank 0 is gone: {error}"
        finally:
            self._writer, self.state = None, "the ranks are gone"
            writer.close()

    def _take(self, message: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        if "output" in message:
            self._note(read_output(message["output"]))
        elif "refused" in message:
            answer = self._answers.pop(message["refused"], None)
            if answer is not None:
                answer.fail(UserError(message["why"]))
        elif "ready" in message:
            self.about, self._writer, self.state = About(**message["ready"]), writer, "ready"
            self.num_starts += 1
            for answer in self._answers.values():
                self._tell(add=request_object(answer.resumed()))

    def _note(self, told: ToldOutput) -> None:
        self.has_progressed = True
        answer = self._answers.get(told.request_id)
        if answer is None:  # aborted meanwhile
            return
        if told.finish_reason is not None:
            del self._answers[told.request_id]
        before_s = answer.timings.finished_s
        self.on_output(answer.take(told), before_s)

    def _tell(self, **message: Any) -> None:
        """To the ranks, if there are any; those to come are told everything."""
        if self._writer is not None:
            self._writer.write(line_of(**message))
