"""Watches what the ranks work, and tells, or takes, a layer split that would be faster."""

from __future__ import annotations

import asyncio
import logging
from functools import partial

from hippo_mpi.serving.supervision.balance import WorkWindow
from hippo_mpi.serving.supervision.catalogue import Catalogue
from hippo_mpi.serving.supervision.request_broker import RequestBroker

_log = logging.getLogger(__name__)
_LOOK_S = 5.0


async def watch_balance(broker: RequestBroker, catalogue: Catalogue, is_taken: bool) -> None:
    """Tell, or with `is_taken` take, a split that would be faster by what the ranks have worked, until cancelled."""
    window = WorkWindow()
    while True:
        await asyncio.sleep(_LOOK_S)
        about, model = broker.about, catalogue.find(broker.model)
        busy_s = [status.busy_s for status in broker.beat.ranks if status]
        if not broker.is_ready or about is None or model is None or len(busy_s) != len(about.ranks):
            continue
        worked_s = window.note(broker.num_starts, busy_s)
        if worked_s is None:
            continue
        counts = [part.layers[1] - part.layers[0] for part in about.ranks]
        better = await catalogue.beside(
            partial(model.better_split, about.machines, counts, about.max_context, worked_s)
        )
        if better is None:
            continue
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
