"""The whole path in one command: a log is appended over HTTP to a real MongoDB, and read models come out.

python -m examples.demo examples/shop/events.ndjson
python -m examples.demo permits.csv     # an event log with the columns case:concept:name, concept:name, time:timestamp
"""

from __future__ import annotations

import asyncio
import csv
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import aiohttp
import click
import uvloop
from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from appender.importer import BadFileError, Imported, import_file, read_rows
from eventstore import logs
from eventstore.client import Database, connect, open_database
from eventstore.embedded import MongodNotFoundError
from projector.dev import NotStartedError, Running, mongodb, running
from projector.loader import distinct, load_folder, load_modules
from projector.ops import Ops

if TYPE_CHECKING:
    from collections.abc import Sequence

    from projector.projection import Projection

HERE: Final = Path(__file__).parent
SHOWN_DOCUMENTS: Final = 6
SHOWN_FIELDS: Final = 7
PATIENCE_SECONDS: Final = 120.0
GAUGE_SECONDS: Final = 5.0
"""The projector sets its gauges once a second: so long they may still tell of before."""

_console: Final = Console(width=None if sys.stdout.isatty() else 160, markup=False, highlight=False, emoji=False)


class Projected(NamedTuple):
    """How fast a projection was."""

    name: str
    seconds: float
    """From the first append until the read model showed the last event."""


class DemoError(Exception):
    """Something is not as it must be."""


@click.command()
@click.argument(
    "log", type=click.Path(exists=True, dir_okay=False, path_type=Path), default=HERE / "shop" / "events.ndjson"
)
def main(log: Path) -> None:
    """Append LOG over HTTP to a MongoDB that lives as long as this, and show the read models that come out."""
    logs.configure("demo", "warning", "console")
    started = time.monotonic()
    try:
        projections = _projections(log)
        count = sum(1 for _ in read_rows(log))  # a file that is no log is refused before anything is started
        with mongodb() as uri:
            uvloop.run(_demo(log, count, uri, projections))
    except (DemoError, BadFileError, MongodNotFoundError, NotStartedError, OSError, aiohttp.ClientError) as error:
        raise click.ClickException(str(error) or type(error).__name__) from error
    _console.print(f"Everything, from starting MongoDB to ending it, took {time.monotonic() - started:.1f} s.")


def _projections(log: Path) -> list[Projection]:
    """Those that fit the log: of permits for an event log with cases, else of the shop."""
    if log.suffix.lower() == ".csv":
        with log.open(newline="", encoding="utf-8-sig") as file:
            if "case:concept:name" in next(csv.reader(file), []):
                return load_folder(HERE / "receipt")
    return distinct([*load_folder(HERE / "shop" / "projections"), *load_modules(["examples.shop.sales"])])


async def _demo(log: Path, count: int, uri: str, projections: Sequence[Projection]) -> None:
    async with running(uri, projections) as urls, connect(SecretStr(uri), "demo") as client:
        database = open_database(client, urls.database)
        ops = Ops(database, database, lambda: {projection.name: projection for projection in projections})
        await asyncio.gather(*(_live(ops, projection.name) for projection in projections))
        _console.print(f"A real MongoDB, an appender at {urls.appender_url}, a projector at {urls.projector_url}.")
        started = time.monotonic()
        imported = await _import(log, count, urls)
        projected = await asyncio.gather(*(_caught_up(ops, each.name, started) for each in projections))
        for projection in projections:
            await _show_read_model(database, projection)
        await _show_metrics(urls, imported, projected)
        for projection in projections:
            await _compare_with_log(ops, projection.name)


async def _live(ops: Ops, name: str) -> None:
    """Waits until readers can see the projection, empty as it is."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not any(found.name == name and found.live for found in await ops.projections()):
        if time.monotonic() > deadline:
            raise DemoError(f"{name} was not built within {PATIENCE_SECONDS:g} s")
        await asyncio.sleep(0.1)


async def _import(log: Path, count: int, urls: Running) -> Imported:
    """Appends the events of the file over HTTP, by 16 clients at once, in the order of their time."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=_console) as bar:
        task = bar.add_task(f"appending {log.name}", total=count)
        imported = await import_file(
            log, urls.appender_url, order="timestamp", progress=lambda done: bar.advance(task, done)
        )
    if imported.failed or imported.appended != count:
        refused = f"{imported.appended} of the {count} events of {log} were appended, {imported.failed} refused"
        raise DemoError("\n".join([refused, *imported.errors]))
    return imported


async def _caught_up(ops: Ops, name: str, started: float) -> Projected:
    """Waits until the read model shows all that was appended."""
    while any(finding.kind == "behind" for finding in (await ops.verify(name, sample=1)).findings):
        if time.monotonic() - started > PATIENCE_SECONDS:
            raise DemoError(f"{name} did not catch up within {PATIENCE_SECONDS:g} s")
    return Projected(name, time.monotonic() - started)


async def _show_read_model(database: Database, projection: Projection) -> None:
    """Some documents, as a reader gets them: through the view."""
    view = database[projection.collection]
    count = await view.count_documents({})
    documents = await view.find().sort("_id", 1).limit(SHOWN_DOCUMENTS).to_list()
    if not documents:
        raise DemoError(f"the read model {projection.collection} is empty")
    fields = list(dict.fromkeys(field for document in documents for field in document))[:SHOWN_FIELDS]
    table = Table(title=f"{projection.collection}: {count} documents", title_justify="left", box=None, pad_edge=False)
    for field in fields:
        table.add_column(field, overflow="ellipsis", no_wrap=True)
    for document in documents:
        table.add_row(*(_cell(document.get(field)) for field in fields))
    _console.print(table, "")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return f"[{len(value)}] {', '.join(_cell(each) for each in value)}"[:40]
    if hasattr(value, "isoformat"):
        return str(value.isoformat(timespec="seconds"))
    return str(value)[:40]


async def _show_metrics(urls: Running, imported: Imported, projected: Sequence[Projected]) -> None:
    """What Prometheus would scrape, and the rates of this run."""
    appender = await _scrape(urls.appender_url)
    projector = await _scrape(urls.projector_url)
    deadline = time.monotonic() + GAUGE_SECONDS
    while any(lag for _, lag in projector["projector_lag_seconds"]) and time.monotonic() < deadline:
        await asyncio.sleep(0.1)
        projector = await _scrape(urls.projector_url)
    appended = sum(value for _, value in appender.get("appender_events_appended_total", ()))
    if appended != imported.appended:
        raise DemoError(f"the appender counts {appended:.0f} events, the import {imported.appended}")
    table = Table(box=None, pad_edge=False)
    for column in ("", "events", "events/s", "lag"):
        table.add_column(column, justify="left" if column == "" else "right")
    table.add_row("appended over HTTP", f"{appended:.0f}", f"{appended / imported.seconds:,.0f}", "")
    for each in projected:
        processed = [
            value
            for labels, value in projector.get("projector_events_processed_total", ())
            if labels["projection"] == each.name and labels["outcome"] in {"applied", "unhandled", "healed"}
        ]
        lag = [
            value for labels, value in projector.get("projector_lag_seconds", ()) if labels["projection"] == each.name
        ]
        table.add_row(
            f"projected to {each.name}", f"{sum(processed):.0f}", f"{appended / each.seconds:,.0f}", f"{max(lag):.1f} s"
        )
    _console.print(table, "")


async def _scrape(url: str) -> dict[str, list[tuple[dict[str, str], float]]]:
    """The samples of `/metrics` by name."""
    async with aiohttp.ClientSession(raise_for_status=True) as session, session.get(f"{url}/metrics") as answer:
        text = await answer.text()
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


async def _compare_with_log(ops: Ops, name: str) -> None:
    """`projector verify`: the read model is what the log says."""
    found = await ops.verify(name)
    if not found.ok:
        raise DemoError(f"{name} is not what the log says: {found.incomplete or found.findings[0]}")
    _console.print(f"{name}: {found.documents} documents compared with a fresh fold of the log, no difference.")


if __name__ == "__main__":
    main()
