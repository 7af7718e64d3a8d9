"""Everything in one process, for trying it out and for developing against it: a MongoDB of its own, appender and projector.

The only module in which the two services meet; in production each is a process of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import subprocess
import time
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final

import aiohttp
import click
from pydantic import SecretStr

from appender.app import serve
from appender.settings import AppenderSettings
from eventstore import service
from eventstore.embedded import MongodNotFoundError, ReplicaSet, find_mongod
from eventstore.settings import EventStoreSettings
from projector.metrics import Metrics
from projector.run import run_projector
from projector.settings import ProjectorSettings
from projector.wanted import FixedCatalog

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence

    from projector.projection import Projection

__all__ = ["NotStartedError", "Running", "develop", "mongodb", "running"]

START_SECONDS: Final = 30.0
_LOOPBACK: Final = "127.0.0.1"
_IMAGE: Final = "mongo:6.0"


@dataclass(frozen=True, slots=True)
class Running:
    """Where everything is."""

    mongodb_uri: str
    database: str
    appender_url: str
    projector_url: str


class NotStartedError(RuntimeError):
    """It was stopped, or its time was over, before everything had started."""

    def __init__(self) -> None:
        super().__init__(self.__doc__)


@contextlib.contextmanager
def mongodb() -> Iterator[str]:
    """A MongoDB while the context lasts: a mongod (the wheel's, else one on PATH), else Docker; nothing of it stays.

    Yields its connection string. Not that of MONGODB_URI: what is tried out does not belong there. Raises
    MongodNotFoundError when there is none.
    """
    try:
        find_mongod()
    except MongodNotFoundError:
        if not _docker_runs():
            raise
        with _container() as uri:
            yield uri
    else:
        with ReplicaSet() as replica_set:
            yield replica_set.uri


@contextlib.asynccontextmanager
async def running(
    uri: str,
    projections: Sequence[Projection],
    *,
    appender_port: int = 0,
    projector_port: int = 0,
    stopping: asyncio.Event | None = None,
) -> AsyncIterator[Running]:
    """Appender and projector on loopback (port 0: a free one) while the context lasts; both have drained when it ends.

    `stopping` is set when either of them ends by itself. Raises OSError when a port is taken, NotStartedError when they did
    not start in time or were stopped before, and afterwards whatever ended one of them.
    """
    stopping = stopping or asyncio.Event()
    store = EventStoreSettings(mongodb_uri=SecretStr(uri), eventstore_provision=True)
    loop = asyncio.get_running_loop()
    ports: tuple[asyncio.Future[int], asyncio.Future[int]] = loop.create_future(), loop.create_future()
    fixed = FixedCatalog(projections)
    appender = serve(AppenderSettings(host=_LOOPBACK, port=appender_port), store, stopping, started=ports[0].set_result)
    projector = run_projector(
        ProjectorSettings(http_host=_LOOPBACK, http_port=projector_port),
        store,
        lambda _database: fixed,
        metrics=Metrics(),
        stopping=stopping,
        started=ports[1].set_result,
    )

    async def guarded(part: Coroutine[None, None, None]) -> None:
        try:
            await part
        finally:
            stopping.set()  # one without the other is of no use

    services = [asyncio.create_task(guarded(part)) for part in (appender, projector)]
    waiting: set[asyncio.Future[Any]] = {asyncio.gather(*ports), *services}
    await asyncio.wait(waiting, timeout=START_SECONDS, return_when=asyncio.FIRST_COMPLETED)
    started = all(port.done() for port in ports)
    try:
        if started:
            urls = [f"http://{_LOOPBACK}:{port.result()}" for port in ports]
            for url in urls:
                await _until_ready(url, stopping)
            yield Running(uri, store.eventstore_database, *urls)
    finally:
        stopping.set()
        ended = await asyncio.gather(*services, return_exceptions=True)
    for result in ended:
        if isinstance(result, BaseException):
            raise result
    if not started:
        raise NotStartedError


async def _until_ready(url: str, stopping: asyncio.Event) -> None:
    """Waits until a service says that it is ready. Raises NotStartedError."""
    deadline = time.monotonic() + START_SECONDS
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session:
        while time.monotonic() < deadline and not stopping.is_set():
            async with session.get(f"{url}/readyz") as answer:
                if answer.status == HTTPStatus.OK:
                    return
            await asyncio.sleep(0.05)
    raise NotStartedError


def develop(projections: Sequence[Projection], *, appender_port: int, projector_port: int) -> None:
    """Runs everything until Ctrl-C or SIGTERM, and says what to try. Raises as `mongodb` and `running` do."""

    async def until_stopped(stopping: asyncio.Event) -> None:
        async with running(
            uri, projections, appender_port=appender_port, projector_port=projector_port, stopping=stopping
        ) as urls:
            click.echo(_hints(urls, projections))
            await stopping.wait()

    with mongodb() as uri:
        service.run(until_stopped)


def _hints(urls: Running, projections: Sequence[Projection]) -> str:
    """Where everything is, and what to try."""
    first = next((projection for projection in projections if projection.aggregate_keyed), projections[0])
    event = {"eventName": (first.event_names or ("Tried",))[0], "payload": {}}
    body = json.dumps({"events": [event]})
    return f"""
  MongoDB    {urls.mongodb_uri}  (database {urls.database})
  Appender   {urls.appender_url}
  Projector  {urls.projector_url}
  Read models: {", ".join(projection.collection for projection in projections)}

Try, in another terminal:

  curl {urls.appender_url}/v1/aggregates/try-1/events --json '{body}'
  curl {urls.appender_url}/v1/aggregates/try-1/events
  curl '{urls.projector_url}/v1/projections/{first.name}/wait?aggregateId=try-1&sequenceNo=1'
  curl {urls.projector_url}/metrics

  export MONGODB_URI='{urls.mongodb_uri}'
  projector list
  projector verify {first.name}

Ctrl-C ends it; nothing of it stays.
"""


def _docker_runs() -> bool:
    docker = shutil.which("docker")
    if docker is None:
        return False
    return subprocess.run([docker, "info"], capture_output=True, timeout=20, check=False).returncode == 0  # noqa: S603


@contextlib.contextmanager
def _container() -> Iterator[str]:
    """MongoDB in Docker, by testcontainers (extra `dev`). Raises MongodNotFoundError without it."""
    try:
        from testcontainers.core.container import DockerContainer  # noqa: PLC0415 - only where there is no mongod
        from testcontainers.core.waiting_utils import wait_for_logs  # noqa: PLC0415
    except ModuleNotFoundError:
        raise MongodNotFoundError from None
    container = DockerContainer(_IMAGE).with_exposed_ports(27017).with_command("--replSet rs0 --bind_ip_all")
    with container:
        wait_for_logs(container, "Waiting for connections", timeout=START_SECONDS)
        container.exec(["mongosh", "--quiet", "--eval", "rs.initiate()"])
        yield f"mongodb://{container.get_container_host_ip()}:{container.get_exposed_port(27017)}/?directConnection=true"
