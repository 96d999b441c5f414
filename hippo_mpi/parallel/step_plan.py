"""The one message that rank 0's decisions travel in, and its wire form.

A step is one forward pass of one row of tokens through all stages. The row is addressed by position: these
tokens belong at cache positions [position, position + num_tokens) of a slot. A rank whose cache for the slot is
longer trims it first, so that taking tokens back needs no message of its own.
"""

from __future__ import annotations

import struct
from dataclasses import astuple, dataclass

_WIRE = struct.Struct("<IiiiB")


@dataclass(frozen=True)
class StepPlan:
    """What every rank does next. Without tokens, the slot's cache is dropped."""

    serial: int  # counts steps from 0: a gap means that ranks have lost each other
    slot: int
    position: int
    num_tokens: int
    wants_logits: bool  # whether the last stage sends its result to rank 0; nobody may leave it unread

    @property
    def is_release(self) -> bool:
        return self.num_tokens == 0

    def __str__(self) -> str:
        if self.is_release:
            return f"step {self.serial}, release of slot {self.slot}"
        kind = "decode" if self.num_tokens == 1 else f"prefill of {self.num_tokens} tokens"
        return f"step {self.serial}, {kind} at {self.position} in slot {self.slot}"


def encode(plan: StepPlan) -> bytes:
    return _WIRE.pack(*astuple(plan))


def decode(wire: bytes) -> StepPlan:
    """The inverse of `encode`."""
    serial, slot, position, num_tokens, wants_logits = _WIRE.unpack(wire)
    return StepPlan(serial, slot, position, num_tokens, bool(wants_logits))
