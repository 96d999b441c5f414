"""The one message that carries rank 0's decisions, and its wire form.

A step is one forward pass of a micro-batch through all stages: one or more rows, the shorter ones padded on the right.
A row is addressed by position: its tokens belong at cache positions [position, position + count) of a slot. A rank
whose cache for the slot is longer trims it first, and one that holds the rows in another grouping regroups them, so
that taking tokens back and joining or leaving a micro-batch need no messages of their own.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import Flag

from hippo_mpi.errors import DesyncError

_HEAD = struct.Struct("<IBHHHH")


class Returns(Flag):
    """What comes back to rank 0 from a step; the last stage sends it, and rank 0 must then receive it."""

    NOTHING = 0
    LOGITS = 1


@dataclass(frozen=True)
class StepPlan:
    """What every rank does next: forks, detaches and drops slots, in this order, then runs the rows, if any."""

    serial: int  # counts steps from 0: a gap means that ranks are out of step
    slots: tuple[int, ...] = ()
    positions: tuple[int, ...] = ()
    counts: tuple[int, ...] = ()  # tokens of each row
    returns: Returns = Returns.NOTHING
    forks: tuple[tuple[int, int], ...] = ()  # (source, slot): the slot begins as a copy of the source
    detached: tuple[int, ...] = ()  # slots that leave a batched cache for one of their own
    drops: tuple[int, ...] = ()  # slots whose caches are freed

    @property
    def has_rows(self) -> bool:
        """True if there is a forward pass."""
        return bool(self.slots)

    @property
    def wants_logits(self) -> bool:
        """Whether the step returns logits."""
        return Returns.LOGITS in self.returns

    @property
    def num_tokens(self) -> int:
        """Tokens of the longest row."""
        return max(self.counts, default=0)

    @property
    def ends(self) -> list[int]:
        """Tokens that each row's slot holds after the step."""
        return [position + count for position, count in zip(self.positions, self.counts, strict=True)]

    def __str__(self) -> str:
        if not self.has_rows:
            return f"step {self.serial}, release of slots {', '.join(map(str, self.detached + self.drops))}"
        if len(self.slots) > 1:
            return f"step {self.serial}, {sum(self.counts)} tokens of {len(self.slots)} rows"
        kind = "check" if self.wants_logits else "prefill"
        kind = "decode" if self.num_tokens == 1 else f"{kind} of {self.num_tokens} tokens"
        return f"step {self.serial}, {kind} at {self.positions[0]} in slot {self.slots[0]}"


def encode(plan: StepPlan) -> bytes:
    """Return a plan's wire form."""
    lengths = len(plan.slots), len(plan.forks), len(plan.detached), len(plan.drops)
    forks = (number for fork in plan.forks for number in fork)
    numbers = [*plan.slots, *plan.positions, *plan.counts, *forks, *plan.detached, *plan.drops]
    head = _HEAD.pack(plan.serial, plan.returns.value, *lengths)
    return head + struct.pack(f"<{len(numbers)}i", *numbers)


def decode(wire: bytes) -> StepPlan:
    """Return the plan that `encode` made these bytes from.

    Raises:
        DesyncError: the bytes are not a plan.
    """
    try:
        serial, flags, num_rows, num_forks, num_detached, num_drops = _HEAD.unpack_from(wire)
        numbers = struct.unpack(f"<{3 * num_rows + 2 * num_forks + num_detached + num_drops}i", wire[_HEAD.size :])
        returns = Returns(flags)
    except (struct.error, ValueError) as error:
        raise DesyncError(f"expected a step, got {len(wire)} other bytes: {error}") from None
    slots, positions, counts = (numbers[start * num_rows : (start + 1) * num_rows] for start in range(3))
    rest = numbers[3 * num_rows :]
    forks = tuple(zip(rest[: 2 * num_forks : 2], rest[1 : 2 * num_forks : 2], strict=True))
    detached, drops = rest[2 * num_forks : 2 * num_forks + num_detached], rest[2 * num_forks + num_detached :]
    return StepPlan(serial, slots, positions, counts, returns, forks, detached, drops)
