"""Metrics for Prometheus, in a registry of their own so that several servers can live in one process."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from parley.inference.scheduler import Scheduler

_BUCKETS_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120)


class Metrics:
    def __init__(self, scheduler: Scheduler) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_SchedulerCollector(scheduler))
        self.requests = Counter(
            "parley_requests", "Requests by route and HTTP status.", ["route", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "parley_request_seconds",
            "From a request to the last byte of its response.",
            ["route"],
            buckets=_BUCKETS_SECONDS,
            registry=self.registry,
        )
        self.first_token = Histogram(
            "parley_first_token_seconds",
            "From a request to the first text of its output.",
            buckets=_BUCKETS_SECONDS,
            registry=self.registry,
        )
        self.prompt_tokens = Counter("parley_prompt_tokens", "Tokens of accepted prompts.", registry=self.registry)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _SchedulerCollector(Collector):
    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def collect(self) -> Iterator[Metric]:
        counts = self._scheduler.counts
        yield GaugeMetricFamily("parley_active_slots", "Requests that hold a slot.", counts.active)
        yield GaugeMetricFamily("parley_waiting_requests", "Requests that wait for a slot.", counts.waiting)
        yield CounterMetricFamily("parley_generated_tokens", "Sampled tokens.", counts.tokens)
