"""The command `projector`: its processes here, its verbs in `projector.commands`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
import structlog
from prometheus_client import GCCollector, ProcessCollector

from eventstore import __version__, logs, service
from eventstore.auth import TokensMissingError
from eventstore.embedded import MongodNotFoundError
from eventstore.tracing import tracing
from projector import collector
from projector.commands import COMMANDS
from projector.database_catalog import DatabaseCatalog
from projector.environment import load_projections, settings_of_environment
from projector.metrics import Metrics
from projector.run import run_projector
from projector.wanted import FixedCatalog

if TYPE_CHECKING:
    from collections.abc import Callable

    from eventstore.client import Database
    from projector.wanted import Catalog

__all__ = ["main"]


@click.group()
@click.version_option(__version__)
def main() -> None:
    """Keep read models current from the event log, in order and exactly once.

    MONGODB_URI and EVENTSTORE_DATABASE say where the log lies, PROJECTOR_DATABASE where the read models do.
    """


@main.command()
@click.option(
    "--projections",
    type=click.Path(path_type=Path, file_okay=False),
    help="A folder with declared projections (*.yaml). Default: PROJECTOR_PROJECTIONS.",
)
@click.option(
    "--module", "modules", multiple=True, help="A Python module that holds projections; may be given several times."
)
@click.option("--from-database", is_flag=True, help="What the collection projector.definitions says, as it changes.")
def run(projections: Path | None, modules: tuple[str, ...], *, from_database: bool) -> None:
    """Follow the log and keep read models current, until SIGTERM."""
    settings, store = settings_of_environment()
    projections = projections or (None if modules or from_database else settings.projections)
    if from_database and (projections or modules):
        raise click.UsageError("--from-database stands alone: its projections come from MongoDB.")
    catalog: Callable[[Database], Catalog] = DatabaseCatalog
    if not from_database:
        if projections is None and not modules:
            raise click.UsageError(
                "What shall run? Give --projections DIR (or PROJECTOR_PROJECTIONS), --module NAME or --from-database."
            )
        fixed = FixedCatalog(load_projections(projections, modules))
        catalog = lambda _database: fixed  # noqa: E731 - a name for either
    logs.configure("projector", store.log_level, store.log_format)
    metrics = Metrics()
    ProcessCollector(registry=metrics.registry)
    GCCollector(registry=metrics.registry)
    collector.relax()
    try:
        with tracing("projector"):
            service.run(lambda stopping: run_projector(settings, store, catalog, metrics=metrics, stopping=stopping))
    except (OSError, TokensMissingError) as error:
        structlog.stdlib.get_logger(__name__).error("projector_failed", error=str(error))
        sys.exit(1)


@main.command()
@click.option(
    "--projections",
    type=click.Path(path_type=Path, file_okay=False),
    help="A folder with declared projections (*.yaml). Default: PROJECTOR_PROJECTIONS.",
)
@click.option("--module", "modules", multiple=True, help="A Python module that holds projections.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="Of the appender; 0: any.")
@click.option(
    "--ops-port", type=click.IntRange(0, 65535), default=8081, show_default=True, help="Of the projector; 0: any."
)
def dev(projections: Path | None, modules: tuple[str, ...], port: int, ops_port: int) -> None:
    """Run a MongoDB, an appender and a projector together until Ctrl-C, to try things out. Nothing of it stays."""
    from projector.dev import NotStartedError, develop  # noqa: PLC0415 - the appender is only needed here

    settings, store = settings_of_environment()
    projections = projections or (None if modules else settings.projections)
    if projections is None and not modules:
        raise click.UsageError("What shall run? Give --projections DIR (or PROJECTOR_PROJECTIONS) or --module NAME.")
    loaded = load_projections(projections, modules)
    logs.configure("dev", store.log_level, store.log_format if "LOG_FORMAT" in os.environ else "console")
    try:
        develop(loaded, appender_port=port, projector_port=ops_port)
    except (OSError, MongodNotFoundError, NotStartedError) as error:
        raise click.ClickException(str(error)) from error


@main.command()
def operator() -> None:
    """Provision event stores and projections from Kubernetes resources, until SIGTERM (needs the extra `operator`)."""
    try:
        from projector.operator.app import run_operator  # noqa: PLC0415 - kopf is heavy, and an extra
    except ModuleNotFoundError as error:
        raise click.ClickException(f"{error}; install the extra: pip install 'eventprojector[operator]'") from error
    _, store = settings_of_environment()
    logs.configure("operator", store.log_level, store.log_format)
    service.run(run_operator)


for _command in COMMANDS:
    main.add_command(_command)
