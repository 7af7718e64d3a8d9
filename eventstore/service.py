"""What every long-running process of ours shares: its loop, its signals, and the routes that Kubernetes asks.

`/healthz` answers while the loop turns, and 503 when what the process does has come to a stop; `/readyz` answers 503 with the
reason while the process should get no traffic; `/metrics` is Prometheus' text.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeAlias

import uvloop
from aiohttp import web
from prometheus_client.aiohttp import make_aiohttp_handler

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from prometheus_client import CollectorRegistry

__all__ = ["Liveness", "Readiness", "add_ops_routes", "run"]

Readiness: TypeAlias = Callable[[], Awaitable[str | None]]
"""Asked by `/readyz`: None when ready, else the reason in words."""

Liveness: TypeAlias = Callable[[], str | None]
"""Asked by `/healthz`: None while it works or waits for MongoDB, else why only a restart can help."""


def run(main: Callable[[asyncio.Event], Coroutine[None, None, None]]) -> None:
    """Runs `main(stopping)` on uvloop until it returns; SIGTERM and SIGINT set `stopping`.

    `main` has the say over the order of its shutdown; a second signal does nothing more, since the platform's
    SIGKILL is the last word already.
    """

    async def guarded() -> None:
        stopping = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stopping.set)
        await main(stopping)

    uvloop.run(guarded())


def add_ops_routes(
    app: web.Application, registry: CollectorRegistry, ready: Readiness, stuck: Liveness = lambda: None
) -> None:
    """Adds `/healthz`, `/readyz` and `/metrics` to an application."""

    async def healthz(_request: web.Request) -> web.Response:
        reason = stuck()
        if reason is None:
            return web.json_response({"status": "ok"})
        return web.json_response({"status": "stuck", "reason": reason}, status=503)

    async def readyz(_request: web.Request) -> web.Response:
        reason = await ready()
        if reason is None:
            return web.json_response({"status": "ready"})
        return web.json_response({"status": "not ready", "reason": reason}, status=503)

    app.router.add_get("/healthz", healthz)
    app.router.add_get("/readyz", readyz)
    app.router.add_get("/metrics", make_aiohttp_handler(registry))
