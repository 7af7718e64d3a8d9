"""Every line that the parts may log, found in their code, and what each means to whoever runs them."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["MEANINGS", "LogEvent", "found"]

ROOT: Final = Path(__file__).parents[2]
PACKAGES: Final = ("eventstore", "appender", "projector")
LEVELS: Final = {"debug": "debug", "info": "info", "warning": "warning", "error": "error", "exception": "error"}

MEANINGS: Final[dict[str, str]] = {
    "admission_not_understood": "The API server asked the sidecar injector about something that is no pod.",
    "aggregate_healed": "An aggregate that was set aside could be applied after all, up to its last event.",
    "aggregate_parked": "All tries for an event failed: its aggregate waits for a person. See the runbook ProjectorDeadLetters.",
    "aggregate_set_aside": "An event failed for the first time: its aggregate is tried again while all others go on.",
    "appender_draining": "SIGTERM: new appends are refused, those that wait get their outcome.",
    "appender_failed": "The appender could not start (address taken, token file without a token).",
    "appender_listening": "The HTTP API is open.",
    "appender_stopped": "The end, after the last answer.",
    "batch_failed": "A defect: a batch ended by an error that nobody foresaw. Its requests are tried again.",
    "build_dropped": "The collections of a version that is no longer needed were dropped.",
    "build_scanned": "A new version has folded the whole log, and goes on with the change stream.",
    "certificate_not_loaded": "The certificate of the injector changed and could not be read: the old one stays in use.",
    "condition_changed": "A condition of a custom resource changed.",
    "cut_over": "Readers of the view now see another version.",
    "drain_incomplete": "The time to drain was over before all appends had their outcome; the rest was answered with 503.",
    "event_store_ready": "The log's collection and index are there: appends are taken.",
    "index_failed": "An index could not be built; the condition of its resource says more.",
    "injector_started": "The sidecar injector's webhook is open.",
    "mongodb_available": "MongoDB takes writes again.",
    "mongodb_unavailable": "MongoDB takes no writes: appends wait, and are answered with 503 at their deadline. Once per outage.",
    "operator_started": "The operator watches its resources.",
    "operator_stopped": "The operator's end.",
    "ops_listening": "Probes and metrics are served on a port of their own.",
    "orphaned_transactions_ended": "An appender that was killed had left transactions open, which held up others: they were ended.",
    "orphans_not_found": "The role may not look for transactions that a killed appender left; MongoDB ends them after a minute.",
    "partition_ended": "A defect: a partition ended by an error that nobody foresaw. It is taken up again from its checkpoint.",
    "partition_lost": "Another replica took over a partition, since this one was late to renew its lease.",
    "partition_restarts": "A partition begins anew from its checkpoint; `reason` as in projector_stream_restarts_total.",
    "pass_failed": "A defect: a pass of the operator ended by an error that nobody foresaw; the resource says InternalError.",
    "position_repaired": "The change stream could not be resumed; `events` events were missing and have been applied from the log.",
    "projection_dropped": "The definition of a projection is gone, and its read model was dropped as it had asked.",
    "projection_failed": "A projection stopped itself. See the runbook ProjectorFailed.",
    "projection_problem": "A projection cannot run as its definition has it; `reason` says why.",
    "projector_failed": "The projector could not start (address taken, token file without a token).",
    "projector_started": "The ops API is open.",
    "projector_stopped": "The end, after the last write; all leases are given back.",
    "rebuild_scan_done": "A new version has folded the whole log, and goes on with the change stream.",
    "rebuild_scan_started": "A new version begins to fold the whole log, in processes of its own.",
    "request_failed": "A defect: a request was answered with 500. The outcome of an append is unknown: repeat it.",
    "resource_deleted": "A custom resource is gone; what it owned was kept or dropped as its policy says.",
    "tick_failed": "A round of the projector failed, mostly since MongoDB was away. Once per kind of error.",
    "token_file_unreadable": "The file with the bearer tokens could not be read again: the old tokens stay in use.",
    "tokens_replaced": "The bearer tokens were read again.",
    "tracing_started": "Traces are recorded.",
    "tracing_unavailable": "Traces are wished for, but the extra `tracing` is not installed.",
    "transaction_split": "MongoDB's cache had no room for a transaction of `events` events: it is written in two.",
    "waiting_for_event_store": "MongoDB, or the log in it, is not there yet. Once per reason.",
    "write_refused": "MongoDB refused an event, by the validator of the collection for one.",
}


class LogEvent(NamedTuple):
    """A line that may be logged."""

    name: str
    level: str
    part: str
    fields: tuple[str, ...]


def found() -> list[LogEvent]:
    """All that the shipped code logs by structlog, by name."""
    events: dict[tuple[str, str], tuple[set[str], set[str]]] = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            part = "operator" if "operator" in path.parts else package
            for name, levels, fields in _logged(ast.parse(path.read_text())):
                known = events.setdefault((name, part), (set(), set()))
                known[0].update(levels)
                known[1].update(fields)
    return sorted(
        LogEvent(name, " or ".join(sorted(levels)), part, tuple(sorted(fields)))
        for (name, part), (levels, fields) in events.items()
    )


def _logged(tree: ast.Module) -> Iterator[tuple[str, set[str], set[str]]]:
    for scope in ast.walk(tree):
        if isinstance(scope, ast.FunctionDef | ast.AsyncFunctionDef):
            chosen = _chosen(scope)
            for call in ast.walk(scope):
                if isinstance(call, ast.Call) and call.args:
                    levels = _levels(call.func, chosen)
                    fields = {"exception" if word.arg == "exc_info" else word.arg or "…" for word in call.keywords}
                    for name in _names(call.args[0]) if levels else ():
                        yield name, levels, fields


def _chosen(scope: ast.AST) -> set[str]:
    """The levels of `log = logger.error if … else logger.warning` in a function."""
    found_levels: set[str] = set()
    for node in ast.walk(scope):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "log":
            found_levels |= {each.attr for each in ast.walk(node.value) if isinstance(each, ast.Attribute)}
    return {LEVELS[level] for level in found_levels & LEVELS.keys()}


def _levels(function: ast.expr, chosen: set[str]) -> set[str]:
    if isinstance(function, ast.Name) and function.id == "log":
        return chosen
    if isinstance(function, ast.Attribute) and function.attr in LEVELS and "log" in ast.unparse(function.value).lower():
        return {LEVELS[function.attr]}
    return set()


def _names(argument: ast.expr) -> list[str]:
    """The event's name, or both of a choice. A name that is computed cannot be documented, hence is an error."""
    match argument:
        case ast.Constant(value=str(name)):
            return [name]
        case ast.IfExp(body=ast.Constant(value=str(one)), orelse=ast.Constant(value=str(other))):
            return [one, other]
    raise ValueError(f"a log event without a constant name: {ast.unparse(argument)}")
