"""Projector: states, lag, flow, position, parked aggregates, rebuilds, the processes."""

from __future__ import annotations

from typing import Final

from deploy.observability.panels import (
    RATE,
    SELECTOR,
    bars,
    board,
    lines,
    map_of,
    number,
    process_rows,
    states,
    thresholds,
)

__all__ = ["PROJECTOR", "STATES", "state_query"]

STATES: Final = (
    ("unknown", "text"),
    ("standby", "super-light-blue"),
    ("live", "green"),
    ("paused", "blue"),
    ("catching up", "yellow"),
    ("rebuilding", "purple"),
    ("repairing", "orange"),
    ("waiting", "dark-orange"),
    ("failed", "red"),
)
"""From the least to the most that wants attention: where replicas differ the greatest is shown."""

_P: Final = f'{SELECTOR}, projection=~"$projection"'
_RECORDED: Final = 'namespace=~"$namespace", projection=~"$projection"'


def state_query(selector: str) -> str:
    """One number per projection, an index into STATES, from the one-hot metric."""
    terms = [
        f'{index} * projector_health{{{selector}, state="{name.replace(" ", "_")}"}}'
        for index, (name, _) in enumerate(STATES)
        if index
    ]
    return f"max by (namespace, projection) ({' or '.join(terms)})"


def _quantile(share: float, metric: str) -> str:
    return f"histogram_quantile({share}, sum by (le, namespace, projection) (rate({metric}_bucket{{{_P}}}{RATE})))"


def _by_projection(metric: str) -> str:
    return f"sum by (namespace, projection) (rate({metric}{{{_P}}}{RATE}))"


PROJECTOR: Final = board(
    "projector",
    "Projector",
    "What follows the log and keeps the read models: how far each projection is, and what holds it up.",
    "projector_health",
    {
        "State": [
            states(
                "State",
                "The worst state of each projection over its replicas.",
                STATES,
                {"{{namespace}}/{{projection}}": state_query(_P)},
                span=12,
            ),
            bars(
                "Lag now",
                "How far each projection is behind the log; 0: everything is applied.",
                "s",
                {"{{namespace}}/{{projection}}": f"max by (namespace, projection) (projector_lag_seconds{{{_P}}})"},
                span=6,
            ),
            lines(
                "Partitions",
                "That each replica runs.",
                "short",
                {"{{instance}}": f"sum by (instance) (projector_partitions_owned{{{_P}}})"},
                span=6,
                stacked=True,
            ),
            number(
                "Replicas",
                "Projectors that live, as they see each other.",
                "short",
                f"max(projector_replicas{{{SELECTOR}}})",
                thresholds((None, "red"), (1, "green")),
            ),
            number(
                "Since the loop turned",
                "The loop of a partition turns at least once a second, with events and without; the slowest.",
                "s",
                f"max((time() - projector_heartbeat_timestamp_seconds{{{_P}}}) and projector_partitions_owned{{{_P}}} > 0)",
                thresholds((None, "green"), (10, "orange"), (60, "red")),
            ),
            number(
                "Oplog headroom",
                "Seconds until the oldest resume token would age out of the oplog, if its projection stood still.",
                "s",
                f"min(min by (namespace) (projector_oplog_window_seconds{{{SELECTOR}}})"
                f" - on (namespace) max by (namespace) (projector_resume_token_age_seconds{{{_P}}}))",
                thresholds((None, "red"), (1800, "orange"), (7200, "green")),
                empty="the role may not read the oplog",
            ),
            number(
                "Aggregates parked",
                "Wait for a person: `projector parked list`.",
                "short",
                f'sum(projector_parked_aggregates{{{_P}, state="parked"}})',
                thresholds((None, "green"), (1, "red")),
            ),
        ],
        "Flow": [
            lines(
                "Events by outcome",
                "applied and unhandled: passed in their turn; duplicate: seen before, skipped; aside: of an aggregate that"
                " is set aside; healed: read again from the log.",
                "eps",
                {
                    "{{namespace}}/{{projection}} {{outcome}}": "sum by (namespace, projection, outcome) ("
                    f"rate(projector_events_processed_total{{{_P}}}{RATE}))"
                },
            ),
            lines(
                "Lag",
                "How far each projection is behind the log.",
                "s",
                {"{{namespace}}/{{projection}}": f"namespace_projection:projector_lag_seconds:max{{{_RECORDED}}}"},
                limits=thresholds((None, "transparent"), (60, "red")),
            ),
            lines(
                "Backlog",
                "Estimate of the events not yet applied.",
                "short",
                {"{{namespace}}/{{projection}}": f"max by (namespace, projection) (projector_backlog_events{{{_P}}})"},
            ),
            lines(
                "Delay",
                "From the commit of an event to the commit of its read model: the newest event of each batch.",
                "s",
                {
                    "{{namespace}}/{{projection}} 50 %": _quantile(0.5, "projector_event_delay_seconds"),
                    "{{namespace}}/{{projection}} 99 %": _quantile(0.99, "projector_event_delay_seconds"),
                },
            ),
            map_of(
                "Delay, spread",
                "How many batches per second had which delay.",
                "s",
                f"sum by (le) (rate(projector_event_delay_seconds_bucket{{{_P}}}{RATE}))",
            ),
            lines(
                "Age of the last event applied",
                "Grows when no events come; it is no lag.",
                "s",
                {
                    "{{namespace}}/{{projection}}": "time() - max by (namespace, projection) ("
                    f"projector_last_applied_timestamp_seconds{{{_P}}})"
                },
            ),
        ],
        "Work": [
            lines(
                "Fold",
                "Order check and fold of a batch.",
                "s",
                {
                    "{{namespace}}/{{projection}} 50 %": _quantile(0.5, "projector_handler_duration_seconds"),
                    "{{namespace}}/{{projection}} 99 %": _quantile(0.99, "projector_handler_duration_seconds"),
                },
            ),
            lines(
                "Write",
                "The transaction of a batch: documents, marks and checkpoint.",
                "s",
                {
                    "{{namespace}}/{{projection}} 50 %": _quantile(0.5, "projector_write_duration_seconds"),
                    "{{namespace}}/{{projection}} 99 %": _quantile(0.99, "projector_write_duration_seconds"),
                },
            ),
            lines(
                "Events per transaction",
                "Mean. Grows by itself with the load.",
                "short",
                {
                    "{{namespace}}/{{projection}}": f"{_by_projection('projector_write_batch_events_sum')}"
                    f" / {_by_projection('projector_write_batch_events_count')}"
                },
            ),
            lines(
                "Write conflicts",
                "Transactions per second that ran again, since another partition wrote the same document.",
                "ops",
                {"{{namespace}}/{{projection}}": _by_projection("projector_write_conflicts_total")},
            ),
            lines(
                "Duplicates and gaps",
                "Events skipped by their mark, and gaps found in an aggregate's sequence, per second.",
                "eps",
                {
                    "{{namespace}}/{{projection}} duplicates": _by_projection("projector_duplicates_skipped_total"),
                    "{{namespace}}/{{projection}} gaps": _by_projection("projector_gaps_total"),
                },
            ),
        ],
        "Position": [
            lines(
                "Resume token and oplog",
                "Age of the oldest checkpoint's token, and of the oldest entry of the oplog. They must not meet.",
                "s",
                {
                    "{{namespace}}/{{projection}} token": "max by (namespace, projection) ("
                    f"projector_resume_token_age_seconds{{{_P}}})",
                    "{{namespace}} oplog": f"min by (namespace) (projector_oplog_window_seconds{{{SELECTOR}}})",
                },
            ),
            lines(
                "Restarts by reason",
                "Fresh starts of partitions from their checkpoints.",
                "short",
                {
                    "{{namespace}}/{{projection}} {{reason}}": "sum by (namespace, projection, reason) ("
                    f"increase(projector_stream_restarts_total{{{_P}}}{RATE}))"
                },
            ),
            lines(
                "Repaired",
                "Events per second read again from the log after a lost position.",
                "eps",
                {"{{namespace}}/{{projection}}": _by_projection("projector_repaired_events_total")},
            ),
        ],
        "Parked aggregates": [
            lines(
                "Set aside",
                "Aggregates that are tried again (retrying), and those that wait for a person (parked).",
                "short",
                {
                    "{{namespace}}/{{projection}} {{state}}": "sum by (namespace, projection, state) ("
                    f"projector_parked_aggregates{{{_P}}})"
                },
            ),
            lines(
                "Parked anew",
                "Aggregates whose tries were used up.",
                "short",
                {
                    "{{namespace}}/{{projection}}": "sum by (namespace, projection) ("
                    f"increase(projector_dead_letters_total{{{_P}}}{RATE}))"
                },
            ),
            lines(
                "Oldest set aside",
                "Since when the oldest is aside; 0: none.",
                "s",
                {
                    "{{namespace}}/{{projection}}": "max by (namespace, projection) ("
                    f"(time() - projector_parked_oldest_timestamp_seconds{{{_P}}})"
                    f" * (projector_parked_oldest_timestamp_seconds{{{_P}}} > bool 0))"
                },
            ),
        ],
        "Rebuilds": [
            lines(
                "Progress",
                "How much of a rebuild's scan is done.",
                "percentunit",
                {
                    "{{namespace}}/{{projection}}": f"max by (namespace, projection) (projector_rebuild_progress_ratio{{{_P}}})"
                },
                span=12,
                most=1,
            ),
            lines(
                "Events folded",
                "By rebuilds, per second.",
                "eps",
                {"{{namespace}}/{{projection}}": _by_projection("projector_rebuild_events_total")},
                span=12,
            ),
        ],
        "Process": process_rows("projector_build_info"),
    },
    per="projection",
)
