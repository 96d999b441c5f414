"""The metrics of a server for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from hippo_mpi.engine.request import RequestOutput
from hippo_mpi.serving.api.audit_log import AuditLog
from hippo_mpi.serving.supervision.request_broker import RequestBroker

_FIRST_BUCKETS_S = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_BETWEEN_BUCKETS_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 5, 30)


class Metrics:
    """The metrics of a front and its audit log, in a registry of their own."""

    def __init__(self, broker: RequestBroker, audit: AuditLog | None = None) -> None:
        self.registry = CollectorRegistry()

        def gauge(name: str, text: str, value: Callable[[], float]) -> None:
            Gauge(name, text, registry=self.registry).set_function(value)

        gauge("hippo_requests", "Requests running or waiting.", lambda: broker.num_requests)
        gauge("hippo_ready", "1 while the ranks are ready.", lambda: float(broker.is_ready and not broker.why_stuck))
        gauge("hippo_restarts", "Restarts of the ranks after failures.", lambda: broker.num_restarts)
        if audit is not None:
            gauge("hippo_audit_lost_requests", "Requests that aren't in the audit log.", lambda: audit.num_lost)
        self._ended = Counter("hippo_answers", "Finished answers.", ["finish_reason"], registry=self.registry)
        self._tokens = Counter("hippo_generated_tokens", "Tokens generated.", registry=self.registry)
        self._prompt = Counter("hippo_prompt_tokens", "Prompt tokens of finished answers.", registry=self.registry)
        self._cached = Counter("hippo_cached_tokens", "Prompt tokens found in a cache.", registry=self.registry)
        self._draft = Counter("hippo_draft_tokens", "Tokens proposed by a draft model.", registry=self.registry)
        self._accepted = Counter(
            "hippo_accepted_draft_tokens", "Draft tokens that were accepted.", registry=self.registry
        )
        self._first = Histogram(
            "hippo_first_token_seconds",
            "Time from request to first token.",
            buckets=_FIRST_BUCKETS_S,
            registry=self.registry,
        )
        self._between = Histogram(
            "hippo_token_seconds",
            "Time between two tokens of an answer.",
            buckets=_BETWEEN_BUCKETS_S,
            registry=self.registry,
        )
        self.registry.register(_Ranks(broker))
        broker.on_output = self._note
        broker.on_early_end = lambda reason: self._ended.labels(reason).inc()

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
        self._draft.inc(timings.num_draft_tokens)
        self._accepted.inc(timings.num_accepted)


class _Ranks(Collector):
    """The metrics that the ranks last reported. Their counters begin again at 0 when the ranks are restarted."""

    def __init__(self, broker: RequestBroker) -> None:
        self._broker = broker

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        busy = CounterMetricFamily("hippo_rank_busy_seconds", "Time that a rank was busy.", labels=["rank"])
        hop = CounterMetricFamily("hippo_hop_seconds", "Time that arrays took to reach a rank.", labels=["rank"])
        hops = CounterMetricFamily("hippo_hops", "Messages with arrays sent to a rank.", labels=["rank"])
        cache = GaugeMetricFamily("hippo_cache_bytes", "Size of a rank's KV caches.", labels=["rank"])
        in_flight = GaugeMetricFamily("hippo_steps_in_flight", "Steps in flight.")
        for rank, status in enumerate(self._broker.beat.ranks):
            if status is None:
                continue
            busy.add_metric([str(rank)], status.busy_s)
            hop.add_metric([str(rank)], status.hop_s)
            hops.add_metric([str(rank)], status.num_hops)
            cache.add_metric([str(rank)], status.cache_bytes)
            if status.num_in_flight is not None:
                in_flight.add_metric([], status.num_in_flight)
        yield from (busy, hop, hops, cache, in_flight)
