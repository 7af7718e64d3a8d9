"""The appender's life: connect, provision, serve, drain, close.

`serve` runs an appender on its address until an event is set: `appender serve`, `projector dev` and the tests all go
through it. `open_app` gives the aiohttp application alone, for a server of one's own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Any, Final

import stamina
import structlog
from aiohttp import web
from pymongo.errors import PyMongoError

from appender import openapi
from appender.committer import Committer
from appender.endpoint import Endpoints
from appender.metrics import Metrics
from appender.routes import Routes
from appender.topology import PrimaryWatcher
from eventstore import indexes, tasks
from eventstore.auth import Tokens
from eventstore.client import connect, open_database, silence
from eventstore.logs import redact
from eventstore.service import Readiness, add_ops_routes

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from appender.settings import AppenderSettings
    from eventstore.client import Database
    from eventstore.settings import EventStoreSettings

__all__ = ["open_app", "serve"]

_log = structlog.get_logger(__name__)

_quiet = logging.getLogger(f"{__name__}.connections")
_quiet.setLevel(logging.CRITICAL)
"""aiohttp's own logger writes a stack trace for each connection that sends no HTTP. What fails in a handler is logged by
`appender.endpoint`."""

_READY: Final[web.AppKey[Readiness]] = web.AppKey("ready")

KEEPALIVE_SECONDS: Final = 75.0
"""A connection without a complete request for so long is closed: idle ones, and those that send headers byte by byte."""

LINGERING_SECONDS: Final = 2.0
"""How long a body that was refused is still read, so that the client gets to read the answer."""

MAX_CONNECTIONS: Final = 4_096
"""More are closed at once. A sidecar has one caller; a Deployment's callers pool theirs."""

MAX_HEADER_BYTES: Final = 8_190
"""Of the request line and of a header; with aiohttp's bound on their number it bounds what a head may hold in memory.
An aggregateId of 512 bytes is 1,536 when percent-encoded."""

SERVER_SELECTION_MS: Final = 3_000
"""Below the time of a batch, so that "no primary" is told from "no answer": the first leaves no doubt."""


@contextlib.asynccontextmanager
async def open_app(
    settings: AppenderSettings, store: EventStoreSettings, metrics: Metrics, **client_options: Any
) -> AsyncIterator[tuple[web.Application, Committer]]:
    """An application that appends to the event store of `store`, and its committer; both end with the context.

    MongoDB may be away: appends are refused and `/readyz` says so until the log's collection and unique index are there.
    `client_options` go to pymongo. Raises `eventstore.auth.TokensMissingError`.
    """
    tokens = Tokens(settings.token_file) if settings.token_file is not None else None
    watcher = PrimaryWatcher(asyncio.get_running_loop())
    options = {"serverSelectionTimeoutMS": SERVER_SELECTION_MS, "event_listeners": [watcher]} | client_options
    async with connect(store.mongodb_uri, "appender", **options) as client:
        database = open_database(client, store.eventstore_database)
        committer = Committer(client, database, settings, metrics)
        watcher.changed = committer.primary_changed
        opening = asyncio.create_task(_open(database, committer, provision=store.eventstore_provision))
        app = web.Application(client_max_size=settings.max_request_bytes)
        app[_READY] = lambda: _not_ready(database, committer)
        add_ops_routes(app, metrics.registry, app[_READY])
        Routes(committer, database, settings).add_to(app, Endpoints(metrics, tokens), openapi.encode())
        try:
            yield app, committer
        finally:
            await tasks.end([opening])
            await committer.close()


async def serve(
    settings: AppenderSettings,
    store: EventStoreSettings,
    stopping: asyncio.Event,
    *,
    metrics: Metrics | None = None,
    started: Callable[[int], None] | None = None,
    **client_options: Any,
) -> None:
    """Serves until `stopping` is set, then drains and returns. `started` is called with the port once it listens.

    The order of the end: `/readyz` fails and new appends are refused; what is queued gets its outcome, for at most
    `drain_seconds`; the socket closes; the last answers are sent; the client closes. Raises OSError when the address is
    taken.
    """
    metrics = metrics or Metrics()
    async with (
        open_app(settings, store, metrics, **client_options) as (app, committer),
        _ops_listener(settings, metrics, app[_READY]),
    ):
        runner = web.AppRunner(
            app,
            access_log=None,
            logger=_quiet,
            keepalive_timeout=KEEPALIVE_SECONDS,
            lingering_time=LINGERING_SECONDS,
            max_line_size=MAX_HEADER_BYTES,
            max_field_size=MAX_HEADER_BYTES,
            shutdown_timeout=2.0,
        )
        await runner.setup()
        try:
            listener = await asyncio.get_running_loop().create_server(
                _limited(runner, metrics), settings.host, settings.port
            )
            port = listener.sockets[0].getsockname()[1]
            _log.info("appender_listening", host=settings.host, port=port)
            if started is not None:
                started(port)
            await stopping.wait()
            _log.info("appender_draining", events=committer.waiting_events)
            if not await committer.drain(settings.drain_seconds):
                _log.warning("drain_incomplete", events=committer.waiting_events)
            listener.close()
        finally:
            await runner.cleanup()
    _log.info("appender_stopped")


@contextlib.asynccontextmanager
async def _ops_listener(settings: AppenderSettings, metrics: Metrics, ready: Readiness) -> AsyncIterator[None]:
    """Probes and metrics on an address of their own, if the settings name one; until the drain is over."""
    if settings.ops_port is None:
        yield
        return
    app = web.Application()
    add_ops_routes(app, metrics.registry, ready)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    try:
        await web.TCPSite(runner, settings.ops_host, settings.ops_port).start()
        _log.info("ops_listening", host=settings.ops_host, port=runner.addresses[0][1])
        yield
    finally:
        await runner.cleanup()


def _limited(runner: web.AppRunner, metrics: Metrics) -> Callable[[], asyncio.Protocol]:
    """Makes a protocol for each connection, or one that closes it when there are too many."""
    server = runner.server
    if server is None:
        raise RuntimeError("the runner is not set up")
    metrics.follow(metrics.connections, lambda: len(server.connections))

    def make() -> asyncio.Protocol:
        return server() if len(server.connections) < MAX_CONNECTIONS else _Refusal()

    return make


class _Refusal(asyncio.Protocol):
    """Closes its connection."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()


async def _open(database: Database, committer: Committer, *, provision: bool) -> None:
    """Lets appends in once the log has its unique index: without it, sequence numbers would not be safe."""
    waiting = False
    async for attempt in stamina.retry_context(
        on=(PyMongoError, LookupError), attempts=None, timeout=None, wait_max=2.0
    ):
        with attempt:
            try:
                await _prepare(database, provision=provision)
            except (PyMongoError, LookupError) as error:
                reason = redact(str(error))
                committer.refuse(f"The event store is not there yet: {reason}")
                if not waiting:
                    waiting = True
                    _log.warning("waiting_for_event_store", reason=reason)
                raise
    committer.open()
    if waiting:
        _log.info("event_store_ready")


async def _prepare(database: Database, *, provision: bool) -> None:
    if provision:
        await indexes.provision(database)
    elif (missing := await indexes.missing(database)) is not None:
        raise LookupError(missing)


async def _not_ready(database: Database, committer: Committer) -> str | None:
    if (reason := committer.refusal) is not None:
        return reason
    if committer.full:
        return "the queue is full"
    return await silence(database)
