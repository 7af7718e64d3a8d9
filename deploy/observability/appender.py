"""Appender: requests, appends, group commit, the processes."""

from __future__ import annotations

from typing import Final

from deploy.observability.panels import (
    BAD_RATIO,
    NAMESPACE,
    RATE,
    SELECTOR,
    board,
    lines,
    map_of,
    number,
    process_rows,
    thresholds,
)

__all__ = ["APPENDER"]

_API: Final = f'{SELECTOR}, route=~"/v1/.*"'
_POSTS: Final = f'{SELECTOR}, route=~"/v1/.*", method="POST"'
_APPEND: Final = f'{SELECTOR}, route="/v1/aggregates/{{aggregateId}}/events", method="POST"'


def _quantile(share: float, metric: str, selector: str, by: str = "le") -> str:
    return f"histogram_quantile({share}, sum by ({by}) (rate({metric}_bucket{{{selector}}}{RATE})))"


def _per_request(metric: str) -> str:
    return f"sum(rate({metric}{{{SELECTOR}}}{RATE})) / sum(rate(appender_http_requests_total{{{_POSTS}}}{RATE}))"


APPENDER: Final = board(
    "appender",
    "Appender",
    "The HTTP service that appends: what it answers, how long it takes, and what happens in between.",
    "appender_build_info",
    {
        "Requests": [
            number(
                "Events appended",
                "Events per second that were acknowledged.",
                "eps",
                f"sum(rate(appender_events_appended_total{{{SELECTOR}}}{RATE}))",
                thresholds((None, "blue")),
                span=4,
            ),
            number(
                "Bad requests",
                "5xx, or over a second; share of the last five minutes.",
                "percentunit",
                BAD_RATIO,
                thresholds((None, "green"), (0.001, "orange"), (0.01, "red")),
                span=4,
            ),
            number(
                "Error budget left",
                "Of 0.1 % within 30 days; the worst namespace.",
                "percentunit",
                f"min(1 - namespace:appender_bad_requests_per_requests:ratio_rate30d{{{NAMESPACE}}} / 0.001)",
                thresholds((None, "red"), (0.1, "orange"), (0.5, "green")),
                span=4,
            ),
            number(
                "In progress",
                "Requests being worked on.",
                "short",
                f"sum(appender_http_requests_in_progress{{{SELECTOR}}})",
                thresholds((None, "blue")),
                span=4,
            ),
            number(
                "Connections",
                "Open connections; a process takes 4,096.",
                "short",
                f"sum(appender_http_connections{{{SELECTOR}}})",
                thresholds((None, "blue"), (3500, "orange")),
                span=4,
            ),
            number(
                "Draining",
                "Processes that got SIGTERM and finish their queue.",
                "short",
                f"sum(appender_draining{{{SELECTOR}}})",
                thresholds((None, "green"), (1, "orange")),
                span=4,
            ),
            lines(
                "Requests by code",
                "Answers per second. 409: a conflict, as the caller wished it; 503: repeat later.",
                "reqps",
                {"{{code}}": f"sum by (code) (rate(appender_http_requests_total{{{_API}}}{RATE}))"},
                stacked=True,
            ),
            lines(
                "Requests by route",
                "Answers per second by the route's template and method.",
                "reqps",
                {
                    "{{method}} {{route}}": f"sum by (route, method) (rate(appender_http_requests_total{{{_API}}}{RATE}))"
                },
            ),
            lines(
                "Error ratio",
                "Bad requests per request, of the last five minutes and of the last hour.",
                "percentunit",
                {
                    "{{namespace}} 5m": f"namespace:appender_bad_requests_per_requests:ratio_rate5m{{{NAMESPACE}}}",
                    "{{namespace}} 1h": f"namespace:appender_bad_requests_per_requests:ratio_rate1h{{{NAMESPACE}}}",
                },
            ),
            lines(
                "Duration of an append",
                "To one aggregate, from the headers to the last byte of the answer.",
                "s",
                {
                    "50 %": _quantile(0.5, "appender_http_request_duration_seconds", _APPEND),
                    "95 %": _quantile(0.95, "appender_http_request_duration_seconds", _APPEND),
                    "99 %": _quantile(0.99, "appender_http_request_duration_seconds", _APPEND),
                },
            ),
            lines(
                "Duration by route, 99th percentile",
                "Bulk streams and histories last as long as they have lines.",
                "s",
                {
                    "{{method}} {{route}}": _quantile(
                        0.99, "appender_http_request_duration_seconds", _API, "le, route, method"
                    )
                },
            ),
            map_of(
                "Duration of an append, spread",
                "How many appends per second took how long.",
                "s",
                f"sum by (le) (rate(appender_http_request_duration_seconds_bucket{{{_APPEND}}}{RATE}))",
            ),
        ],
        "Appends": [
            lines(
                "Events",
                "Acknowledged per second.",
                "eps",
                {"{{instance}}": f"sum by (instance) (rate(appender_events_appended_total{{{SELECTOR}}}{RATE}))"},
                stacked=True,
            ),
            lines(
                "Conflicts",
                "Appends refused per request: another sequenceNo than expected; and an eventId re-used for another event,"
                " which is a caller's defect.",
                "percentunit",
                {
                    "sequence-conflict": _per_request("appender_append_conflicts_total"),
                    "event-id-conflict": _per_request("appender_event_id_conflicts_total"),
                },
            ),
            lines(
                "Repeats and retries",
                "Appends per second that were in the log already (answered with their original numbers), and writes tried"
                " again by reason.",
                "ops",
                {
                    "replays": f"sum(rate(appender_idempotent_replays_total{{{SELECTOR}}}{RATE}))",
                    "{{label}}": f"sum by (label) (rate(appender_transaction_retries_total{{{SELECTOR}}}{RATE}))",
                },
            ),
        ],
        "Group commit": [
            lines(
                "Events per batch",
                "How many events share a write. Grows by itself with the load.",
                "short",
                {
                    "mean": f"sum(rate(appender_batch_events_sum{{{SELECTOR}}}{RATE}))"
                    f" / sum(rate(appender_batch_events_count{{{SELECTOR}}}{RATE}))",
                    "95 %": _quantile(0.95, "appender_batch_events", SELECTOR),
                },
            ),
            lines(
                "Batch duration",
                "From taking a batch to its outcome; `singles` are inserts without a transaction.",
                "s",
                {
                    "{{kind}} 50 %": _quantile(0.5, "appender_batch_duration_seconds", SELECTOR, "le, kind"),
                    "{{kind}} 99 %": _quantile(0.99, "appender_batch_duration_seconds", SELECTOR, "le, kind"),
                },
            ),
            lines(
                "Batches in flight",
                "Written to MongoDB at the same time.",
                "short",
                {"{{instance}}": f"appender_batches_in_flight{{{SELECTOR}}}"},
            ),
            lines(
                "Queue",
                "Events that wait or are being written; more than 20,000 are refused with 503.",
                "short",
                {"{{instance}}": f"appender_queue_events{{{SELECTOR}}}"},
            ),
            lines(
                "Queue, bytes",
                "Of events that wait or are being written; more than 64 MiB are refused with 503.",
                "bytes",
                {"{{instance}}": f"appender_queue_bytes{{{SELECTOR}}}"},
            ),
            lines(
                "Queue, age",
                "Age of the append that waits longest; at 15 s it is answered with 503.",
                "s",
                {"{{instance}}": f"appender_queue_oldest_age_seconds{{{SELECTOR}}}"},
                limits=thresholds((None, "transparent"), (5, "orange"), (15, "red")),
            ),
            lines(
                "Heads in memory",
                "Aggregates whose last sequenceNo is known without asking MongoDB; at most 65,536.",
                "short",
                {"{{instance}}": f"appender_heads_cached{{{SELECTOR}}}"},
            ),
        ],
        "Process": process_rows("appender_build_info"),
    },
)
