"""Rebuild: a new build of a read model from a log of a million events, beside live projection and beside reading the log alone.

`python -m bench.rebuild` prints markdown tables for bench/README.md.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, Final

import psutil
import uvloop
from bson.codec_options import CodecOptions
from pydantic import SecretStr
from pymongo import MongoClient

from bench import logs, project_ours
from bench.project import apart, mongodb, per_second, table, uri_of
from eventstore.client import connect, open_database
from eventstore.event import EVENTS
from eventstore.logs import configure
from projector import collector, scans
from projector.builds import read_control
from projector.metrics import Metrics
from projector.settings import ProjectorSettings
from projector.supervisor import Supervisor
from projector.wanted import FixedCatalog

if TYPE_CHECKING:
    from pymongo.database import Database

Document = dict[str, Any]

EVENTS_COUNT: Final = 1_000_000
AGGREGATES: Final = 100_000
LIVE_EVENTS: Final = 100_000
NAME: Final = "rebuild"


def find_decoded(uri: str, name: str) -> float:
    """Seconds in which pymongo reads the whole log, in the order on disk, and nothing is done."""
    with MongoClient(uri, tz_aware=True) as client:
        client.admin.command("ping")
        begun = time.perf_counter()
        for _ in client[name][EVENTS].find(batch_size=logs.BATCH):
            pass
        return time.perf_counter() - begun


def find_raw(uri: str, name: str) -> float:
    """The same without decoding."""
    with MongoClient(uri) as client:
        client.admin.command("ping")
        begun = time.perf_counter()
        for _ in client.get_database(name, codec_options=CodecOptions())[EVENTS].find_raw_batches():
            pass
        return time.perf_counter() - begun


def rebuild(uri: str, name: str, version: int, processes: int) -> dict[str, float]:
    """A new version is built and cut over to: seconds of the scan and of all, and the most memory of a process (bytes)."""
    configure("bench", "warning", "console")
    collector.relax()
    return uvloop.run(_rebuild(uri, name, version, processes))


async def _rebuild(uri: str, name: str, version: int, processes: int) -> dict[str, float]:
    projection = logs.projection(version=version)
    build = f"{projection.name}.v{version}"
    settings = ProjectorSettings(rebuild_processes=processes)
    async with connect(SecretStr(uri), "projector") as client:
        database = open_database(client, name)
        await client.admin.command("ping")
        supervisor = Supervisor(database, database, FixedCatalog([projection]), settings, Metrics(), uri=SecretStr(uri))
        stopping = asyncio.Event()
        begun = time.perf_counter()
        task = asyncio.create_task(supervisor.run(stopping))
        memory = 0
        while (found := await scans.progress_of(database, build)) is None or not found.done:
            memory = max(memory, *(_memory(each) for each in psutil.Process().children()), 0)
            await project_ours.pause(task, 0.05)
        scanned = time.perf_counter() - begun
        while (control := await read_control(database, projection.name)) is None or control.live != build:
            await project_ours.pause(task, 0.02)
        seconds = time.perf_counter() - begun
        stopping.set()
        await task
    return {"scan": scanned, "all": seconds, "memory": memory}


def _memory(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


def _live(uri: str, database: Database[Document]) -> float:
    """Events per second of live projection of the same kind of log."""
    logs.provision(database)
    apart(project_ours.begin, uri, database.name, 1)
    count = logs.write(database, logs.round_robin(LIVE_EVENTS, LIVE_EVENTS // 10))
    return float(count / apart(project_ours.follow, uri, database.name, 1, count)["seconds"])


def main() -> None:
    """Measures and prints."""
    with mongodb() as client:
        uri = uri_of(client)
        live = _live(uri, client["live"])
        database = client[NAME]
        logs.provision(database)
        count = logs.write(database, logs.round_robin(EVENTS_COUNT, AGGREGATES))
        raw = count / apart(find_raw, uri, NAME)
        decoded = count / apart(find_decoded, uri, NAME)
        rows = [("find, not decoded", f"{raw:,.0f}", "", "", ""), ("find, decoded", f"{decoded:,.0f}", "", "100%", "")]
        rows.append(("live projection", f"{live:,.0f}", "1.0", f"{live / decoded:.0%}", ""))
        for version, processes in enumerate((1, 2), 1):
            found = apart(rebuild, uri, NAME, version, processes)
            logs.check(database, f"permits.v{version}", count)
            rate = count / found["scan"]
            title = f"**rebuild, {processes} process{'es' if processes > 1 else ''}**"
            memory = f"{found['memory'] / 2**20:.0f}"
            rows.append((title, f"**{rate:,.0f}**", f"{rate / live:.1f}", f"{rate / decoded:.0%}", memory))
            rows.append(("… until readers see it", per_second(count, found["all"]), "", "", ""))
        table([f"{count:,} events", "events/s", "x live", "of find decoded", "MiB a process"], rows)


if __name__ == "__main__":
    main()
