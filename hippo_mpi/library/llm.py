"""The engine for scripts: answers many prompts at once and yields the same outputs on every rank."""

from __future__ import annotations

import queue
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

from mlx_lm.tokenizer_utils import TokenizerWrapper

from hippo_mpi.config.bundled import BUNDLED_MODEL
from hippo_mpi.engine.engine import Engine
from hippo_mpi.engine.messages import ErrorMessage, OutputMessage
from hippo_mpi.engine.request import Request, RequestOutput, SamplingParams, Timings, check_request
from hippo_mpi.engine.text import ChatFormat, encode, open_tokenizer
from hippo_mpi.errors import HippoError
from hippo_mpi.library.loading import LoadOptions
from hippo_mpi.library.pipelined import START_TIMEOUT_S, TIMEOUT_S
from hippo_mpi.parallel.worker import Follower
from hippo_mpi.runtime.agreement import Agreement
from hippo_mpi.runtime.assembly import room_for_many
from hippo_mpi.runtime.pipeline import Pipeline
from hippo_mpi.shard.slot_caches import KVSettings
from hippo_mpi.transport.script_ring import Group, ScriptRing, join

Prompt = str | Sequence[int] | Sequence[dict[str, Any]]
"""Plain text, tokens, or messages for the chat template."""


class LLM:
    """A model that answers prompts, split over the ranks of a script, which all make the same calls.

        with LLM("mlx-community/Qwen3-4B-4bit") as llm:
            for output in llm.generate(["Once upon a time", "The fox"], SamplingParams(max_tokens=50)):
                if llm.rank == 0:
                    print(output.request_id, output.text)

    Inside `with`, rank 0 decides and the others follow; outputs are the same on all. The model is loaded on entry.

    Args:
        model: folder or Hugging Face repo of a model, or a bundled one's name.
        group: from `mx.distributed.init()`; None: the one that the launcher's environment describes.
        layer_split: layers per rank; None: the planner's, by the ranks' memory and speed.
        max_context: tokens that a prompt and its answer may have; None: as many as fit, up to the model's own limit.
        revision: of the repo.
        adapter_path: folder with trained adapter weights.
        precision: to cast or quantise the weights to while loading, as with --precision.
        trust_remote_code: whether the checkpoint's own Python code may run.
        max_batch_size: most prompts that are answered at once.
        timeout: seconds that a rank may be silent, or a step without progress, before all ranks end with status 3.
        start_timeout: seconds that ranks wait for each other to start.
    """

    def __init__(
        self,
        model: str | Path = BUNDLED_MODEL,
        group: Group | None = None,
        *,
        layer_split: Sequence[int] | None = None,
        max_context: int | None = None,
        revision: str | None = None,
        adapter_path: str | None = None,
        precision: str | None = None,
        trust_remote_code: bool = False,
        max_batch_size: int = 32,
        timeout: float = TIMEOUT_S,
        start_timeout: float = START_TIMEOUT_S,
    ) -> None:
        split = tuple(layer_split) if layer_split is not None else None
        self._options = LoadOptions(
            str(model), split, max_context, revision, adapter_path, precision, trust_remote_code
        )
        self._group, self._max_batch_size = group, max_batch_size
        self._timeout, self._start_timeout = timeout, start_timeout
        self._loaded: _Loaded | None = None

    def __enter__(self) -> Self:
        """Load this rank's layers.

        Raises:
            HippoError: on a single rank, the model can't be used or doesn't fit. Several ranks end with its line.
        """
        ring = join(self._group, self._start_timeout, self._timeout)
        agreement = self._options.negotiate(ring, shares_head=False)
        try:
            self._loaded = _Loaded(ring, agreement, self._max_batch_size)
        except HippoError as error:
            ring.control.fail(error)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        """Release the model. An exception of the script isn't suppressed, and ends the other ranks with it."""
        self._loaded = None

    @property
    def rank(self) -> int:
        """Return this rank's number; rank 0 is the one that should print."""
        return self._here.ring.world.rank

    @property
    def tokenizer(self) -> TokenizerWrapper:
        """Return the model's tokenizer."""
        return self._here.tokenizer

    @property
    def _here(self) -> _Loaded:
        if self._loaded is None:
            raise RuntimeError("the model is loaded inside `with LLM(...) as llm:` only")
        return self._loaded

    def generate(
        self, prompts: str | Sequence[Prompt], sampling: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> Iterator[RequestOutput]:
        """Answer prompts, and yield what each step adds to an answer, that of prompt number `request_id`.

        Leaving the loop early aborts the remaining prompts, if every rank does so.

        Args:
            prompts: one text, or a list of texts, of lists of tokens, or of lists of messages.
            sampling: parameters for all prompts, or one set for each.

        Raises:
            UserError: a prompt can't be answered; then none has been started.
        """
        here = self._here
        asked: Sequence[Prompt] = [prompts] if isinstance(prompts, str) else prompts
        if sampling is None or isinstance(sampling, SamplingParams):
            sampling = [sampling or SamplingParams()] * len(asked)
        requests = [
            Request(number, here.encode(prompt), params)
            for number, (prompt, params) in enumerate(zip(asked, sampling, strict=True))
        ]
        for request in requests:
            check_request(request.prompt, request.sampling, here.max_context, here.vocab_size)
        return here.answer(requests)


_Output = tuple[OutputMessage, ErrorMessage | None]
"""An output, and the error that has ended its request."""


@dataclass(frozen=True)
class _Told:
    """What rank 0 tells the others."""

    outputs: list[_Output] = field(default_factory=list)
    is_last: bool = False


class _Loaded:
    """This rank's part of a model, with the engine on rank 0 and a follower elsewhere."""

    def __init__(self, ring: ScriptRing, agreement: Agreement, max_batch_size: int) -> None:
        self.ring, self._control = ring, ring.control
        self.max_context, self.vocab_size = agreement.max_context, agreement.vocab_size
        source = agreement.checkpoint.source
        eos = agreement.checkpoint.config.get("eos_token_id")
        self.tokenizer = open_tokenizer(source.path, eos, (), source.trust_remote_code)
        self._pipeline = Pipeline(ring.world, ring.control, agreement, KVSettings())
        self._engine: Engine | None = None
        if ring.world.rank == 0:
            self._engine = _build_engine(self._pipeline, self.tokenizer, max_batch_size)
            self._pipeline.release()
        else:
            is_last = ring.world.rank == ring.world.size - 1
            pipeline = self._pipeline
            self._follower = Follower(pipeline.stage, pipeline.channel, KVSettings(), is_last, pipeline.timeline)
            while self._follower.follow() is not None:
                pass
        self._control.idle()

    def encode(self, prompt: Prompt) -> list[int]:
        """Return a prompt's tokens."""
        if isinstance(prompt, str):
            return encode(self.tokenizer, prompt)
        if prompt and isinstance(prompt[0], dict):
            return ChatFormat().encode(self.tokenizer, cast(list[dict[str, Any]], list(prompt)))
        return list(cast(Sequence[int], prompt))

    def answer(self, requests: Sequence[Request]) -> Iterator[RequestOutput]:
        """Yield the outputs of all requests, the same on every rank."""
        steps = self._lead(requests) if self._engine is not None else self._follow(requests)
        try:
            for outputs in steps:
                self._control.idle()  # no deadline for what the script does with the outputs
                yield from outputs
        except HippoError as error:
            self._control.fail(error)
        finally:
            steps.close()
            self._control.idle()

    def _lead(self, requests: Sequence[Request]) -> Generator[list[RequestOutput], None, None]:
        engine = self._engine
        assert engine is not None
        for request in requests:
            engine.add(request)
        try:
            while not engine.is_idle:
                outputs = engine.step()
                self._tell(_Told([_as_message(output) for output in outputs]))
                yield outputs
        finally:
            for request in requests:
                engine.abort(request.id)
            for _ in engine.run():
                pass
            self._tell(_Told(is_last=True))
            self._pipeline.release()

    def _follow(self, requests: Sequence[Request]) -> Generator[list[RequestOutput], None, None]:
        timings = {request.id: Timings(prompt_tokens=len(request.prompt)) for request in requests}
        is_followed = is_told = False
        try:
            while not (is_followed and is_told):
                is_followed = is_followed or self._follower.follow() is None
                for message in () if is_told else self._told(waits=is_followed):
                    is_told = is_told or message.is_last
                    yield [_as_output(output, timings) for output in message.outputs]
        finally:
            while not is_followed:  # the script has left the loop, here and on rank 0
                is_followed = self._follower.follow() is None
            while not is_told:
                is_told = self._control.next_report(_Told).is_last

    def _tell(self, message: _Told) -> None:
        for rank in range(1, self.ring.world.size):
            self._control.report(message, rank)

    def _told(self, waits: bool) -> Iterator[_Told]:
        """Yield the messages that rank 0 has sent so far; with `waits`, wait for all of them up to the last one."""
        while True:
            try:
                message = self._control.next_report(_Told, waits)
            except queue.Empty:
                return
            yield message
            if message.is_last:
                return


def _build_engine(pipeline: Pipeline, tokenizer: TokenizerWrapper, max_batch_size: int) -> Engine:
    """Build rank 0's engine, within the room that the plan leaves for caches."""
    agreement = pipeline.agreement
    limits, budget = room_for_many(agreement, max_batch_size)
    limits = replace(limits, deadline_s=pipeline.control.timeout_s)
    return Engine(pipeline.leader(), tokenizer, limits, agreement.max_context, agreement.vocab_size, budget)


def _as_message(output: RequestOutput) -> _Output:
    """Return an output as a message for the other ranks."""
    return OutputMessage.of(output), None if output.error is None else ErrorMessage.of(output.error)


def _as_output(message: _Output, timings: dict[int, Timings]) -> RequestOutput:
    """Return an output that rank 0 has sent; the timings are this rank's own."""
    output, error = message
    times = timings[output.request_id]
    if output.token is not None:
        times.note(output.token)
    return replace(output.output(times), error=None if error is None else error.error())
