"""The projector's metrics: names, units and labels in one place; dashboards and alerts are checked against it.

The label `projection` is bounded by what is configured; no label ever carries an aggregateId, an event name or an error text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info

from eventstore import __version__

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["HEALTH_STATES", "OUTCOMES", "RESTART_REASONS", "Metrics"]

OUTCOMES: Final = ("applied", "unhandled", "duplicate", "aside", "healed", "failed", "skipped")
RESTART_REASONS: Final = ("history_lost", "fenced", "unavailable", "unexpected")
HEALTH_STATES: Final = ("live", "catching_up", "repairing", "rebuilding", "waiting", "paused", "standby", "failed")

_BATCH_SECONDS: Final = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_BATCH_EVENTS: Final = (1, 3, 10, 30, 100, 300, 1_000, 3_000, 10_000)
_LATENCY_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """All metrics of a projector process, in a registry of their own."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry = registry or CollectorRegistry()
        by_projection = ["projection"]

        def counter(name: str, text: str, labels: Iterable[str] = by_projection) -> Counter:
            return Counter(name, text, labels, registry=registry)

        def gauge(name: str, text: str, labels: Iterable[str] = by_projection) -> Gauge:
            return Gauge(name, text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, by_projection, buckets=buckets, registry=registry)

        Info("projector_build", "Version of the projector", registry=registry).info({"version": __version__})
        self.events = counter("projector_events_processed", "Events by outcome", ["projection", "outcome"])
        self.duplicates = counter("projector_duplicates_skipped", "Events seen again and skipped by their mark")
        self.gaps = counter("projector_gaps", "Gaps found in an aggregate's sequence, healed from the log or set aside")
        self.parked_total = counter("projector_dead_letters", "Aggregates parked after retries were used up")
        self.restarts = counter("projector_stream_restarts", "Fresh starts of a partition", ["projection", "reason"])
        self.repaired = counter("projector_repaired_events", "Events re-read from the log after a lost position")
        self.conflicts = counter("projector_write_conflicts", "Write transactions that had to run again")
        self.fold_seconds = histogram(
            "projector_handler_duration_seconds", "Order check and fold of a batch", _BATCH_SECONDS
        )
        self.write_seconds = histogram("projector_write_duration_seconds", "Transaction of a batch", _BATCH_SECONDS)
        self.write_events = histogram("projector_write_batch_events", "Events in a transaction", _BATCH_EVENTS)
        self.delay_seconds = histogram(
            "projector_event_delay_seconds",
            "From an event's commit to its read model's, newest event of a batch",
            _LATENCY_SECONDS,
        )
        self.lag_seconds = gauge("projector_lag_seconds", "Age of the oldest event not yet applied; 0 when caught up")
        self.backlog_events = gauge("projector_backlog_events", "Estimate of the events not yet applied")
        self.last_applied = gauge("projector_last_applied_timestamp_seconds", "Commit time of the last event applied")
        self.heartbeat = gauge("projector_heartbeat_timestamp_seconds", "When the loop last turned, with events or not")
        self.token_age = gauge("projector_resume_token_age_seconds", "Age of the oldest checkpoint's resume token")
        self.parked = gauge("projector_parked_aggregates", "Aggregates set aside now", ["projection", "state"])
        self.parked_oldest = gauge(
            "projector_parked_oldest_timestamp_seconds", "Since when the oldest is aside; 0: none"
        )
        self.partitions = gauge("projector_partitions_owned", "Partitions that this process runs")
        self.health = gauge(
            "projector_health", "One-hot state of the projection in this process", ["projection", "state"]
        )
        self.rebuild_ratio = gauge("projector_rebuild_progress_ratio", "How much of a rebuild is done, 0 to 1")
        self.rebuild_events = counter("projector_rebuild_events", "Events folded by rebuilds")
        self._oplog_window = Gauge("projector_oplog_window_seconds", "Age of the oldest oplog entry", registry=None)
        self._oplog_known = False
        self.replicas = Gauge("projector_replicas", "Projector processes that live", registry=registry)

    def start(self, projection: str) -> None:
        """Sets every labelled metric of a projection to zero, so that `increase()` sees its first event."""
        for outcome in OUTCOMES:
            self.events.labels(projection, outcome)
        for reason in RESTART_REASONS:
            self.restarts.labels(projection, reason)
        for state in ("retrying", "parked"):
            self.parked.labels(projection, state)
        for metric in (
            self.duplicates, self.gaps, self.parked_total, self.repaired, self.conflicts, self.fold_seconds,
            self.write_seconds, self.write_events, self.delay_seconds, self.backlog_events, self.lag_seconds, self.partitions,
            self.rebuild_events, self.parked_oldest,
        ):  # fmt: skip
            metric.labels(projection)
        self.set_health(projection, "standby")

    def set_oplog_window(self, seconds: float | None) -> None:
        """Sets the age of the oldest oplog entry. None, where it may not be read: no sample at all, since 0 would be alarming."""
        if (seconds is not None) != self._oplog_known:
            self._oplog_known = seconds is not None
            change = self.registry.register if self._oplog_known else self.registry.unregister
            change(self._oplog_window)
        if seconds is not None:
            self._oplog_window.set(seconds)

    def set_health(self, projection: str, state: str) -> None:
        """Makes `state` the one that is 1."""
        for known in HEALTH_STATES:
            self.health.labels(projection, known).set(known == state)

    def forget(self, projection: str) -> None:
        """Removes every series of a projection that is gone: a gauge that nobody sets any more would go on alerting."""
        for metric in vars(self).values():
            if "projection" in getattr(metric, "_labelnames", ()):
                metric.remove_by_labels({"projection": projection})
