"""What the front and rank 0 say to each other: a message is a line of JSON, made and read by msgspec.

Nothing here is ever executed or unpickled. What isn't as its type says raises a msgspec.DecodeError.
"""

from __future__ import annotations

import msgspec

from hippo_mpi.engine.messages import ErrorMessage, OutputMessage
from hippo_mpi.engine.request import Request
from hippo_mpi.planning.layer_split import Machine
from hippo_mpi.transport.rank_status import RankStatus
from hippo_mpi.units import show_layers

MAX_LINE_BYTES = 64 << 20  # a prompt of some million tokens
FRONT = "HIPPO_FRONT"
"""Environment variable with the path of the front's socket: who has it is a rank that the front has started."""


# ---- from the front


class Add(msgspec.Struct, tag="add", frozen=True):
    """Answer this request."""

    request: Request


class Abort(msgspec.Struct, tag="abort", frozen=True):
    """Nobody wants the rest of a request's answer."""

    request_id: int


Order = Add | Abort


# ---- from rank 0


class RankPart(msgspec.Struct, frozen=True):
    """What a rank holds: layers [start, stop) of the model."""

    host: str
    layers: tuple[int, int]
    weight_bytes: int


class Ready(msgspec.Struct, tag="ready", frozen=True):
    """The ranks have loaded the model, and this is what they can do.

    Attributes:
        machines: the budget of each rank before it loaded anything.
        layout: which of those that `--parallel auto` compares, by name.
    """

    max_context: int
    vocab_size: int
    ranks: list[RankPart] = []
    machines: list[Machine] = []
    layout: str | None = None

    @property
    def where(self) -> str:
        """Say which layers are on which host."""
        return ", ".join(f"{rank.host} {show_layers(*rank.layers)}" for rank in self.ranks)


class Taking(msgspec.Struct, tag="taking", frozen=True):
    """The request that is being read now, so that it is known what ended a rank; None: it has been read."""

    request_id: int | None


class Begun(msgspec.Struct, tag="begun", frozen=True):
    """The next step is the first of these requests."""

    request_ids: list[int]


class Waiting(msgspec.Struct, tag="waiting", frozen=True):
    """A request that had begun, with its grammar, waits for its first step."""

    request_id: int


class Refused(msgspec.Struct, tag="refused", frozen=True):
    """A request has met an error, and ended."""

    request_id: int
    error: ErrorMessage


class Beat(msgspec.Struct, tag="beat", frozen=True):
    """Rank 0 lives.

    Attributes:
        ranks: what each rank said of itself last; None before it has a model.
        waiting: requests that no step has begun.
        stalled_s: for how many seconds no rank has got on; 0 if they do.
    """

    ranks: list[RankStatus | None]
    waiting: int
    stalled_s: float


Report = Ready | Taking | Begun | Waiting | Refused | Beat | OutputMessage

_encoder = msgspec.json.Encoder()
read_order = msgspec.json.Decoder(Order).decode
read_report = msgspec.json.Decoder(Report).decode


def line_of(message: Order | Report) -> bytes:
    """Return a message as the line that `read_order` or `read_report` reads."""
    return _encoder.encode(message) + b"\n"
