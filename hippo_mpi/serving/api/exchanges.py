"""All exchanges of a server: what goes on without its client, what is kept, and what the next server takes up again.

Without a journal nothing is kept, and an answer ends with its client. With one
- every stream, and every answer that is to be stored, is in the journal from its beginning;
- what is under way when the server dies goes on when it is started again, if somebody can still fetch it: a stream
  for some time, in which a client may come back for it; what is to be stored, or in the background, to its end.
  Nobody has the id of another answer that was to come as a whole;
- an answer whose client goes away while the server lives ends, as people who press "stop" want it; how long it waits
  for the client to come back is an option. In the background it goes on.
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
from hippo_mpi.serving.supervision.front import Front

_log = logging.getLogger(__name__)
_RETURN_S = 60.0  # for a client to come back: after a start, or after an end that it may not have heard of
_MOST_DOWN_S = 600.0  # after a server was down for longer, clients of streams don't come back

_MOST_DEATHS = 5  # of servers, one after another, that an answer bears without a token between

OnOver = Callable[[Exchange], None]


@dataclass(frozen=True)
class Keeping:
    """How long is kept what.

    Args:
        stored_s: an answer that is to be stored, from its end.
        reconnect_s: a stream goes on without its client.
    """

    stored_s: float
    reconnect_s: float


class Exchanges:
    """Those that are under way, and those that the journal has.

    Args:
        on_over: called with each when it has ended, or was ended.
    """

    def __init__(self, front: Front, journal: Journal | None, keeping: Keeping, on_over: OnOver) -> None:
        self._front, self._journal, self._keeping, self._on_over = front, journal, keeping, on_over
        self._live: dict[str, Exchange] = {}  # that are, or will be, in the journal

    @property
    def can_keep(self) -> bool:
        return self._journal is not None

    async def open(self, record: Record, count_tokens: Callable[[int], None]) -> Exchange:
        """Ask for all of a request's answers, or none; returns when it is in the journal.

        Args:
            record: with the seeds of its answers, so that another server draws the same numbers.
            count_tokens: told how many tokens it has taken, at its end.

        Raises:
            Overloaded: too many wait already.
            UserError: one can never be answered.
        """
        kept = record.is_stream or record.is_stored or record.is_background
        exchange = Exchange(record, self._journal if kept else None, self._end_soon, count_tokens=count_tokens)
        text = record_text(record) if exchange.journal is not None else ""  # what fails does so before anything runs
        try:
            for index, one in enumerate(record.requests):
                tell = partial(exchange.tell, index)
                exchange.answers[index] = self._front.submit(
                    one.prompt, one.sampling, record.model, tell, one.cache_salt
                )
            if exchange.journal is not None:
                self._live[record.id] = exchange
                patience_s = self._keeping.reconnect_s if record.is_stream else 0.0
                exchange.patience_s = None if record.is_background else patience_s
                in_file = asyncio.Event()
                exchange.journal.add(record.id, text, in_file.set)
                await in_file.wait()
        except BaseException:  # nobody will have its id
            for answer in exchange.answers.values():
                self._front.abort(answer)
            if self._live.pop(record.id, None) is not None:
                self._forget(exchange)
            raise
        return exchange

    def reader(self, exchange: Exchange) -> Reader:
        return Reader(exchange, self._leave)

    async def find(self, name: str, owner: str) -> Exchange | None:
        """Return what somebody has asked before, if it is still kept."""
        exchange = self._live.get(name)
        if exchange is None and self._journal is not None:
            found = await asyncio.to_thread(self._journal.find, name)
            if found is not None:
                exchange = Exchange(found[0], self._journal, self._end_soon, found[1])
        return exchange if exchange is not None and exchange.record.owner == owner else None

    def abort(self, exchange: Exchange) -> None:
        """End what is still under way of an exchange."""
        for index in exchange.running:
            exchange.tell(index, OutputMessage(index, finish_reason="abort"))

    async def delete(self, exchange: Exchange) -> None:
        """Forget an exchange; returns when nobody finds it any more."""
        self.abort(exchange)
        is_gone = asyncio.Event()
        self._forget(exchange, is_gone.set)
        await is_gone.wait()  # the journal keeps the deadline

    def _leave(self, exchange: Exchange) -> None:
        """A reader has gone: perhaps nobody waits for the rest any more."""
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
        """Not at once: the front may be going through its answers."""
        asyncio.get_running_loop().call_soon(self._end, exchange)

    def _end(self, exchange: Exchange) -> None:
        """Free an exchange's places, and let it expire."""
        for answer in exchange.answers.values():
            self._front.abort(answer)
        record = exchange.record
        if exchange.journal is not None:
            was_left = all(exchange.outcome_of(index) == "abort" for index in range(len(record.requests)))
            if was_left and not record.is_stored:
                self._forget(exchange)
            else:
                keep_s = self._keeping.stored_s if record.is_stored else _RETURN_S
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
        """Begin to write, and go on with what the server before this one has left, if it is of one of these models."""
        if self._journal is None:
            return
        for record, told, num_deaths in self._journal.start():
            exchange = Exchange(record, self._journal, self._end_soon, told)
            can_wait = record.is_stored or record.is_background
            has_client = record.is_stream or record.is_background
            is_late = self._journal.silent_s > (self._keeping.stored_s if can_wait else _MOST_DOWN_S)
            if not has_client or is_late or record.model not in models:
                self._forget(exchange)
                asyncio.get_running_loop().call_soon(self._on_over, exchange)
                continue
            self._live[record.id] = exchange
            if num_deaths > _MOST_DEATHS:  # it may be what the servers die of
                exchange.tell(
                    0, RankError(f"the server has died {num_deaths} times over this, without a token between")
                )
                continue
            exchange.patience_s = None if can_wait else _RETURN_S
            self._bring_back(exchange)
        if self._live:
            _log.info("of the server before this one %d requests go on", len(self._live))

    def _bring_back(self, exchange: Exchange) -> None:
        record = exchange.record
        if exchange.is_over:  # it has died between the last token and the note of the end
            self._end_soon(exchange)
        for index in exchange.running:
            tell, before = partial(exchange.tell, index), exchange.outputs_of(index)
            exchange.answers[index] = self._front.bring_back(record.requests[index], record.model, tell, before)
        self._leave(exchange)

    def close(self) -> None:
        """Write what is left; what is under way stays so for the next server."""
        if self._journal is not None:
            self._journal.close()
