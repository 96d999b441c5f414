"""The engine for scripts: answers many prompts at once and yields the same outputs on every rank."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

from mlx_lm.tokenizer_utils import TokenizerWrapper

from hippo_mpi.config.bundled import BUNDLED_MODEL
from hippo_mpi.engine.request import Request, RequestOutput, SamplingParams, check_request, check_sampling
from hippo_mpi.engine.text import ChatFormat, encode
from hippo_mpi.errors import HippoError
from hippo_mpi.library.answering import LoadedModel
from hippo_mpi.library.loading import LoadOptions
from hippo_mpi.library.pipelined import START_TIMEOUT_S, TIMEOUT_S
from hippo_mpi.transport.script_ring import Group, join

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
        self._loaded: LoadedModel | None = None

    def __enter__(self) -> Self:
        """Load this rank's layers.

        Raises:
            HippoError: on a single rank, the model can't be used or doesn't fit. Several ranks end with its line.
        """
        ring = join(self._group, self._start_timeout, self._timeout)
        agreement = self._options.negotiate(ring, shares_head=False)
        try:
            self._loaded = LoadedModel(ring, agreement, self._max_batch_size)
        except HippoError as error:
            ring.control.fail(error)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        """Release the model. An exception of the script isn't suppressed, and ends the other ranks with it."""
        loaded, self._loaded = self._loaded, None
        if loaded is not None:
            loaded.leave(is_orderly=kind is None)

    @property
    def rank(self) -> int:
        """Return this rank's number; rank 0 is the one that should print."""
        return self._here.ring.world.rank

    @property
    def tokenizer(self) -> TokenizerWrapper:
        """Return the model's tokenizer."""
        return self._here.tokenizer

    @property
    def _here(self) -> LoadedModel:
        if self._loaded is None:
            raise RuntimeError("the model is loaded only inside `with LLM(...) as llm:`")
        return self._loaded

    def generate(
        self, prompts: str | Sequence[Prompt], sampling: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> Generator[RequestOutput, None, None]:
        """Answer prompts, and yield what each step adds to an answer, that of prompt number `request_id`.

        Leaving the loop early aborts the remaining prompts; every rank must do so at the same output. So does beginning
        another loop of this LLM: what is then asked of the earlier one raises a UserError. Inside the loop, no other LLM
        or model of ours can be used.

        Args:
            prompts: one text, or a list of texts, of lists of tokens, or of lists of messages.
            sampling: parameters for all prompts, or one set for each.

        Raises:
            UserError: a prompt can't be answered, or not with these parameters; then none has been started.
        """
        here = self._here
        asked: Sequence[Prompt] = [prompts] if isinstance(prompts, str) else prompts
        if sampling is None or isinstance(sampling, SamplingParams):
            sampling = [sampling or SamplingParams()] * len(asked)
        requests = [
            Request(number, self._encode(prompt), params)
            for number, prompt, params in zip(here.next_numbers(len(asked)), asked, sampling, strict=True)
        ]
        for request in requests:
            check_sampling(request.sampling)
            check_request(request.prompt, request.sampling, here.max_context, here.vocab_size)
        return here.answer(requests)

    def _encode(self, prompt: Prompt) -> list[int]:
        """Return a prompt's tokens."""
        if isinstance(prompt, str):
            return encode(self.tokenizer, prompt)
        if prompt and isinstance(prompt[0], dict):
            return ChatFormat().encode(self.tokenizer, cast(list[dict[str, Any]], list(prompt)))
        return list(cast(Sequence[int], prompt))
