"""Every metric that a shipped process exports or a shipped rule records, with its labels: what expressions may name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import yaml
from prometheus_client import CollectorRegistry, GCCollector, ProcessCollector
from prometheus_client.metrics import MetricWrapperBase

from appender import metrics as appender
from projector import metrics as projector
from projector.operator import conditions
from projector.operator import metrics as operator

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["PROCESS", "RULES", "TARGET_LABELS", "VALUES", "Metric", "exported", "known", "recorded"]

RULES: Final = Path(__file__).parents[1] / "helm/files/rules"

TARGET_LABELS: Final = frozenset({"namespace", "instance", "pod", "job"})
"""Put on every series by Prometheus, by the PodMonitor's discovery."""

PROCESS: Final = "process and Python"

VALUES: Final[dict[tuple[str, str], frozenset[str]]] = {
    ("appender_transaction_retries_total", "label"): frozenset(appender.RETRIES),
    ("projector_events_processed_total", "outcome"): frozenset(projector.OUTCOMES),
    ("projector_stream_restarts_total", "reason"): frozenset(projector.RESTART_REASONS),
    ("projector_health", "state"): frozenset(projector.HEALTH_STATES),
    ("projector_parked_aggregates", "state"): frozenset({"retrying", "parked"}),
    ("indexer_reconciles_total", "result"): frozenset(operator.RESULTS),
    ("indexer_drift_total", "action"): frozenset(operator.DRIFT_ACTIONS),
    ("injector_admissions_total", "result"): frozenset(operator.ADMISSIONS),
    ("indexer_condition", "type"): frozenset(conditions.TYPES),
    ("indexer_condition", "status"): frozenset({"True", "False", "Unknown"}),
}
"""Labels whose values are a closed list: an expression that asks for another one would wait for ever."""


class Metric(NamedTuple):
    """A metric as it is declared; `kind` is Prometheus' type."""

    name: str
    kind: str
    labels: tuple[str, ...]
    text: str
    component: str

    @property
    def series(self) -> Iterator[tuple[str, frozenset[str]]]:
        """The series that Prometheus stores of it, each with its labels."""
        labels = frozenset(self.labels)
        match self.kind:
            case "histogram":
                yield f"{self.name}_bucket", labels | {"le"}
                yield f"{self.name}_sum", labels
                yield f"{self.name}_count", labels
            case "info":
                yield f"{self.name}_info", labels
            case "counter":
                yield f"{self.name}_total", labels
            case _:
                yield self.name, labels


def exported() -> list[Metric]:
    """The metrics of all processes, in the order of their declaration."""
    following = projector.Metrics()
    following.set_oplog_window(0)  # it has no series where the oplog may not be read
    registries = {
        "appender": appender.Metrics().registry,
        "projector": following.registry,
        "operator": operator.Metrics(()).registry,
    }
    found = [metric for component, registry in registries.items() for metric in _declared(component, registry)]
    return found + list(_of_the_process())


def _declared(component: str, registry: CollectorRegistry) -> Iterator[Metric]:
    # The registry knows its collectors; only the collectors know the labels of which no value has been seen yet.
    for collector in registry._collector_to_names:
        if isinstance(collector, MetricWrapperBase):
            family = next(iter(collector.describe()))
            labels = tuple(collector._labelnames)
            if family.type == "info":
                labels = tuple(next(iter(collector.collect())).samples[0].labels)
            yield Metric(family.name, family.type, labels, family.documentation, component)


def _of_the_process() -> Iterator[Metric]:
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    GCCollector(registry=registry)
    for family in registry.collect():
        labels = tuple(family.samples[0].labels) if family.samples else ()
        yield Metric(family.name, family.type, labels, family.documentation, PROCESS)


def recorded() -> dict[str, frozenset[str]]:
    """The series that the recording rules make; their names begin with their labels."""
    groups = yaml.safe_load((RULES / "recording-rules.yaml").read_text())["groups"]
    names = [rule["record"] for group in groups for rule in group["rules"]]
    return {name: frozenset(name.partition(":")[0].split("_")) for name in names}


def known() -> dict[str, frozenset[str]]:
    """Every series that an expression may name, with the labels that it may name of it."""
    found = {name: labels | TARGET_LABELS for metric in exported() for name, labels in metric.series}
    found |= recorded()
    found["ALERTS"] = frozenset({"alertname", "alertstate", "severity", "namespace"})
    return found
