"""The process of `projector run`: connect, provision, follow the log, answer over HTTP, drain.

MongoDB may be away at the start and at any time later: the process lives, is not ready, and says why.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Final

import stamina
import structlog
from pymongo.errors import PyMongoError

from eventstore import indexes, tasks
from eventstore.client import cause, connect, open_database, silence
from eventstore.logs import redact
from projector.http import serve
from projector.supervisor import Supervisor

if TYPE_CHECKING:
    from collections.abc import Callable

    from eventstore.client import Database
    from eventstore.settings import EventStoreSettings
    from projector.metrics import Metrics
    from projector.settings import ProjectorSettings
    from projector.wanted import Catalog

__all__ = ["run_projector"]

STUCK_TICKS: Final = 5
"""Deadlines of a tick after which only a restart helps: far beyond what a busy machine adds, and before a person looks."""

_log = structlog.stdlib.get_logger(__name__)


async def run_projector(
    settings: ProjectorSettings,
    store: EventStoreSettings,
    catalog: Callable[[Database], Catalog],
    *,
    metrics: Metrics,
    stopping: asyncio.Event,
    started: Callable[[int], None] | None = None,
) -> None:
    """Runs what `catalog(database of the read models)` wants until `stopping`; then writes what was folded and gives all
    leases back. `started` is called with the port of the ops API once it listens.

    Raises OSError when the address is taken, `eventstore.auth.TokensMissingError` for a token file without a token.
    """
    async with connect(store.mongodb_uri, "projector") as client:
        log = open_database(client, store.eventstore_database)
        database = open_database(client, settings.database or store.eventstore_database)
        supervisor = Supervisor(log, database, catalog(database), settings, metrics, uri=store.mongodb_uri)
        state = _State(supervisor, stopping)
        async with serve(supervisor, metrics.registry, state.not_ready, state.stuck) as port:
            _log.info("projector_started", host=settings.http_host, port=port)
            if started is not None:
                started(port)
            if await _provision(log, state, stopping, provision=store.eventstore_provision):
                await supervisor.run(stopping)
    _log.info("projector_stopped")


class _State:
    """What `/readyz` and `/healthz` answer."""

    def __init__(self, supervisor: Supervisor, stopping: asyncio.Event) -> None:
        self._supervisor = supervisor
        self._stopping = stopping
        self.waiting: str | None = "it has just been started"

    def stuck(self) -> str | None:
        """None while ticks begin and end, with whatever result: each has a deadline, so one that never ends is a defect."""
        last, longest = self._supervisor.last_turn, STUCK_TICKS * self._supervisor.tick_seconds
        if self._stopping.is_set() or last is None or time.monotonic() - last <= longest:
            return None
        return f"a tick has not ended for {longest:g} s"

    async def not_ready(self) -> str | None:
        """None when MongoDB answers and a tick went through lately."""
        if self._stopping.is_set():
            return "it is shutting down"
        if self.waiting is not None:
            return self.waiting
        age = time.monotonic() - self._supervisor.last_tick
        if age > 2 * self._supervisor.tick_seconds:  # a tick may take one of these, and then fail
            return "no tick has gone through lately; the log has the reason"
        return await silence(self._supervisor.database)


async def _provision(log: Database, state: _State, stopping: asyncio.Event, *, provision: bool) -> bool:
    """Makes what the log lacks as soon as MongoDB is there; False when `stopping` came first."""
    task = asyncio.create_task(_provisioned(log, state, provision=provision))
    stop = asyncio.create_task(stopping.wait())
    try:
        await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
        return task.done() and not stopping.is_set()
    finally:
        await tasks.end([task, stop])


async def _provisioned(log: Database, state: _State, *, provision: bool) -> None:
    async for attempt in stamina.retry_context(on=PyMongoError, attempts=None, timeout=None, wait_max=5.0):
        with attempt:
            try:
                if provision:
                    await indexes.provision(log)
                else:
                    await log.command("ping")
            except PyMongoError as error:
                why = cause(log.client, error)
                reason = redact(str(why))
                if state.waiting != reason:
                    _log.warning("waiting_for_event_store", error=type(why).__name__, reason=reason[:500])
                state.waiting = reason
                raise
    state.waiting = None
