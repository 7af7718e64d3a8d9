"""The command `appender`."""

from __future__ import annotations

import sys

import click
import structlog
from pydantic import ValidationError

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
    try:
        with tracing("appender"):
            service.run(lambda stopping: serve(settings, store, stopping, metrics=metrics))
    except (OSError, TokensMissingError) as error:
        structlog.get_logger(__name__).error("appender_failed", error=str(error))
        sys.exit(1)


def _explain(error: ValidationError | OSError) -> str:
    """Settings that do not fit, one a line, by the name of their variable and without their value."""
    if isinstance(error, OSError):
        return str(error)
    return "\n".join(
        f"{'.'.join(str(part) for part in each['loc']) or 'settings'}: {each['msg']}" for each in error.errors()
    )
