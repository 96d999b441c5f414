"""An answer as the front knows it: what came of it so far, for its client, and for ranks that are to go on with it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace

from hippo_mpi.engine.request import Request, RequestOutput, Resume, Timings
from hippo_mpi.errors import HippoError
from hippo_mpi.serving.supervision.rank_link import ToldOutput


@dataclass(eq=False)
class Answer:
    """A request that is being answered: what was told of it so far."""

    request: Request
    timings: Timings
    model: str
    emitted_chars: int = 0
    random_state: list[int] | None = None
    outcome: str = "abort"  # or its finish reason, or its error
    num_failures: int = 0  # of ranks that were at work on it, one after another, without a token of it between
    num_failed_starts: int = 0  # of ranks that it waited for, one after another
    _told: asyncio.Queue[RequestOutput | HippoError] = field(default_factory=asyncio.Queue)

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
        self.timings.num_draft_tokens, self.timings.num_accepted = told.num_draft_tokens, told.num_accepted
        self.emitted_chars += len(told.text)
        self.random_state = told.random_state
        self.outcome = told.finish_reason or self.outcome
        output = RequestOutput(told.request_id, told.text, told.token, self.timings, told.logprobs, told.finish_reason)
        self._told.put_nowait(output)
        return output

    def fail(self, error: HippoError) -> None:
        self.outcome = f"error: {error}"
        self._told.put_nowait(error)

    async def outputs(self) -> AsyncIterator[RequestOutput]:
        """What comes, to the end.

        Raises:
            UserError: the ranks refuse it.
            ForeignError: it met a mistake of ours.
            RankError: the ranks can't be brought back, or fail of it.
        """
        while True:
            output = await self._told.get()
            if isinstance(output, Exception):
                raise output
            yield output
            if output.finish_reason is not None:
                return
