"""The command `appender`."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Literal

import aiohttp
import click
import rich.console
import rich.progress
import structlog
import uvloop
from pydantic import ValidationError

from appender import importer
from appender.app import serve
from appender.metrics import Metrics
from appender.settings import AppenderSettings
from eventstore import __version__, logs, service
from eventstore.auth import TokensMissingError
from eventstore.settings import EventStoreSettings
from eventstore.tracing import tracing

__all__ = ["main"]


@click.group()
@click.version_option(__version__)
def main() -> None:
    """Append events to an event store on MongoDB, over HTTP."""


@main.command("serve")
def serve_command() -> None:
    """Serve the HTTP API until SIGTERM; settings come from the environment."""
    try:
        settings, store = AppenderSettings(), EventStoreSettings()
    except (ValidationError, OSError) as error:
        raise click.ClickException(_explain(error)) from error
    logs.configure("appender", store.log_level, store.log_format)
    metrics = Metrics()
    metrics.add_process()
    # What is loaded now stays: the collector need not look at it again. It took 8 % of the time at its defaults; at ten
    # times these numbers, bodies of clients that vanished would stay for hundreds of megabytes.
    gc.freeze()
    gc.set_threshold(5_000, 10, 10)
    try:
        with tracing("appender"):
            service.run(lambda stopping: serve(settings, store, stopping, metrics=metrics))
    except (OSError, TokensMissingError) as error:
        structlog.get_logger(__name__).error("appender_failed", error=str(error))
        sys.exit(1)


@main.command("import")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--url", default="http://127.0.0.1:8080", show_default=True, help="The appender.")
@click.option(
    "--order",
    type=click.Choice(["file", "timestamp"]),
    default="file",
    show_default=True,
    help="Append as the events stand in the file, or sorted by timestamp (reads all of it into memory).",
)
@click.option(
    "--clients",
    type=click.IntRange(1, 256),
    default=16,
    show_default=True,
    help="Requests at the same time; the events of an aggregate stay in order.",
)
@click.option("--aggregate-id", help="CSV: column of the aggregateId.")
@click.option("--event-name", help="CSV: column of the eventName.")
@click.option("--timestamp", help="CSV: column of the timestamp.")
@click.option("--event-id", help="CSV: column of the eventId; without one it derives from the row.")
@click.option(
    "--token-file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="File with the bearer token."
)
def import_command(
    file: Path,
    url: str,
    order: Literal["file", "timestamp"],
    clients: int,
    token_file: Path | None,
    **columns: str | None,
) -> None:
    """Append the events of FILE: NDJSON as the bulk route takes it, or CSV (by its suffix .csv).

    A second run appends nothing: events without an eventId get one from their line. Ends with 1 when an event was refused,
    with 2 when the file cannot be read as events, with 3 when the appender does not answer.
    """
    token = token_file.read_text().split()[0] if token_file else None
    shown = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeRemainingColumn(),
    )
    try:
        with rich.progress.Progress(*shown, console=rich.console.Console(stderr=True)) as bar:
            task = bar.add_task("events", total=importer.count_rows(file))

            def progress(done: int) -> None:
                bar.advance(task, done)

            result = uvloop.run(
                importer.import_file(
                    file,
                    url,
                    columns=importer.Columns(**columns),
                    order=order,
                    clients=clients,
                    token=token,
                    progress=progress,
                )
            )
            bar.update(task, total=result.appended + result.already_there + result.failed)
    except importer.BadFileError as error:
        click.echo(f"{file}: {error}", err=True)
        sys.exit(2)
    except (aiohttp.ClientError, TimeoutError) as error:
        click.echo(f"{url}: {error or 'no answer in time'}", err=True)
        sys.exit(3)
    for line in result.errors:
        click.echo(f"{file}: {line}", err=True)
    click.echo(
        f"{result.appended} appended, {result.already_there} already there, {result.failed} failed,"
        f" {result.seconds:.1f} s"
    )
    if result.failed:
        sys.exit(1)


def _explain(error: ValidationError | OSError) -> str:
    """Settings that do not fit, one a line, by the name of their variable and without their value."""
    if isinstance(error, OSError):
        return str(error)
    return "\n".join(
        f"{'.'.join(str(part) for part in each['loc']) or 'settings'}: {each['msg']}" for each in error.errors()
    )
