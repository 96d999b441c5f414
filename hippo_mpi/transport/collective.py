"""Sums over all ranks and joined parts of them, in the order in which every rank's code asks for them.

Over `mx.distributed`; `local_collective.py` has them for ranks of one process.

Measured on two ranks of one machine, between matrix products (24 sums of 3 KiB a step): on the ring, an all_gather whose
parts are added locally costs 130 us, an all_sum 305 us, as it takes twice as many phases; under MPI, 110 and 40 us. A
send and a receive in turn cost 640 us on either, and a TCP connection of our own 180 us.
"""

from __future__ import annotations

import statistics
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

import mlx.core as mx

from hippo_mpi.errors import DesyncError
from hippo_mpi.transport.layout import Layout
from hippo_mpi.transport.world import World

_STEPS_ON_THE_WAY = 2  # one is computed while the graph of the next one is built
_TRIES = (20, 20, 5)
_TRIED_SIZES = (1 << 10, 1 << 14, 1 << 18)  # values: about hidden states of one token, of a few rows, of a prompt


class Collective(ABC):
    """Adds up or joins arrays of all ranks; every rank must ask for the same, in the same order.

    Attributes:
        is_lazy: whether what is returned is part of the graph, and computed with it.
        last: what the next sum or gather waits for.
    """

    is_lazy = True
    last: mx.array | None = None

    @abstractmethod
    def sum(self, part: mx.array) -> mx.array:
        """Return the sum of all ranks' parts, in the same bits on each."""

    @abstractmethod
    def gather(self, part: mx.array, widths: Sequence[int]) -> mx.array:
        """Return all ranks' parts side by side.

        Args:
            part: (..., widths[rank]).
            widths: by rank.
        """

    def choose(self) -> list[tuple[int, float]]:
        """Find the fastest way to add up arrays of several sizes; every rank must call it.

        Returns:
            Numbers of values, and the seconds that adding them up takes on this rank; nothing if there is one way only.
        """
        return []

    def begin(self, notes: bool = True) -> None:
        """Begin a step, which every rank must do.

        Args:
            notes: whether `note` counts in it: not where some of the step won't be computed.
        """
        self.forget()

    def forget(self) -> None:
        """Keep no longer what the last sum was made from."""
        self.last = None

    @abstractmethod
    def note(self, choices: mx.array) -> None:
        """Note which experts this rank's router has chosen, in their order; all ranks should choose the same."""

    def flush(self) -> None:
        """Wait for the last sum."""
        if self.last is not None:
            mx.eval(self.last)


class _BetweenProcesses(Collective):
    """Compares what the routers of different ranks choose, each for itself, from hidden states that are equal.

    Chips that round differently might choose different experts, whose sums would be nonsense. What a rank has noted in a
    step goes round at the start of the next one, and is looked at two steps later, when it is there for certain.

    Args:
        names: of the ranks that take part, for people.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._notes = True
        self._noted: mx.array | None = None
        self._compared: deque[mx.array] = deque()

    def begin(self, notes: bool = True) -> None:
        """Begin a step; compare what was noted in the one before.

        Raises:
            DesyncError: ranks have chosen different experts.
        """
        super().begin()
        noted, self._noted, self._notes = self._noted, None, notes
        if noted is not None:
            self._compared.append(self.gather(noted[None], [1] * len(self._names)))
        if len(self._compared) > _STEPS_ON_THE_WAY:
            self._check(self._compared.popleft().tolist())  # type: ignore[arg-type]

    def note(self, choices: mx.array) -> None:
        """Note which experts this rank's router has chosen."""
        if self._notes:
            places = mx.arange(1, choices.size + 1, dtype=mx.uint32)
            noted = (choices.flatten().astype(mx.uint32) * places).sum()
            self._noted = noted if self._noted is None else 31 * self._noted + noted

    def _check(self, found: list[int]) -> None:
        for name, noted in zip(self._names, found, strict=True):
            if noted != found[0]:
                raise DesyncError(
                    f"{name} has chosen other experts than {self._names[0]} for the same tokens: their processors round"
                    " differently; use a pipeline (--parallel pipeline, hippo_mpi.pipeline)"
                )


class RankCollective(_BetweenProcesses):
    """Works over `mx.distributed`.

    Args:
        world: the ranks that take part. Its group is looked up at each sum: MPI is left when the last reference to it goes.
        is_lazy: whether sums are part of the graph. MLX computes them on a CPU stream: on a CPU that is the stream of the
            computation itself. On a GPU a kernel would wait for the network, which can hang a Mac; there, each sum
            is evaluated at once, and everything before it.
        names: of these ranks, for people.
    """

    def __init__(self, world: World, is_lazy: bool, names: Sequence[str]) -> None:
        super().__init__(names)
        self._world, self.is_lazy = world, is_lazy
        self._gathers = dict.fromkeys(_TRIED_SIZES, False)  # by the least size that was tried and isn't smaller

    def choose(self) -> list[tuple[int, float]]:
        """Take the faster way to add up arrays of each size, by the sum of the ranks' times."""
        found = []
        for size, tries in zip(_TRIED_SIZES, _TRIES, strict=True):
            part = mx.zeros((size,))
            summed, gathered = (
                statistics.median(self._seconds(gathers, part) for _ in range(tries)) for gathers in (False, True)
            )
            gained = self._all_sum(mx.array([summed - gathered]))
            self._gathers[size] = bool((gained > 0).item())
            found.append((size, gathered if self._gathers[size] else summed))
        return found

    def _seconds(self, gathers: bool, part: mx.array) -> float:
        began = time.perf_counter()
        mx.eval(self._gathered(part) if gathers else self._all_sum(part))
        return time.perf_counter() - began

    def sum(self, part: mx.array) -> mx.array:
        """Return the sum of all ranks' parts."""
        return self._in_order(part, self._added)

    def gather(self, part: mx.array, widths: Sequence[int]) -> mx.array:
        """Return all ranks' parts side by side."""
        return self._in_order(part, lambda own: self._joined(own, widths))

    def _in_order(self, part: mx.array, operation: Callable[[mx.array], mx.array]) -> mx.array:
        if not self.is_lazy:
            mx.eval(part)
        elif self.last is not None:
            # Two sums that don't depend on each other might be computed in another order on another rank.
            part = mx.depends([part], [self.last])[0]
        whole = operation(part)
        if not self.is_lazy:
            mx.eval(whole)
        self.last = whole
        return whole

    def _joined(self, part: mx.array, widths: Sequence[int]) -> mx.array:
        missing = max(widths) - part.shape[-1]
        padded = mx.pad(part, [(0, 0)] * (part.ndim - 1) + [(0, missing)]) if missing else part
        parts = mx.distributed.all_gather(padded[None], group=self._world.group)
        return mx.concatenate([parts[rank][..., :width] for rank, width in enumerate(widths)], -1)

    def _added(self, part: mx.array) -> mx.array:
        size = next((size for size in _TRIED_SIZES if size >= part.size), _TRIED_SIZES[-1])
        return self._gathered(part) if self._gathers[size] else self._all_sum(part)

    def _all_sum(self, part: mx.array) -> mx.array:
        return mx.distributed.all_sum(part, group=self._world.group)

    def _gathered(self, part: mx.array) -> mx.array:
        parts = mx.distributed.all_gather(part[None], group=self._world.group)
        total = parts[0]
        for rank in range(1, self._world.size):  # in this order on every kind of processor
            total = total + parts[rank]
        return total


class ChainCollective(_BetweenProcesses):
    """Sums over some neighbours on a ring, whose backend can't split a group.

    Partial sums go from the last of them to the first, and the result comes back. Each message is evaluated at once:
    inside a graph, nothing keeps a receive behind the send that it answers.

    Args:
        world: all ranks.
        first: of the ranks that take part, one after the other.
        names: of these ranks, for people.
    """

    is_lazy = False

    def __init__(self, world: World, first: int, names: Sequence[str]) -> None:
        super().__init__(names)
        self._world = world
        self._before = world.rank - 1 if world.rank > first else None
        self._behind = world.rank + 1 if world.rank < first + len(names) - 1 else None
        self._place = world.rank - first

    def sum(self, part: mx.array) -> mx.array:
        """Return the sum of all ranks' parts."""
        if self._behind is not None:
            part = part + self._received(part, self._behind)
        if self._before is not None:
            self._send(part, self._before)
            part = self._received(part, self._before)
        if self._behind is not None:
            self._send(part, self._behind)
        self.last = part
        return part

    def gather(self, part: mx.array, widths: Sequence[int]) -> mx.array:
        """Return all ranks' parts side by side; each adds zeros for what others have, which changes no value."""
        before, behind = sum(widths[: self._place]), sum(widths[self._place + 1 :])
        return self.sum(mx.pad(part, [(0, 0)] * (part.ndim - 1) + [(before, behind)]))

    def _send(self, part: mx.array, rank: int) -> None:
        mx.eval(mx.distributed.send(part, rank, group=self._world.group))

    def _received(self, like: mx.array, rank: int) -> mx.array:
        received = mx.distributed.recv_like(like, rank, group=self._world.group)
        mx.eval(received)
        return received


def collective_of(world: World, layout: Layout, is_lazy: bool, names: Sequence[str]) -> Collective:
    """Return what the ranks of this rank's stage add up with.

    Args:
        world: all ranks.
        layout: how they share the model.
        is_lazy: whether sums are part of the graph, where that can be.
        names: of all ranks, for people.
    """
    if layout.stages == 1:
        return RankCollective(world, is_lazy, names)
    place = layout.place(world.rank)
    first = place.stage * layout.shards
    own = names[first : first + layout.shards]
    if world.backend == "mpi" and world.group is not None:
        part = replace(world, rank=place.shard, size=layout.shards, group=world.group.split(place.stage))
        return RankCollective(part, is_lazy, own)
    return ChainCollective(world, first, own)


def is_in_graph(asked: str | None) -> bool:
    """Return whether sums are part of the graph: as it was asked for ("graph" or "stepwise"), or on a CPU."""
    return mx.default_device() == mx.cpu if asked is None else asked == "graph"
