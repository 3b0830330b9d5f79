"""What Prometheus reads of a server: counted as it happens, and looked up when it asks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from operant.types import Completion

__all__ = ["Metrics"]

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


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
        self.storage_faults = Counter("storage_faults", "Calls to the store that failed", **options)
        self._gauges: dict[str, Gauge] = {}

    def finished(self, completion: Completion, status: str, seconds: float) -> None:
        self.completions.labels(status).inc()
        self.tokens.inc(len(completion.tokens))
        self.completion_seconds.observe(seconds)

    def page(self, now: Mapping[str, float]) -> bytes:
        """The text that Prometheus reads, with these numbers as gauges of their names."""
        for name, value in now.items():
            if name not in self._gauges:
                words = name.replace("_", " ")
                self._gauges[name] = Gauge(name, words, namespace="operant", registry=self.registry)
            self._gauges[name].set(value)
        return bytes(generate_latest(self.registry))
