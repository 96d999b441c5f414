"""An answer as the front knows it: what has come of it so far, for its client and for ranks that resume it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from hippo_mpi.engine.messages import OutputMessage
from hippo_mpi.engine.request import Request, RequestOutput, Resume, Timings
from hippo_mpi.errors import HippoError, RankError, UserError


class Overloaded(UserError):
    """Too many requests wait already."""


class ServerEnding(RankError):
    """The server is shutting down; the request isn't at fault."""


Told = OutputMessage | HippoError
"""An output of an answer, or the error that ended it."""


def note_told(timings: Timings, told: OutputMessage) -> None:
    """Count an output of an answer."""
    if told.token is not None:
        timings.note(told.token)
    if len(timings.token_ids) <= 1:  # after a restart the prompt is read again, which is no cache's doing
        timings.cached_tokens = told.cached_tokens
    timings.num_draft_tokens, timings.num_accepted = told.num_draft_tokens, told.num_accepted


@dataclass(eq=False)
class Answer:
    """A request that is being answered: what was told of it so far.

    Args:
        tell: called with each output or error, in order.
    """

    request: Request
    timings: Timings
    model: str
    tell: Callable[[Told], None] = lambda told: None
    emitted_chars: int = 0
    random_state: list[int] | None = None
    outcome: str = "abort"  # or its finish reason, or its error
    num_failures: int = 0  # consecutive failures of ranks that were at work on it, without a token of it in between
    num_failed_starts: int = 0  # consecutive failures of ranks to start while it waited

    def resumed(self) -> Request:
        """Return the request with all that ranks must know to go on from its last token."""
        if not self.timings.token_ids:
            return self.request
        resume = Resume(self.timings.token_ids, self.emitted_chars, self.random_state)
        return replace(self.request, resume=resume)

    def take(self, told: OutputMessage) -> RequestOutput:
        """Record an output, pass it on, and return it with this process's times."""
        self.num_failures = 0
        self.note(told)
        self.tell(told)
        return told.output(self.timings)

    def note(self, told: OutputMessage) -> None:
        """Record an output, of these ranks or of earlier ones."""
        note_told(self.timings, told)
        self.emitted_chars += len(told.text)
        self.random_state = told.random_state
        self.outcome = told.finish_reason or self.outcome

    def fail(self, error: HippoError) -> None:
        """End with an error."""
        self.outcome = f"error: {error}"
        self.tell(error)
