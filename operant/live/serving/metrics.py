"""A server's metrics for Prometheus: counted as things happen, and looked up when it asks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from operant.types import Completion

__all__ = ["Metrics"]

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

SOURCES = 200  # that metrics tell of; GET /v1/sources tells of all


class Metrics:
    """The counters of one server, in a registry of their own so that several servers may share a process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        options: dict[str, Any] = {"registry": self.registry, "namespace": "operant"}
        self.requests = Counter("requests", "HTTP requests", ["route", "status"], **options)
        self.request_seconds = Histogram(
            "request_seconds", "From a request to the first byte of its response", ["route"], buckets=_SECONDS,
            **options,
        )  # fmt: skip
        self.refused = Counter("refused", "Completions refused because too many were waiting", **options)
        self.completions = Counter("completions", "Answers by how they ended", ["status"], **options)
        self.tokens = Counter("tokens", "Tokens of answers", **options)
        self.completion_seconds = Histogram(
            "completion_seconds", "From a request to the last token of an answer, recorded", buckets=_SECONDS, **options
        )
        self.feedback = Counter("feedback", "Feedback events accepted", ["kind", "way"], **options)
        self.limited = Counter(
            "limited", "Requests refused because their key or source was over its rate", ["what"], **options
        )
        self.storage_faults = Counter("storage_faults", "Calls to the store that failed", **options)
        self._of_sources = {
            "events": Gauge("source_events", "Its feedback by what became of it", ["source", "state"], **options),
            "reward": Gauge("source_reward", "Mean of a source's thumbs and scores, -1 to 1", ["source"], **options),
            "reputation": Gauge("source_reputation", "How far others agree with it, 0 to 1", ["source"], **options),
            "influence": Gauge("source_influence", "Its share of what was learned lately", ["source"], **options),
        }  # fmt: skip
        self._gauges: dict[str, Gauge] = {}

    def count_answer(self, completion: Completion, status: str, seconds: float) -> None:
        """An answer has ended. status: how; seconds: since it was asked for."""
        self.completions.labels(status).inc()
        self.tokens.inc(len(completion.tokens))
        self.completion_seconds.observe(seconds)

    def set_sources(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """The most talkative of the rows of `sources.by_source`, as gauges with the label `source`."""
        for gauge in self._of_sources.values():
            gauge.clear()
        for row in rows[:SOURCES]:
            for name in ("pending", "used", "superseded", "unused"):
                self._of_sources["events"].labels(row["source"], name).set(row[name])
            for name in ("reward", "reputation", "influence"):
                if row[name] is not None:
                    self._of_sources[name].labels(row["source"]).set(row[name])

    def render(self, now: Mapping[str, float]) -> bytes:
        """The text that Prometheus reads, with these numbers as gauges of their names."""
        for name, value in now.items():
            if name not in self._gauges:
                words = name.replace("_", " ")
                self._gauges[name] = Gauge(name, words, namespace="operant", registry=self.registry)
            self._gauges[name].set(value)
        return bytes(generate_latest(self.registry))
