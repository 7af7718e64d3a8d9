"""The projector in a process of its own, as `projector run` runs it, with the times that `bench.project` asks for."""

from __future__ import annotations

import asyncio
import resource
import time
from typing import Any

import uvloop
from pydantic import SecretStr

from bench import logs
from eventstore.client import connect, open_database
from eventstore.logs import configure
from projector import collector
from projector.builds import read_control
from projector.declared import from_definition
from projector.metrics import Metrics
from projector.settings import ProjectorSettings
from projector.supervisor import Supervisor
from projector.wanted import FixedCatalog

__all__ = ["begin", "follow", "latency", "pause"]

SENT_AT = {"name": "sent", "on": {"*": {"$inc": {"events": 1}, "$set": {"sentAt": "$payload.sentAt"}}}}


def names(count: int) -> list[str]:
    """Names of projections."""
    return [f"permits{number:02d}" for number in range(count)]


def begin(uri: str, name: str, projections: int) -> None:
    """Makes read models that are current with a log that is still empty."""
    configure("bench", "warning", "console")
    uvloop.run(_run(uri, name, projections, 0))


def follow(uri: str, name: str, projections: int, events: int) -> dict[str, Any]:
    """Follows the log until so many events are in each of the read models; the timer begins with the projector.

    Returns the seconds, the most memory (bytes), the processor's seconds, and the times at which numbers of events were reached.
    """
    configure("bench", "warning", "console")
    collector.relax()
    return uvloop.run(_run(uri, name, projections, events))


async def _run(uri: str, name: str, projections: int, events: int) -> dict[str, Any]:
    metrics = Metrics()
    catalog = FixedCatalog([logs.projection(each) for each in names(projections)])
    reached: list[tuple[float, int]] = []
    async with connect(SecretStr(uri), "projector") as client:
        database = open_database(client, name)
        await client.admin.command("ping")
        supervisor = Supervisor(database, database, catalog, ProjectorSettings(), metrics, uri=SecretStr(uri))
        stopping = asyncio.Event()
        begun, processor = time.perf_counter(), time.process_time()
        task = asyncio.create_task(supervisor.run(stopping))
        while events and (not reached or reached[-1][1] < events):
            await pause(task, 0.02)
            reached.append((time.perf_counter() - begun, _applied(metrics, projections)))
        while not events and not await _all_live(database, projections):
            await pause(task, 0.05)
        seconds = time.perf_counter() - begun
        used = time.process_time() - processor
        stopping.set()
        await task
    return {
        "seconds": seconds,
        "processor": used,
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "reached": reached,
    }


async def pause(task: asyncio.Task[None], seconds: float) -> None:
    """Waits; raises what ended the projector, if it has ended."""
    await asyncio.wait({task}, timeout=seconds)
    if task.done():
        task.result()


def _applied(metrics: Metrics, projections: int) -> int:
    """Events whose transactions were committed, in each of the read models."""
    value = metrics.registry.get_sample_value
    return int(min(value("projector_write_batch_events_sum", {"projection": each}) or 0 for each in names(projections)))


async def _all_live(database: Any, projections: int) -> bool:
    controls = [await read_control(database, each) for each in names(projections)]
    return all(control is not None and control.live is not None for control in controls)


def latency(uri: str, name: str, ready: Any, over: Any) -> None:
    """Runs a projection of `sentAt` until `over` is set; sets `ready` when it is current."""
    configure("bench", "warning", "console")
    collector.relax()
    uvloop.run(_latency(uri, name, ready, over))


async def _latency(uri: str, name: str, ready: Any, over: Any) -> None:
    async with connect(SecretStr(uri), "projector") as client:
        database = open_database(client, name)
        catalog = FixedCatalog([from_definition(SENT_AT)])
        supervisor = Supervisor(database, database, catalog, ProjectorSettings(), Metrics(), uri=SecretStr(uri))
        stopping = asyncio.Event()
        task = asyncio.create_task(supervisor.run(stopping))
        while (control := await read_control(database, "sent")) is None or control.live is None:
            await pause(task, 0.05)
        ready.set()
        while not over.is_set():
            await pause(task, 0.1)
        stopping.set()
        await task
