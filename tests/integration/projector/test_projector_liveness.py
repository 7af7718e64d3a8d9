"""What `/healthz` of a running projector says: a tick that never ends is told to the kubelet, a MongoDB that is away is not."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import aiohttp
import pytest
from pydantic import SecretStr

from eventstore.settings import EventStoreSettings
from projector import supervisor
from projector.metrics import Metrics
from projector.run import STUCK_TICKS, run_projector
from projector.settings import ProjectorSettings
from projector.supervisor import Supervisor
from projector.wanted import FixedCatalog
from tests.eventually import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from eventstore.client import Database

LEASE_SECONDS = 0.5


@pytest.fixture
async def url(database: Database, mongodb_uri: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[str]:
    """A projector that runs, with deadlines that pass soon."""
    monkeypatch.setattr(supervisor, "SHORTEST_DEADLINE_SECONDS", LEASE_SECONDS)
    stopping, port = asyncio.Event(), asyncio.get_running_loop().create_future()
    store = EventStoreSettings(mongodb_uri=SecretStr(mongodb_uri), eventstore_database=database.name)
    settings = ProjectorSettings(http_host="127.0.0.1", http_port=0, lease_seconds=LEASE_SECONDS)
    running = asyncio.create_task(
        run_projector(
            settings, store, lambda _: FixedCatalog([]), metrics=Metrics(), stopping=stopping, started=port.set_result
        )
    )
    yield f"http://127.0.0.1:{await port}/healthz"
    stopping.set()
    await running


async def _status(url: str) -> tuple[int, str]:
    async with aiohttp.ClientSession() as session, session.get(url) as answer:
        return answer.status, (await answer.json()).get("reason", "")


async def test_a_tick_that_never_ends_is_told(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, ended = asyncio.Event(), asyncio.Event()

    async def hangs(_: Supervisor) -> None:
        begun.set()
        await ended.wait()

    assert (await _status(url))[0] == 200
    monkeypatch.setattr(Supervisor, "tick", hangs)
    await begun.wait()

    async def told() -> bool:
        status, reason = await _status(url)
        return status == 503 and "a tick has not ended" in reason

    await eventually(told)
    ended.set()
    monkeypatch.undo()
    await eventually(lambda: _is_well(url))


async def test_ticks_that_fail_are_no_reason_to_restart(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    failed: list[float] = []

    async def fails(_: Supervisor) -> None:
        failed.append(time.monotonic())
        raise TimeoutError

    monkeypatch.setattr(Supervisor, "tick", fails)
    # Far longer than a tick that does not end may take.
    while len(failed) < 2 or failed[-1] - failed[0] < 1.5 * STUCK_TICKS * LEASE_SECONDS:
        assert await _is_well(url)


async def _is_well(url: str) -> bool:
    return (await _status(url))[0] == 200
