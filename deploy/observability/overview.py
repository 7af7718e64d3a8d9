"""Overview: do events get in, are read models current, what is to be done."""

from __future__ import annotations

from typing import Final

from deploy.observability.panels import (
    BAD_RATIO,
    NAMESPACE,
    RATE,
    SELECTOR,
    board,
    lines,
    number,
    rows,
    states,
    thresholds,
)
from deploy.observability.projector import STATES, state_query

__all__ = ["OVERVIEW"]

_ALERTS: Final = 'alertname=~"(Appender|Projector|Index|Injector|Operator)[A-Z].*"'

OVERVIEW: Final = board(
    "overview",
    "Overview",
    "Whether events get in, whether read models are current, and what waits for a person.",
    '{__name__=~"appender_build_info|projector_build_info|indexer_build_info"}',
    {
        "Do events get in?": [
            number(
                "Events appended",
                "Events per second that were acknowledged, hence are on disk with a majority.",
                "eps",
                f"sum(rate(appender_events_appended_total{{{SELECTOR}}}{RATE}))",
                thresholds((None, "blue")),
            ),
            number(
                "Requests in time and without error",
                "Of the last five minutes; the objective is 99.9 %. A 409 is an answer, not an error.",
                "percentunit",
                f"1 - {BAD_RATIO}",
                thresholds((None, "red"), (0.99, "orange"), (0.999, "green")),
            ),
            number(
                "Append, 99th percentile",
                "99 of 100 appends to one aggregate took no longer.",
                "s",
                "histogram_quantile(0.99, sum by (le) (rate(appender_http_request_duration_seconds_bucket"
                f'{{{SELECTOR}, route="/v1/aggregates/{{aggregateId}}/events", method="POST"}}{RATE})))',
                thresholds((None, "green"), (0.25, "orange"), (1, "red")),
            ),
            number(
                "Error budget left",
                "What is left of the 0.1 % of requests that may fail within 30 days; the worst namespace.",
                "percentunit",
                f"min(1 - namespace:appender_bad_requests_per_requests:ratio_rate30d{{{NAMESPACE}}} / 0.001)",
                thresholds((None, "red"), (0.1, "orange"), (0.5, "green")),
            ),
        ],
        "Are read models current?": [
            number(
                "Greatest lag",
                "How far the projection that is furthest behind is behind. 0: everything is applied.",
                "s",
                f"max(namespace_projection:projector_lag_seconds:max{{{NAMESPACE}}})",
                thresholds((None, "green"), (30, "orange"), (60, "red")),
            ),
            number(
                "Oplog headroom",
                "Seconds until the oldest resume token would age out of the oplog, if its projection stood still.",
                "s",
                f"min(min by (namespace) (projector_oplog_window_seconds{{{SELECTOR}}})"
                f" - on (namespace) max by (namespace) (projector_resume_token_age_seconds{{{SELECTOR}}}))",
                thresholds((None, "red"), (1800, "orange"), (7200, "green")),
                empty="the role may not read the oplog",
            ),
            number(
                "Aggregates parked",
                "Aggregates whose event failed for good: they wait for a person.",
                "short",
                f'sum(projector_parked_aggregates{{{SELECTOR}, state="parked"}})',
                thresholds((None, "green"), (1, "red")),
            ),
            number(
                "Resources not ready",
                "EventStores and Projections whose condition Ready is not True.",
                "short",
                'count(indexer_condition{namespace=~"$namespace", type="Ready", status="True"} == 0) or vector(0)',
                thresholds((None, "green"), (1, "orange")),
            ),
        ],
        "Now": [
            rows(
                "Alerts",
                "What fires now. Each alert links to its runbook.",
                {"": f'ALERTS{{alertstate="firing", {_ALERTS}, {NAMESPACE}}}'},
                {
                    "alertname": "Alert",
                    "severity": "Severity",
                    "namespace": "Namespace",
                    "projection": "Projection",
                    "kind": "Kind",
                    "name": "Name",
                },
                hidden=("Value", "__name__", "alertstate"),
                link=("Alert", "Runbook", "https://eventprojector.io/docs/runbooks/${__value.text}/"),
                span=12,
            ),
            states(
                "State of the projections",
                "The worst state of each over its replicas.",
                STATES,
                {"{{namespace}}/{{projection}}": state_query(SELECTOR)},
                span=12,
            ),
            lines(
                "In and out",
                "Events appended, and events that each projection processed.",
                "eps",
                {
                    "appended": f"sum(rate(appender_events_appended_total{{{SELECTOR}}}{RATE}))",
                    "{{namespace}}/{{projection}}": "sum by (namespace, projection) ("
                    f"rate(projector_events_processed_total{{{SELECTOR}}}{RATE}))",
                },
            ),
            lines(
                "Requests by code",
                "Answers of the appender's API.",
                "reqps",
                {
                    "{{code}}": f'sum by (code) (rate(appender_http_requests_total{{{SELECTOR}, route=~"/v1/.*"}}{RATE}))'
                },
                stacked=True,
            ),
            lines(
                "Lag",
                "How far each projection is behind the log.",
                "s",
                {"{{namespace}}/{{projection}}": f"namespace_projection:projector_lag_seconds:max{{{NAMESPACE}}}"},
                limits=thresholds((None, "transparent"), (60, "red")),
            ),
        ],
    },
)
