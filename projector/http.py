"""The ops API of a running projector: the verbs of `projector.ops` over HTTP, beside probes and metrics."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from aiohttp import web

from eventstore.service import add_ops_routes

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from prometheus_client import CollectorRegistry

    from eventstore.service import Readiness
    from projector.supervisor import Supervisor

__all__ = ["serve"]


@contextlib.asynccontextmanager
async def serve(supervisor: Supervisor, registry: CollectorRegistry, not_ready: Readiness) -> AsyncIterator[int]:
    """Serves on the address of the settings while the context lasts; yields the port. Raises OSError when it is taken."""
    app = web.Application()
    add_ops_routes(app, registry, not_ready)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=2.0)
    await runner.setup()
    try:
        site = web.TCPSite(runner, supervisor.settings.http_host, supervisor.settings.http_port)
        await site.start()
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()
