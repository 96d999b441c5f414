"""All exchanges of a server: which go on without their client, which are kept, and which the next server resumes.

Without a journal nothing is kept, and an answer ends when its client goes away. With one:
- Every stream, and every answer that is to be stored, is in the journal from its beginning.
- What is under way when the server dies goes on when it is started again, if somebody can still fetch it: a stream for
  some time, in which its client may come back; what is to be stored, or made in the background, to its end. Other
  answers don't: their clients never got an id.
- An answer whose client goes away while the server lives is aborted, as users who press "stop" expect; how long it
  waits for the client to come back is an option. In the background it goes on.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Container
from dataclasses import dataclass
from functools import partial

from hippo_mpi.engine.messages import OutputMessage
from hippo_mpi.errors import RankError
from hippo_mpi.serving.api.exchange import Exchange, Reader
from hippo_mpi.serving.api.journal import Journal
from hippo_mpi.serving.api.journal_records import Record, record_text
from hippo_mpi.serving.supervision.request_broker import RequestBroker

_log = logging.getLogger(__name__)
_RECONNECT_TIMEOUT_S = 60.0  # for a client to come back: after a start, or after an end that may not have reached it
_MAX_DOWNTIME_S = 600.0  # after a server was down for longer, clients of streams aren't expected to come back
_MAX_DEATHS = 5  # of servers in a row, without a new token between, that an answer survives

OnOver = Callable[[Exchange], None]


@dataclass(frozen=True)
class Keeping:
    """How long answers are kept and go on.

    Args:
        stored_s: seconds from its end for which an answer that is to be stored is kept.
        reconnect_s: seconds for which a stream goes on without its client.
    """

    stored_s: float
    reconnect_s: float


class Exchanges:
    """The exchanges that are under way, and those that the journal has.

    Args:
        broker: that answers requests.
        journal: that keeps them; None: nothing is kept.
        keeping: for how long.
        on_over: called with each exchange when its answers have ended.
    """

    def __init__(self, broker: RequestBroker, journal: Journal | None, keeping: Keeping, on_over: OnOver) -> None:
        self._broker, self._journal, self._keeping, self._on_over = broker, journal, keeping, on_over
        self._live: dict[str, Exchange] = {}  # by id: those that are, or will be, in the journal

    @property
    def can_keep(self) -> bool:
        """True if there is a journal."""
        return self._journal is not None

    async def open(self, record: Record, count_tokens: Callable[[int], None]) -> Exchange:
        """Submit all of a request's answers, or none; return when the request is in the journal, if it is to be kept.

        Args:
            record: of the request, with the seeds of its answers, so that another server draws the same random numbers.
            count_tokens: called at the end with the number of tokens of prompts and answers.

        Raises:
            Overloaded: too many requests wait already.
            UserError: one of the answers is impossible.
        """
        kept = record.is_stream or record.is_stored or record.is_background
        exchange = Exchange(record, self._journal if kept else None, self._end_soon, count_tokens=count_tokens)
        text = record_text(record) if exchange.journal is not None else ""  # may fail, so before anything runs
        try:
            for index, one in enumerate(record.requests):
                tell = partial(exchange.tell, index)
                exchange.answers[index] = self._broker.submit(
                    one.prompt, one.sampling, record.model, tell, one.cache_salt
                )
            if exchange.journal is not None:
                self._live[record.id] = exchange
                patience_s = self._keeping.reconnect_s if record.is_stream else 0.0
                exchange.patience_s = None if record.is_background else patience_s
                in_file = asyncio.Event()
                exchange.journal.add(record.id, text, in_file.set)
                await in_file.wait()
        except BaseException:  # nobody will get the exchange's id
            for answer in exchange.answers.values():
                self._broker.abort(answer)
            if self._live.pop(record.id, None) is not None:
                self._forget(exchange)
            raise
        return exchange

    def reader(self, exchange: Exchange) -> Reader:
        """Return a new reader of an exchange; when the last one leaves, the exchange may end."""
        return Reader(exchange, self._leave)

    async def find(self, name: str, owner: str) -> Exchange | None:
        """Return the exchange with an id if it is still kept and belongs to this owner, else None."""
        exchange = self._live.get(name)
        if exchange is None and self._journal is not None:
            kept = await asyncio.to_thread(self._journal.find, name)
            if kept is not None:
                exchange = Exchange(kept[0], self._journal, self._end_soon, kept[1])
        return exchange if exchange is not None and exchange.record.owner == owner else None

    def abort(self, exchange: Exchange) -> None:
        """Abort those answers of an exchange that haven't ended."""
        for index in exchange.running:
            exchange.tell(index, OutputMessage(index, finish_reason="abort"))

    async def delete(self, exchange: Exchange) -> None:
        """Abort and forget an exchange; return when it can't be found any more."""
        self.abort(exchange)
        is_gone = asyncio.Event()
        self._forget(exchange, is_gone.set)
        await is_gone.wait()  # the journal has a deadline for this

    def _leave(self, exchange: Exchange) -> None:
        """Abort the exchange that a reader has left if none comes back within its patience."""
        if exchange.is_over or exchange.ending is not None or exchange.patience_s is None:
            return
        if exchange.patience_s:
            asyncio.get_running_loop().call_later(exchange.patience_s, self._abort_if_alone, exchange)
        else:
            self._abort_if_alone(exchange)

    def _abort_if_alone(self, exchange: Exchange) -> None:
        if not exchange.num_readers and exchange.ending is None:
            self.abort(exchange)

    def _end_soon(self, exchange: Exchange) -> None:
        """Call `_end` later: the front may be iterating over its answers now."""
        asyncio.get_running_loop().call_soon(self._end, exchange)

    def _end(self, exchange: Exchange) -> None:
        """Free the places of an exchange that is over, let it expire, and report its tokens and its end."""
        for answer in exchange.answers.values():
            self._broker.abort(answer)
        record = exchange.record
        if exchange.journal is not None:
            was_left = all(exchange.outcome_of(index) == "abort" for index in range(len(record.requests)))
            if was_left and not record.is_stored:
                self._forget(exchange)
            else:
                keep_s = self._keeping.stored_s if record.is_stored else _RECONNECT_TIMEOUT_S
                exchange.journal.end(record.id, keep_s, lambda: self._drop(record.id))
        exchange.count_tokens(exchange.num_tokens)
        self._on_over(exchange)

    def _forget(self, exchange: Exchange, then: Callable[[], None] = lambda: None) -> None:
        def note() -> None:
            self._drop(exchange.record.id)
            then()

        if self._journal is not None:
            self._journal.delete(exchange.record.id, note)

    def _drop(self, name: str) -> None:
        self._live.pop(name, None)

    # ---- from one server to the next

    def start(self, models: Container[str]) -> None:
        """Start the journal, and resume what the previous server has left, if it is for one of these models."""
        if self._journal is None:
            return
        for record, told, num_deaths in self._journal.start():
            exchange = Exchange(record, self._journal, self._end_soon, told)
            can_wait = record.is_stored or record.is_background
            has_client = record.is_stream or record.is_background
            is_late = self._journal.silent_s > (self._keeping.stored_s if can_wait else _MAX_DOWNTIME_S)
            if not has_client or is_late or record.model not in models:
                self._forget(exchange)
                asyncio.get_running_loop().call_soon(self._on_over, exchange)
                continue
            self._live[record.id] = exchange
            if num_deaths > _MAX_DEATHS:  # it may be what kills the servers
                exchange.tell(
                    0, RankError(f"the server died {num_deaths} times on this request without producing a token")
                )
                continue
            exchange.patience_s = None if can_wait else _RECONNECT_TIMEOUT_S
            self._bring_back(exchange)
        if self._live:
            _log.info("resuming %d requests of the previous server", len(self._live))

    def _bring_back(self, exchange: Exchange) -> None:
        record = exchange.record
        if exchange.is_over:  # the server died between noting its last token and its end
            self._end_soon(exchange)
        for index in exchange.running:
            tell, before = partial(exchange.tell, index), exchange.outputs_of(index)
            exchange.answers[index] = self._broker.bring_back(record.requests[index], record.model, tell, before)
        self._leave(exchange)

    def close(self) -> None:
        """Close the journal; what is under way stays in it for the next server."""
        if self._journal is not None:
            self._journal.close()
