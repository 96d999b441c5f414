"""The engine for scripts: answers many prompts at once and yields the same outputs on every rank."""

from __future__ import annotations

import queue
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

from mlx_lm.tokenizer_utils import TokenizerWrapper

from hippo_mpi.config import BUNDLED_MODEL
from hippo_mpi.engine.engine import Engine
from hippo_mpi.engine.request import Request, RequestOutput, SamplingParams, Timings, TokenLogprobs, check_request
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
                self._tell({"outputs": [_as_message(output) for output in outputs]})
                yield outputs
        finally:
            for request in requests:
                engine.abort(request.id)
            for _ in engine.run():
                pass
            self._tell({})
            self._pipeline.release()

    def _follow(self, requests: Sequence[Request]) -> Generator[list[RequestOutput], None, None]:
        timings = {request.id: Timings(prompt_tokens=len(request.prompt)) for request in requests}
        is_followed = is_told = False
        try:
            while not (is_followed and is_told):
                is_followed = is_followed or self._follower.follow() is None
                for message in () if is_told else self._told(waits=is_followed):
                    is_told = is_told or not message
                    yield [_as_output(output, timings) for output in message.get("outputs", ())]
        finally:
            while not is_followed:  # the script has left the loop, here and on rank 0
                is_followed = self._follower.follow() is None
            while not is_told:
                is_told = not self._control.reports.get()[1]

    def _tell(self, message: dict[str, Any]) -> None:
        """Send outputs to the other ranks; an empty message means that there are no more."""
        for rank in range(1, self.ring.world.size):
            self._control.report(message, rank)

    def _told(self, waits: bool) -> Iterator[dict[str, Any]]:
        """Yield the messages that rank 0 has sent so far; with `waits`, wait for all of them up to the empty one."""
        while True:
            try:
                message = self._control.reports.get(block=waits)[1]
            except queue.Empty:
                return
            yield message
            if not message:
                return


def _build_engine(pipeline: Pipeline, tokenizer: TokenizerWrapper, max_batch_size: int) -> Engine:
    """Build rank 0's engine, within the room that the plan leaves for caches."""
    agreement = pipeline.agreement
    limits, budget = room_for_many(agreement, max_batch_size)
    limits = replace(limits, deadline_s=pipeline.control.timeout_s)
    return Engine(pipeline.leader(), tokenizer, limits, agreement.max_context, agreement.vocab_size, budget)


def _as_message(output: RequestOutput) -> dict[str, Any]:
    """Return an output as an object that can be sent to the other ranks."""
    logprobs = output.logprobs
    return {
        "id": output.request_id,
        "text": output.text,
        "token": output.token,
        "logprobs": None if logprobs is None else logprobs.as_object(),
        "reason": output.finish_reason,
        "error": None if output.error is None else [str(output.error), output.error.exit_code],
    }


def _as_output(message: dict[str, Any], timings: dict[int, Timings]) -> RequestOutput:
    """Read an output that rank 0 has sent; the timings are this rank's own."""
    error = None
    if message["error"] is not None:
        error = HippoError(message["error"][0])
        error.exit_code = message["error"][1]
    written = message["logprobs"]
    logprobs = None if written is None else TokenLogprobs.from_object(written)
    times = timings[message["id"]]
    if message["token"] is not None:
        times.note(message["token"])
    return RequestOutput(message["id"], message["text"], message["token"], times, logprobs, message["reason"], error)
