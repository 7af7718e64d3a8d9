"""Answers for people: tables of what the verbs return. `--output json` prints the same as the HTTP API."""

from __future__ import annotations

import datetime
import sys
from typing import TYPE_CHECKING, Any, Final

import msgspec
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType

    from projector.overview import Detail, ParkedPage, Summary
    from projector.verify import Verification
    from projector.waiting import Waited

__all__ = ["detail", "json_text", "parked", "show", "summaries", "verification", "waited"]

_STYLES: Final = {"live": "green", "failed": "bold red", "paused": "yellow", "not_running": "red"}


def json_text(value: Any) -> str:
    """A verb's answer as JSON, indented."""
    return msgspec.json.format(msgspec.json.encode(value, enc_hook=str), indent=2).decode()


def show(renderable: RenderableType) -> None:
    """Prints it; as wide as it needs to be where nobody looks at a terminal."""
    # An aggregateId may look like markup, and is to be shown as it is.
    console = Console(markup=False, highlight=False, emoji=False, width=None if sys.stdout.isatty() else 200)
    console.print(renderable)


def summaries(rows: Sequence[Summary]) -> RenderableType:
    """A line per projection."""
    if not rows:
        return "No projections: none is defined, and none has been run."
    table = _table("NAME", "VERSION", "STATE", "LAG", "BACKLOG", "PARKED", "REBUILD", "PARTITIONS", "UPDATED")
    for row in rows:
        table.add_row(
            row.name, _or_dash(row.version), _state(row.state), _seconds(row.lag_seconds), _or_dash(row.backlog_events),
            _or_dash(row.parked), _rebuild(row), str(row.partitions), _ago(row.updated_at),
        )  # fmt: skip
    errors = [Text(f"{row.name}: {row.error}", style="red") for row in rows if row.error]
    return Group(table, *errors)


def detail(found: Detail) -> RenderableType:
    """Everything about a projection."""
    facts = Table.grid(padding=(0, 2))
    for name, value in (
        ("name", found.name), ("state", _state(found.state)), ("error", found.error),
        ("version", _or_dash(found.version)), ("view", _or_dash(found.view)), ("lag", _seconds(found.lag_seconds)),
        ("backlog", _or_dash(found.backlog_events)), ("set aside", _or_dash(found.parked)), ("rebuild", _rebuild(found)),
        ("partitions", str(found.partitions)), ("cut-over", "by hand" if found.manual_cutover else "by itself"),
        ("defined by", found.defined_by), ("updated", _ago(found.updated_at)),
    ):  # fmt: skip
        if value is not None:
            facts.add_row(Text(name, style="dim"), value)
    builds = _table("BUILD", "ROLE", "VERSION", "DOCUMENTS", "PARKED", "FORM", "CREATED")
    for build in found.builds:
        form = "declared" if build.declared else "Python"
        builds.add_row(
            build.id, build.role, str(build.version), str(build.documents), str(build.parked), form, _ago(build.created_at)
        )  # fmt: skip
    owners = _table("PARTITION", "STATE", "LAG", "OWNER", "REPORTED", "ERROR")
    for partition in found.partition_owners:
        owners.add_row(
            f"{partition.build}/{partition.partition}", _state(partition.state), _seconds(partition.lag_seconds),
            _or_dash(partition.owner), _ago(partition.reported_at), partition.error or "",
        )  # fmt: skip
    return Group(facts, "", builds, "", owners)


def parked(page: ParkedPage) -> RenderableType:
    """Aggregates that are set aside."""
    if not page.parked:
        return "Nothing is set aside."
    table = _table("AGGREGATE", "EVENT", "NAME", "BUILD", "STATE", "SINCE", "ATTEMPTS", "WHY")
    for row in page.parked:
        table.add_row(
            row.aggregate_id, str(row.sequence_no), _or_dash(row.event_name), row.build, row.state, _ago(row.since),
            str(row.attempts), f"{row.category}: {row.reason}",
        )  # fmt: skip
    if page.next is None:
        return table
    return Group(table, f"There may be more: --after {page.next}")


def verification(found: Verification) -> RenderableType:
    """What was compared, and what was found."""
    text = f"{found.build}: all marks and {found.documents} documents compared with the log in {found.seconds:.1f} s"
    if found.ok:
        return Text(f"{text}: no difference.", style="green")
    parts: list[RenderableType] = [Text(text, style="red")]
    if found.incomplete:
        parts.append(Text(f"Not everything was compared: {found.incomplete}.", style="red"))
    if found.findings:
        table = _table("KIND", "KEY", "MARK", "HEAD", "WHAT")
        for finding in found.findings:
            table.add_row(
                finding.kind, str(finding.key), _or_dash(finding.mark), _or_dash(finding.head), finding.detail
            )  # fmt: skip
        parts.append(table)
    if found.truncated:
        parts.append("There is more; the rest was not looked at.")
    return Group(*parts)


def waited(found: Waited) -> RenderableType:
    """How a wait ended."""
    if found.reached:
        return f"{found.name} shows event {found.sequence_no} of {found.aggregate_id}."
    text = f"{found.name} does not show event {found.sequence_no} of {found.aggregate_id}: it is at {found.mark}"
    return Text(f"{text} ({found.reason})." if found.reason else f"{text}.", style="red")


def _table(*columns: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _state(state: str) -> Text:
    return Text(state, style=_STYLES.get(state, "yellow"))


def _or_dash(value: object) -> str:
    return "-" if value is None else str(value)


def _rebuild(row: Summary) -> str:
    if row.candidate is None:
        return "-"
    percent = (row.rebuild or {}).get("percent")
    return row.candidate if percent is None else f"{row.candidate} {percent:.0f} %"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} s"


def _ago(at: datetime.datetime | None) -> str:
    if at is None:
        return "-"
    age = max(datetime.timedelta(0), datetime.datetime.now(datetime.UTC) - at)
    return f"{str(age).partition('.')[0]} ago"
