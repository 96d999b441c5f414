"""Answers many prompts in a script: rank 0 runs the engine, the others follow, and all loop over the same outputs.

A script may leave such a loop at any time. Nothing is sent then: the loop stays open until the ranks use the ring for
something else, as all of them do alike, and end it together. A rank that has left a loop with which another goes on
ends the script.
"""

from __future__ import annotations

import contextlib
import inspect
import queue
import weakref
from abc import abstractmethod
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace

from mlx_lm.tokenizer_utils import TokenizerWrapper

from hippo_mpi.engine.engine import Engine
from hippo_mpi.engine.messages import ErrorMessage, OutputMessage
from hippo_mpi.engine.request import Request, RequestOutput, Timings
from hippo_mpi.engine.text import open_tokenizer
from hippo_mpi.errors import DesyncError, HippoError, RankError, UserError
from hippo_mpi.parallel.worker import Follower
from hippo_mpi.runtime.agreement import Agreement
from hippo_mpi.runtime.assembly import room_for_many
from hippo_mpi.runtime.pipeline import Pipeline
from hippo_mpi.sharding.slot_caches import KVSettings
from hippo_mpi.transport.script_ring import RingLoop, ScriptRing

Outputs = Generator[RequestOutput, None, None]
_Output = tuple[OutputMessage, ErrorMessage | None]
"""An output, and the error that has ended its request."""


@dataclass(frozen=True)
class _Told:
    """What rank 0 tells the others."""

    outputs: list[_Output] = field(default_factory=list)
    is_last: bool = False


class LoadedModel:
    """This rank's part of a model, with the engine on rank 0 and a follower elsewhere."""

    def __init__(self, ring: ScriptRing, agreement: Agreement, max_batch_size: int) -> None:
        self.ring, self.max_context, self.vocab_size = ring, agreement.max_context, agreement.vocab_size
        source = agreement.checkpoint.source
        eos = agreement.checkpoint.config.get("eos_token_id")
        self.tokenizer = open_tokenizer(source.path, eos, (), source.trust_remote_code)
        self.pipeline = Pipeline(ring.world, ring.control, agreement, KVSettings())
        self._max_batch_size, self._number = max_batch_size, ring.next_number()
        self._num_requests = self._num_loops = 0
        self._loop: AnswerLoop | None = None  # the last one that was begun
        self._engine: Engine | None = None
        if ring.world.rank == 0:
            self._engine = _build_engine(self.pipeline, self.tokenizer, max_batch_size)
            self.pipeline.release()
        else:
            is_last, pipeline = ring.world.rank == ring.world.size - 1, self.pipeline
            self.follower = Follower(pipeline.stage, pipeline.channel, KVSettings(), is_last, pipeline.timeline)
            while self.follower.follow() is not None:
                pass
        ring.control.idle()

    @property
    def engine(self) -> Engine:
        """Rank 0's engine."""
        if self._engine is None:
            self._engine = _build_engine(self.pipeline, self.tokenizer, self._max_batch_size)
        return self._engine

    def forget_engine(self) -> None:
        """Let the next loop have a new engine, as this one was interrupted in a step; several ranks end instead."""
        if self.ring.world.size > 1:
            self.ring.control.fail(HippoError("interrupted during a step of the engine: the ranks can't continue"))
        self._engine = None

    def next_numbers(self, count: int) -> range:
        """Return numbers for requests that no other request has had."""
        first, self._num_requests = self._num_requests, self._num_requests + count
        return range(first, self._num_requests)

    def answer(self, requests: Sequence[Request]) -> Outputs:
        """Return a loop over the outputs of requests; it begins with the first one that is asked for."""
        kind = LeadingLoop if self.ring.world.rank == 0 else FollowingLoop
        return kind(self, requests).outputs()

    def begin(self, loop: AnswerLoop) -> str:
        """Make a loop the ring's, after the end of this model's one before; return its name, the same on every rank.

        Raises:
            UserError: the script is inside another model's loop.
        """
        self.ring.settle(self._loop)
        self.ring.open_loop = self._loop = loop
        self._num_loops += 1
        return f"generate() call {self._num_loops} on model {self._number} with {loop.num_prompts} prompts"

    def leave(self, is_orderly: bool) -> None:
        """End the open loop if all ranks do; after an exception of this rank's script, only its next use may."""
        if self._loop is None or self.ring.open_loop is not self._loop:
            return
        if is_orderly:
            self.ring.close_loop()
        else:
            self._loop.is_abandoned = True


class AnswerLoop(RingLoop):
    """A script's loop over the outputs of one call of `generate`.

    Args:
        model: answers.
        requests: numbered for the model's whole life; in outputs, they count from 0.
    """

    def __init__(self, model: LoadedModel, requests: Sequence[Request]) -> None:
        self._model, self._requests, self._control = model, requests, model.ring.control
        self._outputs: weakref.ref[Outputs] | None = None
        self.num_prompts = len(requests)
        self.is_abandoned = self._is_closed = self._is_interrupted = False

    @property
    def is_left(self) -> bool:
        """True if the script can't ask for further outputs."""
        outputs = self._outputs() if self._outputs is not None else None
        return self.is_abandoned or outputs is None or inspect.getgeneratorstate(outputs) == inspect.GEN_CLOSED

    def outputs(self) -> Outputs:
        """Return what the script iterates over; only the script keeps it, so that it is known when it is dropped."""
        outputs = self._iterate()
        self._outputs = weakref.ref(outputs)
        return outputs

    def close(self) -> None:
        """End the loop on this rank; the others do, too."""
        self._is_closed = True
        if self._is_interrupted:
            self._model.forget_engine()
            return
        with self._guarded():
            self._finish()

    def _iterate(self) -> Outputs:
        name = self._model.begin(self)
        with self._guarded():
            self._start(name)
        while (outputs := self._next()) is not None:
            for output in outputs:
                yield output
                if self._is_closed:
                    raise UserError("this loop over answers was closed by a later generate() or with its LLM")
        self._model.ring.close_loop()

    def _next(self) -> list[RequestOutput] | None:
        with self._guarded():
            return self._step()

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """Note what is interrupted, end all ranks with errors of ours, and leave the script without a deadline."""
        try:
            yield
        except BaseException as error:
            self._is_interrupted = True
            if isinstance(error, HippoError):
                self._control.fail(error)
            raise
        finally:
            self._control.idle()

    @abstractmethod
    def _start(self, name: str) -> None:
        """Begin the loop, whose name must be the same on all ranks."""

    @abstractmethod
    def _step(self) -> list[RequestOutput] | None:
        """Return the outputs that come next; None after the last ones."""

    @abstractmethod
    def _finish(self) -> None:
        """Leave engine and ring at rest, whatever has been answered."""


class LeadingLoop(AnswerLoop):
    """Rank 0's side: it runs the engine and tells the others."""

    def _start(self, name: str) -> None:
        self._control.share(name, str)
        for request in self._requests:
            self._model.engine.add(request)

    def _step(self) -> list[RequestOutput] | None:
        engine = self._model.engine
        if engine.is_idle:
            return None
        first = self._requests[0].id
        outputs = [replace(output, request_id=output.request_id - first) for output in engine.step()]
        if outputs:
            self._tell(_Told([_as_message(output) for output in outputs]))
        return outputs

    def _finish(self) -> None:
        for request in self._requests:
            self._model.engine.abort(request.id)
        for _ in self._model.engine.run():
            pass
        self._tell(_Told(is_last=True))
        self._model.pipeline.release()

    def _tell(self, message: _Told) -> None:
        for rank in range(1, self._model.ring.world.size):
            self._control.report(message, rank)


class FollowingLoop(AnswerLoop):
    """The other ranks' side: they take the engine's steps, and the outputs that rank 0 tells."""

    def __init__(self, model: LoadedModel, requests: Sequence[Request]) -> None:
        super().__init__(model, requests)
        self._timings = [Timings(prompt_tokens=len(request.prompt)) for request in requests]
        self._num_unfinished = len(requests)
        self._is_followed = self._is_told = False  # to the end

    def _start(self, name: str) -> None:
        others = self._control.share(None, str)
        if others != name:
            raise DesyncError(f"this rank is at {name}, but rank 0 at {others}: every rank must make the same calls")

    def _step(self) -> list[RequestOutput] | None:
        told = self._next_told()
        if told is None:
            if self._num_unfinished:
                raise RankError("rank 0 left a loop over answers that this rank continues")
            return None
        outputs = [_as_output(output, self._timings) for output in told.outputs]
        self._num_unfinished -= sum(output.finish_reason is not None for output in outputs)
        return outputs

    def _finish(self) -> None:
        if self._next_told() is not None:  # rank 0 tells nothing more once its script has left the loop at this place
            raise RankError("this rank left a loop over answers that rank 0 continues")

    def _next_told(self) -> _Told | None:
        """Return what rank 0 tells next, and follow its steps until then; None once both are at their end."""
        while not self._is_told:
            try:
                message = self._control.next_report(_Told, waits=self._is_followed)
            except queue.Empty:
                self._follow()
                continue
            if not message.is_last:
                return message
            self._is_told = True
        while not self._is_followed:
            self._follow()
        return None

    def _follow(self) -> None:
        self._is_followed = self._model.follower.follow() is None


def _build_engine(pipeline: Pipeline, tokenizer: TokenizerWrapper, max_batch_size: int) -> Engine:
    """Build rank 0's engine, within the room that the plan leaves for caches."""
    agreement = pipeline.agreement
    limits, budget = room_for_many(agreement, max_batch_size)
    limits = replace(limits, deadline_s=pipeline.control.timeout_s)
    return Engine(pipeline.leader(), tokenizer, limits, agreement.max_context, agreement.vocab_size, budget)


def _as_message(output: RequestOutput) -> _Output:
    """Return an output as a message for the other ranks."""
    return OutputMessage.of(output), None if output.error is None else ErrorMessage.of(output.error)


def _as_output(message: _Output, timings: Sequence[Timings]) -> RequestOutput:
    """Return an output that rank 0 has sent; the timings are this rank's own."""
    output, error = message
    times = timings[output.request_id]
    if output.token is not None:
        times.note(output.token)
    return replace(output.output(times), error=None if error is None else error.error())
