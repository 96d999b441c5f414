"""Steps that every rank has called: a script runs on all ranks, and its model calls return the same logits on each.

Where `worker.py` has rank 0 decide and the others obey, here all ranks run the same program: each knows the tokens and
has a cache. So no plan travels, only hidden states round the ring, and then what the last layer made, from which every
rank makes the logits with a head of its own (lazily: a prompt's logits that nobody reads cost nothing).
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from hippo_mpi.errors import DesyncError
from hippo_mpi.shard.stage import Forward, Stage
from hippo_mpi.transport.channel import Channel
from hippo_mpi.transport.pulse import Activity, Progress


class Peer:
    """One rank of a model that is called on all of them.

    Args:
        stage: this rank's layers, with a head of its own.
        channel: to the next rank and from the one before.
        rank, size: this rank's number, and how many there are.
        progress: told what this rank does next; each call moves the deadline of the watchdog.
        name: of the model, the same on every rank and another for each model.
    """

    def __init__(
        self, stage: Stage, channel: Channel, rank: int, size: int, progress: Progress, name: str = ""
    ) -> None:
        self._stage, self._channel, self._progress = stage, channel, progress
        self._name, self._num_calls = name, 0
        self._passes_result_on = rank + 1 < size - 1  # the last rank has made it

    def call(self, tokens: mx.array, cache: list[Any] | None, options: dict[str, Any]) -> mx.array:
        """Run the model over tokens (B, L); returns unevaluated logits (B, L, V).

        Without a cache the model is given a new one: phantoms stand in for layers that have one.

        Raises:
            DesyncError: another rank has called the model with tokens of another shape, or another model.
        """
        header = f"call {self._num_calls} of model {self._name} with tokens {tokens.shape}".encode()
        self._num_calls += 1
        cache = make_prompt_cache(self._stage.model) if cache is None else cache
        forward = self._stage.forward(tokens, cache, **options)
        if self._stage.leads:
            self._progress(f"computing {header.decode()}", Activity.COMPUTING)
            forward.run(None)
            assert forward.outgoing is not None
            self._channel.announce(header, forward.outgoing)
            mx.eval(forward.outgoing)
            self._channel.deliver(forward.outgoing)
        while not forward.is_done:
            self._take(forward, header)
        # Phantoms' caches are in no graph that anybody evaluates, and would make a longer one with every call.
        states = [entry.state for entry in cache if not entry.empty()]
        mx.eval([value for _, value in tree_flatten(states) if isinstance(value, mx.array)])
        assert forward.logits is not None
        return forward.logits

    def _take(self, forward: Forward, header: bytes) -> None:
        """Go on with what arrives next: a hidden state, or at the end what the head reads."""
        self._progress(f"waiting for {header.decode()}", Activity.WAITING)
        message = self._channel.receive()
        if message.header != header:
            raise DesyncError(
                f"this rank has made {header.decode()}, but the rank before {message.header.decode()}:"
                " every rank of a script must call its models in the same order with the same tokens"
            )
        looks = self._stage.flow.looks_at_values
        if looks:
            message.wait()
        # The model is given handles of its own: some change what they are given (gemma3n's head), and it travels on.
        forward.run([mx.stop_gradient(array) for array in message.arrays])
        outgoing = forward.outgoing
        is_result = outgoing is None
        if is_result and self._passes_result_on:
            outgoing = message.arrays
        if outgoing is not None:
            self._channel.announce(header, outgoing)
        if not looks:
            message.wait()
        self._progress(f"computing {header.decode()}", Activity.COMPUTING)
        if outgoing is None:
            return
        mx.async_eval(outgoing)  # type: ignore[no-untyped-call]
        if not is_result and not self._stage.leads:
            forward.run(None)  # through the phantoms behind, while what is sent is computed
        mx.eval(outgoing)
        self._channel.deliver(outgoing)
