"""Outputs and errors of requests, as they travel between processes and lie in a journal: JSON, by msgspec."""

from __future__ import annotations

from typing import Literal

import msgspec

from hippo_mpi.engine.request import FinishReason, RequestOutput, Timings, TokenLogprobs
from hippo_mpi.errors import ContextError, FieldError, ForeignError, HippoError, RankError, UserError


class OutputMessage(msgspec.Struct, tag="output", frozen=True, omit_defaults=True):
    """All of a `RequestOutput` but its times, which are of one process's clock, and its error."""

    request_id: int
    text: str = ""
    token: int | None = None
    cached_tokens: int = 0
    num_draft_tokens: int = 0
    num_accepted: int = 0
    logprobs: TokenLogprobs | None = None
    finish_reason: FinishReason | None = None
    random_state: list[int] | None = None

    @classmethod
    def of(cls, output: RequestOutput) -> OutputMessage:
        """Write an output down."""
        timings = output.timings
        return cls(
            output.request_id, output.text, output.token, timings.cached_tokens, timings.num_draft_tokens,
            timings.num_accepted, output.logprobs, output.finish_reason, output.random_state,
        )  # fmt: skip

    def output(self, timings: Timings) -> RequestOutput:
        """Return the output, with the times of whoever reads it."""
        return RequestOutput(
            self.request_id, self.text, self.token, timings, self.logprobs, self.finish_reason,
            random_state=self.random_state,
        )  # fmt: skip


class ErrorMessage(msgspec.Struct, tag="error", frozen=True, omit_defaults=True):
    """An error that has ended a request: its kind, and what an error of that kind is made of."""

    kind: Literal["user", "rank", "fault", "field", "context"]
    why: str = ""
    field: str = ""
    prompt_tokens: int = 0
    max_context: int = 0

    @classmethod
    def of(cls, error: HippoError) -> ErrorMessage:
        """Write an error down."""
        if isinstance(error, ContextError):
            return cls("context", prompt_tokens=error.prompt_tokens, max_context=error.max_context)
        if isinstance(error, FieldError):
            return cls("field", str(error), error.field)
        if isinstance(error, UserError):
            return cls("user", str(error))
        return cls("rank" if isinstance(error, RankError) else "fault", str(error))

    def error(self) -> HippoError:
        """Return the error; a fault is a ForeignError."""
        if self.kind == "context":
            return ContextError(self.prompt_tokens, self.max_context)
        if self.kind == "field":
            return FieldError(self.field, self.why)
        kinds: dict[str, type[HippoError]] = {"user": UserError, "rank": RankError, "fault": ForeignError}
        return kinds[self.kind](self.why)
