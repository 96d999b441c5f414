"""What ranks say to each other over the control connections: JSON, made and read by msgspec. No MLX."""

from __future__ import annotations

import msgspec

from hippo_mpi.transport.rank_status import RankStatus


class Beat(msgspec.Struct, tag="beat", frozen=True):
    """A rank lives.

    Attributes:
        progress: how many things it has finished.
        doing: what it does, in words.
        is_working: whether it uses the CPU for that.
        longest_s: seconds of its longest step so far.
        status: what it says of itself; None before it has a model.
    """

    progress: int
    doing: str
    is_working: bool
    longest_s: float
    status: RankStatus | None


class Report(msgspec.Struct, tag="report", frozen=True):
    """A message of those above, whose type both sides know."""

    body: msgspec.Raw


class Failure(msgspec.Struct, tag="fail", frozen=True):
    """All ranks must end: the line that says why, and the status to end with."""

    line: str
    code: int


class Bye(msgspec.Struct, tag="bye", frozen=True):
    """A good end: that the connection closes is no failure."""


RankMessage = Beat | Report | Failure | Bye

encode = msgspec.json.Encoder().encode
decode_message = msgspec.json.Decoder(RankMessage).decode
