"""A rebuild whose processes are killed goes on where it was, leaves no process behind, and needs no more memory for long logs."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from bson.int64 import Int64

from eventstore.event import EVENTS, slot_of
from projector import scans
from projector.builds import read_control
from tests.eventually import eventually, eventually_equal
from tests.projecting import documents, same

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from eventstore.client import Database

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]

DEFINITION = {
    "name": "steps",
    "on": {"*": {"$inc": {"steps": 1, "total": "$payload.amount"}, "$max": {"lastAt": "$timestamp"}}},
}
EVENTS_PER_AGGREGATE = 10


async def fill_log(database: Database, events: int, *, note: str = "") -> None:
    """So many events, ten an aggregate, the aggregates interleaved."""
    aggregates = events // EVENTS_PER_AGGREGATE
    base = datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC)
    slots = [slot_of(f"a{number:06d}") for number in range(aggregates)]
    for sequence_no in range(1, EVENTS_PER_AGGREGATE + 1):
        for start in range(0, aggregates, 5_000):
            await database[EVENTS].insert_many(
                [
                    {
                        "_id": f"{number}-{sequence_no}",
                        "aggregateId": f"a{number:06d}",
                        "sequenceNo": Int64(sequence_no),
                        "eventName": "counted",
                        "timestamp": base + datetime.timedelta(seconds=sequence_no),
                        "payload": {"amount": number % 7, "note": note},
                        "slot": slots[number],
                    }
                    for number in range(start, min(start + 5_000, aggregates))
                ],
                ordered=False,
            )


def _expected(number: int) -> dict[str, Any]:
    last = datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC) + datetime.timedelta(seconds=EVENTS_PER_AGGREGATE)
    steps = EVENTS_PER_AGGREGATE
    return {"_id": f"a{number:06d}", "steps": steps, "total": steps * (number % 7), "lastAt": last}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Declared projections. (JSON is YAML.)"""
    (tmp_path / "steps.yaml").write_text(json.dumps(DEFINITION))
    return tmp_path


@contextlib.contextmanager
def projector(uri: str, database: Database, folder: Path, **settings: str) -> Iterator[psutil.Process]:
    """A `projector run` of its own."""
    environment = os.environ | {
        "MONGODB_URI": uri,
        "EVENTSTORE_DATABASE": database.name,
        "PROJECTOR_PROJECTIONS": str(folder),
        "PROJECTOR_HTTP_HOST": "127.0.0.1",
        "PROJECTOR_HTTP_PORT": "0",
        "PROJECTOR_LEASE_SECONDS": "1",
    }
    environment |= {f"PROJECTOR_{name}": value for name, value in settings.items()}
    command = [sys.executable, "-c", "from projector.cli import main; main()", "run"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
        try:
            yield psutil.Process(process.pid)
        finally:
            process.kill()


async def _progress(database: Database) -> int:
    found = await scans.progress_of(database, "steps.v1")
    return found.events if found is not None else 0


async def _live(database: Database, timeout: float = 60) -> None:
    async def look() -> str | None:
        control = await read_control(database, "steps")
        return control.live if control is not None else None

    await eventually_equal(look, "steps.v1", timeout)


async def _is_right(database: Database, events: int) -> None:
    found = await documents(database, "steps")
    assert len(found) == events // EVENTS_PER_AGGREGATE
    for number in range(events // EVENTS_PER_AGGREGATE):
        expected = _expected(number)
        assert found[expected["_id"]] == expected
    progress = await scans.progress_of(database, "steps.v1")
    assert progress is not None
    assert progress.events == events  # each event was counted by one transaction, in which its document was written


async def _workers(process: psutil.Process) -> list[psutil.Process]:
    found = []
    for each in process.children():
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            if "projector.workers" in each.cmdline():
                found.append(each)
    return found


def _over(processes: list[psutil.Process]) -> bool:
    """Whether all of them have ended, if perhaps nobody has asked for their exit status yet."""
    for each in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if each.status() != psutil.STATUS_ZOMBIE:
                return False
    return True


async def _until(database: Database, events: int) -> int:
    async def look() -> int:
        found = await _progress(database)
        return found if found >= events else 0

    return await eventually(look, f"{events} events read")


@pytest.fixture
async def sixty_thousand(database: Database) -> int:
    await fill_log(database, 60_000)
    return 60_000


async def test_a_projector_that_is_killed_amid_a_rebuild_leaves_no_worker_and_the_next_one_goes_on(
    mongodb_uri: str, database: Database, folder: Path, sixty_thousand: int
) -> None:
    with projector(mongodb_uri, database, folder, REBUILD_EVENTS_PER_SECOND="10000") as process:
        before = await _until(database, sixty_thousand // 4)
        workers = await _workers(process)
        assert len(workers) == min(2, len(os.sched_getaffinity(0)))
        process.send_signal(signal.SIGKILL)
        await eventually(same(lambda: _over(workers)), "the workers have ended")
    assert (await read_control(database, "steps")).live is None  # type: ignore[union-attr]
    with projector(mongodb_uri, database, folder):
        await _live(database, 120)
    plan = await database[scans.SCANS].find_one({"_id": "steps.v1/plan"})
    assert plan is not None
    assert before <= plan["resumedWith"] < sixty_thousand
    await _is_right(database, sixty_thousand)


async def test_a_worker_that_is_killed_amid_a_rebuild_is_replaced(
    mongodb_uri: str, database: Database, folder: Path, sixty_thousand: int
) -> None:
    with projector(mongodb_uri, database, folder, REBUILD_EVENTS_PER_SECOND="15000") as process:
        for share in (5, 3, 2):
            before = await _until(database, sixty_thousand // share)
            workers = await eventually(lambda: _workers(process))
            workers[0].send_signal(signal.SIGKILL)
            await eventually(same(lambda killed=workers[:1]: _over(killed)))
        await _live(database, 150)
        plan = await database[scans.SCANS].find_one({"_id": "steps.v1/plan"})
        assert plan is not None
        assert plan["resumedWith"] >= before
    await _is_right(database, sixty_thousand)


async def test_a_projector_that_is_paused_amid_a_rebuild_is_overtaken_and_writes_nothing_any_more(
    mongodb_uri: str, database: Database, folder: Path, sixty_thousand: int
) -> None:
    with projector(mongodb_uri, database, folder, REBUILD_EVENTS_PER_SECOND="10000") as process:
        await _until(database, sixty_thousand // 5)
        workers = await _workers(process)
        for each in (process, *workers):
            each.send_signal(signal.SIGSTOP)
        with projector(mongodb_uri, database, folder):
            await _live(database, 150)
            for each in (*workers, process):
                each.send_signal(signal.SIGCONT)
            await eventually(same(lambda: _over(workers)))
            await _is_right(database, sixty_thousand)


@pytest.mark.timeout(600)
async def test_the_memory_of_a_rebuild_does_not_grow_with_the_log(
    mongodb_uri: str, database: Database, folder: Path
) -> None:
    peaks = []
    for events in (200_000, 1_000_000):
        await database[EVENTS].delete_many({})
        await fill_log(database, events, note="x" * 100)
        (folder / "steps.yaml").write_text(json.dumps({**DEFINITION, "version": len(peaks) + 1}))
        peak = 0
        with projector(mongodb_uri, database, folder) as process:

            async def read(build: str = f"steps.v{len(peaks) + 1}") -> bool:
                found = await scans.progress_of(database, build)
                return found is not None and found.done

            while not await read():
                for worker in await _workers(process):
                    with contextlib.suppress(psutil.Error):
                        peak = max(peak, worker.memory_info().rss)
                await asyncio.sleep(0.05)
        peaks.append(peak)
    small, large = peaks
    assert 0 < large < small * 1.2, f"{small / 2**20:.0f} MiB for 200,000 events, {large / 2**20:.0f} for a million"
