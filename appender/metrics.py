"""The appender's metrics. Labels are bounded: route templates, methods, status codes, and the words of `RETRIES`."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, GCCollector, Histogram, ProcessCollector

from eventstore import __version__

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["RETRIES", "Metrics"]

RETRIES: Final = (
    "number_taken",
    "event_id_taken",
    "transient_transaction",
    "unknown_outcome",
    "unavailable",
)
"""Why a batch or a part of it was tried again."""

_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0, 30.0)
"""From an idle disk's flush to two deadlines."""

_EVENTS: Final = (1, 2, 5, 10, 25, 50, 100, 250, 500, 1000)


class Metrics:
    """All series of one appender, on a registry that is handed in, so that several can live in one process."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry if registry is not None else CollectorRegistry()
        counter = functools.partial(Counter, registry=self.registry)
        gauge = functools.partial(Gauge, registry=self.registry)
        histogram = functools.partial(Histogram, registry=self.registry)
        self.requests = counter("appender_http_requests_total", "Requests answered.", ["route", "method", "code"])
        self.request_seconds = histogram(
            "appender_http_request_duration_seconds",
            "From the headers to the last byte of the answer handed to the kernel.",
            ["route", "method"],
            buckets=_SECONDS,
        )
        self.in_progress = gauge("appender_http_requests_in_progress", "Requests being worked on.")
        self.events = counter("appender_events_appended_total", "Events appended and acknowledged.")
        self.conflicts = counter("appender_append_conflicts_total", "Appends refused with sequence-conflict.")
        self.event_id_conflicts = counter(
            "appender_event_id_conflicts_total", "Appends refused with event-id-conflict."
        )
        self.replays = counter("appender_idempotent_replays_total", "Appends whose events were all there already.")
        self.retries = counter("appender_transaction_retries_total", "Writes tried again, by reason.", ["label"])
        for label in RETRIES:
            self.retries.labels(label)
        self.batch_events = histogram("appender_batch_events", "Events per batch.", buckets=_EVENTS)
        self.batch_seconds = histogram(
            "appender_batch_duration_seconds",
            "From taking a batch to its outcome.",
            ["kind"],
            buckets=_SECONDS,
        )
        for kind in ("singles", "atomic"):
            self.batch_seconds.labels(kind)
        self.queue_events = gauge("appender_queue_events", "Events waiting or being written.")
        self.queue_bytes = gauge("appender_queue_bytes", "Bytes of events waiting or being written.")
        self.queue_age = gauge("appender_queue_oldest_age_seconds", "Age of the append that waits longest.")
        self.batches_in_flight = gauge("appender_batches_in_flight", "Batches being written.")
        self.heads = gauge("appender_heads_cached", "Aggregates whose last sequenceNo is in memory.")
        self.connections = gauge("appender_http_connections", "Open connections.")
        self.draining = gauge("appender_draining", "1 after SIGTERM.")
        gauge("appender_build_info", "Version, always 1.", ["version"]).labels(__version__).set(1)

    def add_process(self) -> None:
        """Adds the process' own series (memory, CPU, descriptors, collections): once per process."""
        ProcessCollector(registry=self.registry)
        GCCollector(registry=self.registry)

    @staticmethod
    def follow(gauge: Gauge, read: Callable[[], float]) -> None:
        """Lets a gauge ask for its value when it is scraped, so that the hot path does not pay for it."""
        gauge.set_function(read)
