"""The operator's metrics: names, units and labels in one place; dashboards and alerts are checked against it.

`indexer_*`, since what it mostly does is to keep indexes. Labels are kinds, namespaces and names of resources, which
administrators make, and closed lists.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info

from eventstore import __version__

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from projector.operator.resource_status import Condition

__all__ = ["ADMISSIONS", "DRIFT_ACTIONS", "RESULTS", "Metrics"]

RESULTS: Final = ("ready", "progressing", "not_ready", "unknown", "error")
DRIFT_ACTIONS: Final = ("created", "modified", "replaced", "dropped", "blocked", "validator")
ADMISSIONS: Final = ("injected", "skipped", "refused", "error")
_STATES: Final = ("True", "False", "Unknown")
_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """All metrics of an operator, in a registry of their own."""

    def __init__(self, kinds: Iterable[str], registry: CollectorRegistry | None = None) -> None:
        self.registry = registry = registry or CollectorRegistry()
        Info("indexer_build", "Version of the operator", registry=registry).info({"version": __version__})
        self.reconciles = Counter(
            "indexer_reconciles", "Passes over a resource by what came of them", ["kind", "result"], registry=registry
        )
        self.reconcile_seconds = Histogram(
            "indexer_reconcile_duration_seconds", "Pass over a resource", ["kind"], buckets=_SECONDS, registry=registry
        )
        self.condition = Gauge(
            "indexer_condition",
            "One-hot status of a resource's condition",
            ["kind", "namespace", "name", "type", "status"],
            registry=registry,
        )
        self.build_ratio = Gauge(
            "indexer_index_build_progress_ratio",
            "Progress of an index build, the scan being the first half; absent when none runs",
            ["kind", "namespace", "name", "index"],
            registry=registry,
        )
        self.drift = Counter(
            "indexer_drift", "Deviations from a spec that had been met, by what was done", ["action"], registry=registry
        )
        self.last_pass = Gauge(
            "indexer_last_pass_timestamp_seconds", "When the last pass over any resource ended", registry=registry
        )
        self.admissions = Counter(
            "injector_admissions",
            "Pods that the injector was asked about, by its answer",
            ["result"],
            registry=registry,
        )
        # A counter that is not there yet hides its first event from increase().
        for kind in kinds:
            self.reconcile_seconds.labels(kind)
            for result in RESULTS:
                self.reconciles.labels(kind, result)
        for action in DRIFT_ACTIONS:
            self.drift.labels(action)
        for answer in ADMISSIONS:
            self.admissions.labels(answer)

    def set_conditions(self, kind: str, namespace: str, name: str, conditions: Iterable[Condition]) -> None:
        """Shows the conditions of a resource."""
        for condition in conditions:
            for status in _STATES:
                self.condition.labels(kind, namespace, name, condition.type, status).set(condition.status == status)

    def set_builds(self, kind: str, namespace: str, name: str, ratios: Mapping[str, float]) -> None:
        """Shows the builds that run for a resource, and no others."""
        self.build_ratio.remove_by_labels({"kind": kind, "namespace": namespace, "name": name})
        for index, ratio in ratios.items():
            self.build_ratio.labels(kind, namespace, name, index).set(ratio)

    def forget(self, kind: str, namespace: str, name: str) -> None:
        """Removes what was shown of a resource that is gone."""
        self.set_builds(kind, namespace, name, {})
        self.condition.remove_by_labels({"kind": kind, "namespace": namespace, "name": name})
