"""What a server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from hippo_mpi.engine.request import RequestOutput
from hippo_mpi.serving.front import Front

_FIRST_TOKEN_S = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_BETWEEN_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 5, 30)


class Metrics:
    """Listens to a front."""

    def __init__(self, front: Front, num_restarts: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()

        def gauge(name: str, text: str, value: Callable[[], float]) -> None:
            Gauge(name, text, registry=self.registry).set_function(value)

        gauge("hippo_requests", "Requests under way or waiting.", lambda: front.num_requests)
        gauge("hippo_ready", "1 while ranks answer.", lambda: float(front.is_ready))
        gauge("hippo_restarts", "How often the ranks were started again.", num_restarts)
        self._ended = Counter("hippo_answers", "Answers that have ended.", ["finish_reason"], registry=self.registry)
        self._tokens = Counter("hippo_generated_tokens", "Tokens generated.", registry=self.registry)
        self._prompt = Counter("hippo_prompt_tokens", "Prompt tokens of ended answers.", registry=self.registry)
        self._cached = Counter("hippo_cached_tokens", "Those of them that were cached.", registry=self.registry)
        self._first = Histogram(
            "hippo_first_token_seconds", "From request to first token.", buckets=_FIRST_TOKEN_S, registry=self.registry
        )
        self._between = Histogram(
            "hippo_token_seconds", "Between two tokens of an answer.", buckets=_BETWEEN_S, registry=self.registry
        )
        front.on_output = self._note

    def _note(self, output: RequestOutput, before_s: float) -> None:
        timings = output.timings
        if output.token is not None:
            self._tokens.inc()
            if len(timings.token_ids) == 1:
                self._first.observe(timings.first_token_s - timings.started_s)
            else:
                self._between.observe(timings.finished_s - before_s)
        if output.finish_reason is None:
            return
        self._ended.labels(output.finish_reason).inc()
        self._prompt.inc(timings.prompt_tokens)
        self._cached.inc(timings.cached_tokens)
