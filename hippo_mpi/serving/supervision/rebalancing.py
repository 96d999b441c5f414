"""Watches what the ranks work, and tells, or takes, a layer split that would be faster."""

from __future__ import annotations

import asyncio
import logging
from functools import partial

from hippo_mpi.errors import HippoError
from hippo_mpi.serving.supervision.balance import WorkWindow, may_be_better
from hippo_mpi.serving.supervision.catalogue import Catalogue
from hippo_mpi.serving.supervision.request_broker import RequestBroker

_log = logging.getLogger(__name__)
_LOOK_S = 5.0


async def watch_balance(broker: RequestBroker, catalogue: Catalogue, is_taken: bool) -> None:
    """Tell, or with `is_taken` take, a split that would be faster by what the ranks have worked, until cancelled.

    Each split of a model is told once, so that two of nearly the same speed don't take turns.
    """
    window, told = WorkWindow(), set[tuple[str, tuple[int, ...]]]()
    while True:
        await asyncio.sleep(_LOOK_S)
        about, model = broker.about, catalogue.find(broker.model)
        busy_s = [status.busy_s for status in broker.beat.ranks if status]
        if not broker.is_ready or about is None or model is None or len(busy_s) != len(about.ranks):
            continue
        worked_s = window.note(broker.num_starts, busy_s)
        if worked_s is None or not may_be_better(worked_s):  # planning takes seconds, for big models
            continue
        counts = [part.layers[1] - part.layers[0] for part in about.ranks]
        try:
            better = await catalogue.beside(
                partial(model.better_split, about.machines, counts, about.max_context, worked_s)
            )
        except HippoError as error:  # its folder may have gone meanwhile, which hurts nobody yet
            _log.warning("the ranks work unevenly, but %s can't be planned: %s", model.name, error)
            continue
        if better is None or (model.name, tuple(better.counts)) in told:
            continue
        told |= {(model.name, tuple(counts)), (model.name, tuple(better.counts))}
        _log.info(
            "in the same time the ranks worked %s s: --layer-split %s instead of %s would take %.0f %% less%s",
            ", ".join(f"{worked:.0f}" for worked in worked_s),
            ",".join(map(str, better.counts)),
            ",".join(map(str, counts)),
            100 * better.gain,
            "" if is_taken else " (--rebalance takes it by itself)",
        )
        if is_taken:
            broker.take_split(better.counts)
