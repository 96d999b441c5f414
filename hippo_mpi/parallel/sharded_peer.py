"""Calls of a model of whose layers every rank holds a part: all ranks make the same call, and add up inside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from hippo_mpi.errors import DesyncError
from hippo_mpi.transport.channel import Channel
from hippo_mpi.transport.collective import RankCollective
from hippo_mpi.transport.pulse import Activity, Progress


class ShardedPeer:
    """One rank's side of a model that is called on every rank.

    Args:
        model: with this rank's part of each layer.
        run_model: the model's own code.
        channel: to the next rank and from the previous one.
        collective: what the model's layers add up with.
        progress: told what this rank does next; each call moves the deadline of the watchdog.
        name: of the model, the same on every rank and different for each model.
    """

    def __init__(
        self,
        model: Any,
        run_model: Callable[..., mx.array],
        channel: Channel,
        collective: RankCollective,
        progress: Progress,
        name: str,
    ) -> None:
        self._model, self._run_model = model, run_model
        self._channel, self._collective = channel, collective
        self._progress, self._name, self._num_calls = progress, name, 0

    def call(self, tokens: mx.array, cache: list[Any] | None, options: dict[str, Any]) -> mx.array:
        """Run the model over tokens (B, L); return unevaluated logits (B, L, V).

        All sums are made here, on every rank, whether or not its script looks at the logits.

        Args:
            tokens: the same on every rank.
            cache: the model's prompt cache; None: a new one.
            options: further arguments of the model's own code.

        Raises:
            DesyncError: another rank has called a different model, or with tokens of another shape.
        """
        header = f"call {self._num_calls} of model {self._name} with tokens {tokens.shape}".encode()
        self._num_calls += 1
        self._progress(f"computing {header.decode()}", Activity.TOGETHER)
        if self._collective.is_lazy:
            cache = make_prompt_cache(self._model) if cache is None else cache
            logits = self._run(tokens, cache, options)
            self._meet(header)
            mx.eval(self._collective.last, _arrays(cache))  # here, where a deadline runs
            return logits
        self._meet(header)  # before the first sum
        return self._run(tokens, cache, options)

    def _run(self, tokens: mx.array, cache: list[Any] | None, options: dict[str, Any]) -> mx.array:
        self._collective.begin()
        return self._run_model(tokens, cache=cache, **options)

    def _meet(self, header: bytes) -> None:
        """See that the previous rank makes the same call."""
        self._channel.announce(header, [])
        self._progress(f"waiting for {header.decode()}", Activity.WAITING)
        other = self._channel.receive().header
        if other != header:
            said = other.decode() if other.startswith(b"call ") else "a step of an LLM"
            raise DesyncError(
                f"this rank is at {header.decode()}, but the previous rank at {said}:"
                " every rank of a script must call its models in the same order with the same tokens"
            )
        self._progress(f"computing {header.decode()}", Activity.TOGETHER)


def _arrays(cache: list[Any]) -> list[mx.array]:
    states = [entry.state for entry in cache if not entry.empty()]
    return [value for _, value in tree_flatten(states) if isinstance(value, mx.array)]
