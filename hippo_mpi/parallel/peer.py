"""Model calls that all ranks make together: a script runs on every rank, and its calls return the same logits on each.

In `worker.py` rank 0 decides and the others obey; here all ranks run the same program, so each knows the tokens and has
a cache. No plan travels, only hidden states round the ring, and then the last layer's output, from which every rank
computes the logits with a head of its own (lazily: a prompt's logits that nobody reads cost nothing).
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from hippo_mpi.errors import DesyncError
from hippo_mpi.sharding.stage import Forward, Stage
from hippo_mpi.transport.channel import Channel
from hippo_mpi.transport.pulse import Activity, Progress


class Peer:
    """One rank's side of a model that is called on every rank.

    Args:
        stage: this rank's layers, with a head of its own.
        channel: to the next rank and from the previous one.
        rank: this rank's number.
        size: number of ranks.
        progress: told what this rank does next; each call moves the deadline of the watchdog.
        name: of the model, the same on every rank and different for each model.
    """

    def __init__(
        self, stage: Stage, channel: Channel, rank: int, size: int, progress: Progress, name: str = ""
    ) -> None:
        self._stage, self._channel, self._progress = stage, channel, progress
        self._name, self._num_calls = name, 0
        self._passes_result_on = rank + 1 < size - 1  # the last rank made it, so the rank before it keeps it

    def call(self, tokens: mx.array, cache: list[Any] | None, options: dict[str, Any]) -> mx.array:
        """Run the model over tokens (B, L); return unevaluated logits (B, L, V).

        Args:
            tokens: the same on every rank.
            cache: the model's prompt cache; None: a new one, as phantoms need one to stand in for their layers.
            options: further arguments of the model's own code.

        Raises:
            DesyncError: another rank has called a different model, or with tokens of another shape.
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
        # Nothing else evaluates the phantoms' caches, whose graph would otherwise grow with every call.
        states = [entry.state for entry in cache if not entry.empty()]
        mx.eval([value for _, value in tree_flatten(states) if isinstance(value, mx.array)])
        assert forward.logits is not None
        return forward.logits

    def _take(self, forward: Forward, header: bytes) -> None:
        """Receive the next message, a hidden state or at the end the head's input, and run the model on from there."""
        self._progress(f"waiting for {header.decode()}", Activity.WAITING)
        message = self._channel.receive()
        if message.header != header:
            other = message.header.decode() if message.header.startswith(b"call ") else "a step of an LLM"
            raise DesyncError(
                f"this rank is at {header.decode()}, but the previous rank at {other}:"
                " every rank of a script must call its models in the same order with the same tokens"
            )
        looks = self._stage.flow.looks_at_values
        if looks:
            message.wait()
        # Some models change arrays in place (gemma3n's head), and these are sent on: give the model its own handles.
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
            forward.run(None)  # through the phantoms after this stage, while the outgoing arrays are computed
        mx.eval(outgoing)
        self._channel.deliver(outgoing)
