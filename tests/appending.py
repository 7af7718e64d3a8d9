"""What the appender's tests share: an appender in this process, appenders as processes, and a small client."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import aiohttp
from pydantic import SecretStr

from appender.app import serve
from appender.metrics import Metrics
from appender.settings import AppenderSettings
from eventstore.embedded import free_port
from eventstore.settings import EventStoreSettings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

__all__ = ["Api", "Process", "event", "eventually", "local_appender"]


def event(name: str = "happened", **fields: Any) -> dict[str, Any]:
    """An event as a caller sends it."""
    return {"eventName": name, "payload": {}} | fields


class Api:
    """An HTTP client of one appender."""

    def __init__(self, url: str, session: aiohttp.ClientSession, metrics: Metrics | None = None) -> None:
        self.url = url
        self.session = session
        self.metrics = metrics

    async def call(self, method: str, path: str, **options: Any) -> tuple[int, Any]:
        """Status and decoded JSON of a call; text where it is not JSON."""
        async with self.session.request(method, self.url + path, **options) as response:
            if response.content_type.endswith(("/json", "+json")) and response.content_length != 0:
                return response.status, await response.json(content_type=None)
            return response.status, await response.text()

    async def append(self, aggregate_id: str, *events: dict[str, Any], **fields: Any) -> tuple[int, Any]:
        """Appends events to an aggregate; `fields` are those of the request."""
        path = f"/v1/aggregates/{quote(aggregate_id, safe='')}/events"
        return await self.call("POST", path, json={"events": list(events)} | fields)

    async def append_several(self, *appends: dict[str, Any]) -> tuple[int, Any]:
        """Appends to several aggregates."""
        return await self.call("POST", "/v1/events", json={"appends": list(appends)})

    async def ready(self, seconds: float = 30.0) -> None:
        """Waits until the appender is ready."""

        async def is_ready() -> bool:
            with contextlib.suppress(aiohttp.ClientError, ConnectionError, TimeoutError):
                return (await self.call("GET", "/readyz"))[0] == 200
            return False

        await eventually(is_ready, seconds)


async def eventually(condition: Callable[[], Any], seconds: float = 20.0) -> None:
    """Polls a condition (or a coroutine function) until it holds; fails after a time."""
    deadline = time.monotonic() + seconds
    while True:
        found = condition()
        if asyncio.iscoroutine(found):
            found = await found
        if found:
            return
        assert time.monotonic() < deadline, f"not within {seconds} s: {condition}"
        await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def local_appender(
    mongodb_uri: str,
    database_name: str,
    *,
    provision: bool = True,
    client_options: dict[str, Any] | None = None,
    **settings: Any,
) -> AsyncIterator[Api]:
    """An appender in this process, ready, and a client of it; drained at the end."""
    stopping = asyncio.Event()
    port: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    store = EventStoreSettings(
        mongodb_uri=SecretStr(mongodb_uri), eventstore_database=database_name, eventstore_provision=provision
    )
    metrics = Metrics()
    serving = asyncio.create_task(
        serve(
            AppenderSettings(port=0, **settings),
            store,
            stopping,
            metrics=metrics,
            started=port.set_result,
            **(client_options or {}),
        )
    )
    try:
        await asyncio.wait((serving, port), return_when=asyncio.FIRST_COMPLETED)
        if serving.done():
            serving.result()
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(60)) as session:
            api = Api(f"http://127.0.0.1:{port.result()}", session, metrics)
            await api.ready()
            yield api
    finally:
        stopping.set()
        await serving


class Process:
    """`appender serve` as a process of its own."""

    def __init__(self, mongodb_uri: str, database_name: str, **environment: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._environment = os.environ | {
            "MONGODB_URI": mongodb_uri,
            "EVENTSTORE_DATABASE": database_name,
            "APPENDER_PORT": str(self.port),
            **environment,
        }
        self.process: subprocess.Popen[bytes] | None = None
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - not a pipe, which nobody would read; closed by `several`

    def start(self) -> None:
        """Starts it, on the same port each time."""
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from appender.cli import main; main()", "serve"],
            env=self._environment,
            stdout=self._output,
            stderr=subprocess.STDOUT,
        )

    def kill(self) -> None:
        """SIGKILL."""
        self.stop(signal.SIGKILL)

    def stop(self, how: signal.Signals = signal.SIGTERM) -> tuple[int, str]:
        """Ends it with a signal; its exit code and what it logged."""
        assert self.process is not None
        self.process.send_signal(how)
        code = self.process.wait(timeout=60)
        self.process = None
        self._output.seek(0)
        return code, self._output.read().decode()

    @classmethod
    @contextlib.contextmanager
    def several(cls, count: int, mongodb_uri: str, database_name: str, **environment: str) -> Iterator[list[Process]]:
        """Some of them, started; killed at the end."""
        processes = [cls(mongodb_uri, database_name, **environment) for _ in range(count)]
        try:
            for process in processes:
                process.start()
            yield processes
        finally:
            for process in processes:
                if process.process is not None:
                    process.kill()
                process._output.close()
