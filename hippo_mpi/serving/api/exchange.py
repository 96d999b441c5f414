"""A request and the outputs of its answers, for any number of readers, at the same time or one after another.

It knows the outputs of ranks, and must not know HTTP or the format of an API.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence

from hippo_mpi.engine.messages import OutputMessage
from hippo_mpi.engine.request import RequestOutput, Timings
from hippo_mpi.errors import HippoError
from hippo_mpi.serving.api.journal import Journal
from hippo_mpi.serving.api.journal_records import Line, Record
from hippo_mpi.serving.supervision.answer import Answer, ServerEnding, Told, note_told


class Exchange:
    """A request and the outputs and errors that its answers have had so far.

    Args:
        record: of the request.
        journal: where outputs are kept; None: nowhere.
        on_over: called once, when nothing more will come.
        told: outputs and errors that came before, for an exchange from the journal.
        count_tokens: called when nothing more will come, with the number of tokens of prompts and answers.

    Attributes:
        answers: those that the front has, by their number.
        patience_s: how many seconds it goes on without a reader; None: to its end.
    """

    def __init__(
        self,
        record: Record,
        journal: Journal | None,
        on_over: Callable[[Exchange], None],
        told: Sequence[Line] = (),
        count_tokens: Callable[[int], None] = lambda number: None,
    ) -> None:
        self.record, self.journal, self._on_over, self.count_tokens = record, journal, on_over, count_tokens
        self.answers: dict[int, Answer] = {}
        self.patience_s: float | None = 0.0
        self.num_readers = 0
        self.ending: ServerEnding | None = None  # set if the server ends first: the next one resumes this exchange
        self._told: list[Line] = []
        self._outputs: list[list[OutputMessage]] = [[] for _ in record.requests]  # the same, by answer
        self._error: HippoError | None = None  # that ended all answers
        self._running = set(range(len(record.requests)))
        for line in told:
            self._note(*line)
        self._num_public = len(self._told)  # how many of these readers may see: those that the journal has
        self._more = asyncio.Event()

    @property
    def is_over(self) -> bool:
        """True if all answers have ended."""
        return not self._running

    @property
    def running(self) -> list[int]:
        """The numbers of the answers that haven't ended."""
        return sorted(self._running)

    def outputs_of(self, index: int) -> list[OutputMessage]:
        """Return the outputs of one of the answers so far."""
        return self._outputs[index]

    @property
    def num_tokens(self) -> int:
        """The number of tokens of prompts and answers."""
        made = sum(told.token is not None for outputs in self._outputs for told in outputs)
        return sum(map(len, self.record.prompts)) + made

    def outcome_of(self, index: int) -> str:
        """Return how an answer ended: its finish reason, or the error that ended them all."""
        outputs = self._outputs[index]
        if outputs and outputs[-1].finish_reason:
            return outputs[-1].finish_reason
        return "abort" if self._error is None else f"error: {self._error}"

    def tell(self, index: int, told: Told) -> None:
        """Add an output of one of the answers, or an error, which ends all of them."""
        if self.is_over:
            return
        if isinstance(told, ServerEnding) and self.journal is not None:
            goes_on = f"GET {self.record.url}/{self.record.id} continues this answer after the server's restart"
            self.ending = ServerEnding(f"{told}; {goes_on}")
            self._wake()
            return
        self._note(index, told)
        if self.journal is None:
            self._publish()
        else:
            self.journal.note(self.record.id, (index, told), self._publish)
        if self.is_over:
            self._on_over(self)

    def _note(self, index: int, told: Told) -> None:
        self._told.append((index, told))
        if not isinstance(told, OutputMessage):
            self._error = told
            self._running.clear()
            return
        self._outputs[index].append(told)
        if told.finish_reason is not None:
            self._running.discard(index)

    def _publish(self) -> None:
        self._num_public += 1
        self._wake()

    def _wake(self) -> None:
        self._more.set()
        self._more = asyncio.Event()

    async def lines(self) -> AsyncIterator[Line]:
        """Yield all outputs and errors from the first on, waiting for those to come.

        Raises:
            ServerEnding: there is more to come, but from the next server.
        """
        num_read, running = 0, set(range(len(self.record.requests)))
        while running:
            while num_read == self._num_public:
                if self.ending is not None:
                    raise self.ending
                await self._more.wait()
            index, told = self._told[num_read]
            num_read += 1
            if not isinstance(told, OutputMessage):
                running.clear()
            elif told.finish_reason is not None:
                running.discard(index)
            yield index, told

    async def settle(self) -> None:
        """Wait until readers may see all that has come by now."""
        num_told = len(self._told)
        while self._num_public < num_told:
            await self._more.wait()

    def lines_so_far(self) -> list[Line]:
        """Return the outputs and errors that readers may see by now."""
        return self._told[: self._num_public]


class Reader:
    """A reader of an exchange from its beginning, which counts as present inside its `with` block.

    The token counts in the timings of an output are those of its time, and so the same for every reader.

    Args:
        exchange: to read.
        on_leave: called with the exchange at the end of the block.
    """

    def __init__(self, exchange: Exchange, on_leave: Callable[[Exchange], None]) -> None:
        self._exchange, self._on_leave = exchange, on_leave
        self.is_cut = False
        """True if this server's outputs are read, and the next server will have more."""
        self._timings = [Timings(prompt_tokens=len(request.prompt)) for request in exchange.record.requests]

    def __enter__(self) -> Reader:
        self._exchange.num_readers += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._exchange.num_readers -= 1
        self._on_leave(self._exchange)

    async def outputs(self) -> AsyncIterator[tuple[int, RequestOutput]]:
        """Yield (number of the answer, output) as outputs come.

        Raises:
            HippoError: the ranks refuse a request, or can't be brought back, or the server ends.
        """
        try:
            async for index, told in self._exchange.lines():
                yield self._read(index, told)
        except ServerEnding:
            self.is_cut = True
            raise

    def outputs_so_far(self) -> list[tuple[int, RequestOutput]]:
        """Return (number of the answer, output) for the outputs so far.

        Raises:
            HippoError: as `outputs`.
        """
        return [self._read(index, told) for index, told in self._exchange.lines_so_far()]

    def _read(self, index: int, told: Told) -> tuple[int, RequestOutput]:
        if not isinstance(told, OutputMessage):
            raise told
        timings = self._timings[index]
        note_told(timings, told)
        return index, told.output(timings)
