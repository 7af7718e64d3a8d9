"""Operator: resources and their conditions, indexes, passes, the injector, the process."""

from __future__ import annotations

from typing import Final

from deploy.observability.panels import (
    NAMESPACE,
    RATE,
    SELECTOR,
    bars,
    board,
    lines,
    number,
    process_rows,
    rows,
    states,
    thresholds,
)

__all__ = ["OPERATOR"]


def _condition(kind: str, status: str = "True") -> str:
    return f'indexer_condition{{{NAMESPACE}, type="{kind}", status="{status}"}}'


def _quantile(share: float) -> str:
    return f"histogram_quantile({share}, sum by (le, kind) (rate(indexer_reconcile_duration_seconds_bucket{{{SELECTOR}}}{RATE})))"


OPERATOR: Final = board(
    "operator",
    "Operator",
    "What provisions event stores, indexes and projections from custom resources.",
    '{__name__=~"indexer_build_info|indexer_condition"}',
    {
        "Resources": [
            number(
                "Resources",
                "EventStores and Projections that the operator knows.",
                "short",
                f"count({_condition('Ready')}) or vector(0)",
                thresholds((None, "blue")),
            ),
            number(
                "Not ready",
                "Whose condition Ready is not True.",
                "short",
                f"count({_condition('Ready')} == 0) or vector(0)",
                thresholds((None, "green"), (1, "orange")),
            ),
            number(
                "Degraded",
                "Something is wrong that does not mend itself: `kubectl describe` tells.",
                "short",
                f"count({_condition('Degraded')} == 1) or vector(0)",
                thresholds((None, "green"), (1, "red")),
            ),
            number(
                "Since the last pass",
                "Every resource is measured once a minute.",
                "s",
                f"time() - max(indexer_last_pass_timestamp_seconds{{{SELECTOR}}} > 0)",
                thresholds((None, "green"), (180, "orange"), (600, "red")),
                empty="no resources",
            ),
            rows(
                "Conditions",
                "Of each resource: 1 is True.",
                {
                    name: f"max by (namespace, kind, name) ({_condition(name)})"
                    for name in ("Ready", "Progressing", "Degraded", "Paused")
                },
                {
                    "namespace": "Namespace",
                    "kind": "Kind",
                    "name": "Name",
                    "Value #A": "Ready",
                    "Value #B": "Progressing",
                    "Value #C": "Degraded",
                    "Value #D": "Paused",
                },
                span=12,
            ),
            states(
                "Ready",
                "Of each resource over time.",
                (("not ready", "red"), ("ready", "green"), ("unknown", "orange")),
                {
                    "{{kind}} {{namespace}}/{{name}}": "max by (namespace, kind, name) ("
                    f"{_condition('Ready')} or 2 * {_condition('Ready', 'Unknown')})"
                },
                span=12,
            ),
        ],
        "Indexes": [
            bars(
                "Builds",
                "Progress of the index builds that run; the scan is the first half.",
                "percentunit",
                {"{{namespace}}/{{name}} {{index}}": f"indexer_index_build_progress_ratio{{{NAMESPACE}}}"},
            ),
            lines(
                "Build progress",
                "Over time.",
                "percentunit",
                {"{{namespace}}/{{name}} {{index}}": f"indexer_index_build_progress_ratio{{{NAMESPACE}}}"},
                most=1,
            ),
            lines(
                "Drift",
                "Deviations from resources that had been met, by what the operator did.",
                "short",
                {"{{action}}": f"sum by (action) (increase(indexer_drift_total{{{SELECTOR}}}{RATE}))"},
            ),
        ],
        "Passes": [
            lines(
                "Passes by result",
                "Per second.",
                "ops",
                {"{{kind}} {{result}}": f"sum by (kind, result) (rate(indexer_reconciles_total{{{SELECTOR}}}{RATE}))"},
                stacked=True,
            ),
            lines(
                "Duration of a pass",
                "Measure, compare, act.",
                "s",
                {"{{kind}} 50 %": _quantile(0.5), "{{kind}} 99 %": _quantile(0.99)},
            ),
            lines(
                "Sidecar injector",
                "Pods that it was asked about, by its answer, per second.",
                "ops",
                {"{{result}}": f"sum by (result) (rate(injector_admissions_total{{{SELECTOR}}}{RATE}))"},
                stacked=True,
            ),
        ],
        "Process": process_rows("indexer_build_info"),
    },
)
