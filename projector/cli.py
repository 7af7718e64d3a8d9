"""The command `projector`: its processes here, its verbs in `projector.commands`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
import structlog
from prometheus_client import GCCollector, ProcessCollector
from pydantic import ValidationError

from eventstore import __version__, logs, service
from eventstore.settings import EventStoreSettings
from projector.database_catalog import DatabaseCatalog
from projector.errors import ProjectionError
from projector.loader import distinct, load_folder, load_modules
from projector.metrics import Metrics
from projector.run import run_projector
from projector.settings import ProjectorSettings
from projector.supervisor import FixedCatalog

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from eventstore.client import Database
    from projector.supervisor import Catalog

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
    catalog = DatabaseCatalog if from_database else fixed_catalog(projections, modules)
    logs.configure("projector", store.log_level, store.log_format)
    metrics = Metrics()
    ProcessCollector(registry=metrics.registry)
    GCCollector(registry=metrics.registry)
    try:
        service.run(lambda stopping: run_projector(settings, store, catalog, metrics=metrics, stopping=stopping))
    except OSError as error:
        structlog.stdlib.get_logger(__name__).error("projector_failed", error=str(error))
        sys.exit(1)


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


def settings_of_environment() -> tuple[ProjectorSettings, EventStoreSettings]:
    """The settings. Raises `click.ClickException` that names each variable that does not fit, without its value."""
    try:
        return ProjectorSettings(), EventStoreSettings()
    except OSError as error:
        raise click.ClickException(str(error)) from error
    except ValidationError as error:
        lines = [
            f"{'.'.join(str(part) for part in each['loc']) or 'settings'}: {each['msg']}" for each in error.errors()
        ]
        raise click.ClickException("\n".join(lines)) from error


def fixed_catalog(folder: Path | None, modules: Sequence[str]) -> Callable[[Database], Catalog]:
    """The projections of a folder and of modules. Raises `click.UsageError` without any, `ClickException` for a bad one."""
    if folder is None and not modules:
        raise click.UsageError(
            "What shall run? Give --projections DIR (or PROJECTOR_PROJECTIONS), --module NAME or --from-database."
        )
    sys.path.insert(0, str(Path.cwd()))  # a command's path begins with its own folder, `python -m` with this one
    try:
        loaded = distinct([*(load_folder(folder) if folder else ()), *(load_modules(modules) if modules else ())])
    except ProjectionError as error:
        raise click.ClickException(str(error)) from error
    catalog = FixedCatalog(loaded)
    return lambda _database: catalog
