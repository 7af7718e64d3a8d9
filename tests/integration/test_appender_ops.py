"""Probes and metrics on a port of their own: what a sidecar shows beyond the loopback of its pod."""

from __future__ import annotations

import asyncio

import aiohttp
from pydantic import SecretStr

from appender.app import serve
from appender.settings import AppenderSettings
from eventstore.embedded import free_port
from eventstore.settings import EventStoreSettings
from tests.appending import local_appender


async def test_the_ops_port_has_probes_and_metrics_and_nothing_else(mongodb_uri: str, database_name: str) -> None:
    port = free_port()
    async with (
        local_appender(mongodb_uri, database_name, ops_host="127.0.0.1", ops_port=port),
        aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session,
    ):
        for path, status in {
            "/healthz": 200,
            "/readyz": 200,
            "/metrics": 200,
            "/v1/aggregates/a": 404,
            "/v1/aggregates/a/events": 404,
            "/openapi.json": 404,
        }.items():
            async with session.get(path) as response:
                assert (path, response.status) == (path, status)
        async with session.post(
            "/v1/aggregates/a/events", json={"events": [{"eventName": "x", "payload": {}}]}
        ) as response:
            assert response.status == 404


async def test_without_a_log_it_is_alive_and_not_ready(mongodb_uri: str, database_name: str) -> None:
    ops, stopping = free_port(), asyncio.Event()
    started: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    store = EventStoreSettings(
        mongodb_uri=SecretStr(mongodb_uri), eventstore_database=database_name, eventstore_provision=False
    )
    settings = AppenderSettings(port=0, ops_host="127.0.0.1", ops_port=ops)
    serving = asyncio.create_task(serve(settings, store, stopping, started=started.set_result))
    try:
        await asyncio.wait((serving, started), return_when=asyncio.FIRST_COMPLETED)
        async with aiohttp.ClientSession(f"http://127.0.0.1:{ops}") as session:
            for path, status in {"/healthz": 200, "/readyz": 503}.items():
                async with session.get(path) as response:
                    assert (path, response.status) == (path, status)
    finally:
        stopping.set()
        await serving
