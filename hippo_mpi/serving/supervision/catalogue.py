"""The models that a server offers: their cards, and whether a model fits the machines."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_config

from hippo_mpi.checkpoint.checkpoint import ModelSource, open_checkpoint
from hippo_mpi.checkpoint.precision import stored_precision
from hippo_mpi.config.parser import OptionsParser
from hippo_mpi.config.serve_options import MODES, CardOptions
from hippo_mpi.config.yaml_file import Settings, words_of
from hippo_mpi.engine.request import SamplingParams
from hippo_mpi.engine.text import ChatFormat, open_tokenizer
from hippo_mpi.errors import UserError
from hippo_mpi.planning.costs import ModelInfo
from hippo_mpi.planning.layer_split import LayerSplit, Machine, plan_split
from hippo_mpi.planning.model_costs import model_info
from hippo_mpi.serving.supervision.balance import BetterSplit, better_split
from hippo_mpi.sharding.slot_caches import KVSettings

_P = TypeVar("_P")
_log = logging.getLogger(__name__)


class ServedModel:
    """A model as the front knows it: its name, options and tokenizer. What takes time is done on first use.

    Args:
        options: all options of its ranks.
        card: those of its card, as words of a command line.
    """

    def __init__(self, name: str, options: CardOptions, card: Sequence[str] = ()) -> None:
        self.name, self.options, self.card = name, options, card
        self.defaults = replace(SamplingParams.from_options(options), seed=options.seed)
        self.chat_format = ChatFormat.from_options(options)
        self.system_prompt = options.system_prompt

    @classmethod
    def from_card(cls, name: str, card: Settings) -> ServedModel:
        """Return the model of a card; all else has its default."""
        words = words_of(card, CardOptions)
        return cls(name, OptionsParser(CardOptions, add_help=False).read(words), words)

    @cached_property
    def source(self) -> ModelSource:
        """Where it comes from; the first use downloads a repo's small files."""
        return ModelSource.from_options(self.options)

    @property
    def path(self) -> Path:
        """Its folder."""
        return self.source.path

    @cached_property
    def tokenizer(self) -> TokenizerWrapper:
        """Its tokenizer."""
        eos = load_config(self.path).get("eos_token_id")
        return open_tokenizer(self.path, eos, tuple(self.options.extra_eos_token), self.options.trust_remote_code)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The checkpoint's config.json."""
        return dict(load_config(self.path))

    @cached_property
    def info(self) -> ModelInfo:
        """What the planner knows of it; its code runs once on arrays that hold nothing."""
        began_s = time.monotonic()
        info = model_info(open_checkpoint(self.source), KVSettings.from_options(self.options))
        if draft := ModelSource.of_draft(self.options):
            info = info.with_draft(model_info(open_checkpoint(draft), KVSettings()), self.options.num_draft_tokens)
        _log.info("read %s for planning in %.1f s", self.name, time.monotonic() - began_s)
        return info

    @property
    def modes(self) -> list[str]:
        """What can be asked of it: those of config.MODES that it has, and that its card allows.

        Raises:
            UserError: the card names one that it doesn't have.
        """
        tokenizer, allowed = self.tokenizer, self.options.modes or MODES
        has = {
            "chat": tokenizer.has_chat_template,
            "tools": tokenizer.has_tool_calling,
            "thinking": tokenizer.has_thinking,
        }
        found = ["completion", *(mode for mode, is_there in has.items() if is_there)]
        if missing := [mode for mode in self.options.modes if mode not in found]:
            raise UserError(f"modes of {self.name}: its chat template doesn't support {' or '.join(missing)}")
        return [mode for mode in found if mode in allowed]

    @property
    def precision(self) -> str:
        """Such as 4bit, or bfloat16: what its card says, or the checkpoint."""
        return self.options.precision or stored_precision(self.config)

    def plan(self, machines: Sequence[Machine]) -> LayerSplit:
        """Plan the layer split for these machines.

        Raises:
            PlanError: it doesn't fit; the message has the numbers.
        """
        split = self.options.layer_split
        usable = split if split and len(split) == len(machines) else None
        return plan_split(self.info, machines, self.options.max_context, usable)

    def better_split(
        self, machines: Sequence[Machine], counts: Sequence[int], max_context: int, worked_s: Sequence[float]
    ) -> BetterSplit | None:
        """Return a faster split than the one with these layers per rank, by what each has worked; None: there is none."""
        return better_split(plan_split(self.info, machines, max_context, counts), worked_s)


class Catalogue:
    """Models by name; the first is served first."""

    def __init__(self, models: Iterable[ServedModel]) -> None:
        self._models = {model.name: model for model in models}
        self._to_plan: queue.Queue[Callable[[], None]] = queue.Queue()
        self._planner: threading.Thread | None = None

    async def beside(self, plan: Callable[[], _P]) -> _P:
        """Return what a method of a model's returns that plans; it runs beside the event loop.

        It runs in a thread that never ends: the end of a thread that has used MLX crashes the process.
        """
        if self._planner is None:
            self._planner = threading.Thread(target=self._plan_all, name="hippo-planner", daemon=True)
            self._planner.start()
        found: Future[_P] = Future()

        def note() -> None:
            try:
                found.set_result(plan())
            except Exception as error:  # whoever waits for it raises it
                found.set_exception(error)

        self._to_plan.put(note)
        return await asyncio.wrap_future(found)

    def _plan_all(self) -> None:
        while True:
            self._to_plan.get()()

    @property
    def names(self) -> list[str]:
        """Names of all models, the first one first."""
        return list(self._models)

    @property
    def first(self) -> ServedModel:
        """The model that is loaded first."""
        return next(iter(self._models.values()))

    def find(self, name: str) -> ServedModel | None:
        """Return the model of a name; None: there is none."""
        return self._models.get(name)
