"""A build that is filled from the log is what a fold of the log gives, whatever stops it on its way, and readers never notice."""

from __future__ import annotations

import asyncio
import contextlib
import random
from typing import TYPE_CHECKING, Any

import pytest
from bson.int64 import Int64
from pydantic import SecretStr

from eventstore import tasks
from eventstore.event import EVENTS
from projector import rebuild, scan, scans
from projector.builds import read_control, set_control, start_rebuild
from projector.catalog import STATUS
from projector.checkpoint import CHECKPOINTS, FencedError
from projector.declared import from_definition
from projector.metrics import Metrics
from projector.ops import Ops
from projector.owned import MARK
from projector.projection import Projection
from projector.scans import SCANS
from projector.supervisor import Supervisor
from projector.wanted import FixedCatalog
from tests.eventually import eventually, eventually_equal
from tests.projecting import (
    Faults,
    Writer,
    all_events,
    cut_over_to,
    documents,
    expected_ledgers,
    ledger,
    metric,
    only,
    running,
    settings,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from eventstore.client import Database
    from projector.build import Build


pytestmark = pytest.mark.usefixtures("tiny_scans")


async def _read_all_the_time(database: Database, least: dict[str, int], seen: list[int]) -> None:
    """Reads through the view: none of these aggregates may ever be missing, or have fewer events."""
    while True:
        rows = {row["_id"]: row async for row in database["ledger"].find()}
        missing = [key for key, count in least.items() if len(rows.get(key, {}).get("applied", ())) < count]
        assert not missing
        assert not any(MARK in row for row in rows.values())
        for row in rows.values():
            assert row["applied"] == list(range(1, len(row["applied"]) + 1))
        seen.append(len(rows))


async def _write_all_the_time(writer: Writer) -> None:
    numbers = random.Random(5)
    while True:
        await writer.append(f"a{numbers.randrange(60):02d}", *["counted"] * numbers.randint(1, 3))


@contextlib.asynccontextmanager
async def _meanwhile(*work: Any) -> AsyncIterator[None]:
    """Does these things as long as the context lasts; they must not fail."""
    working = [asyncio.create_task(each) for each in work]
    try:
        yield
    finally:
        await tasks.end(working)
    for task in working:
        assert task.cancelled() or task.exception() is None, task.exception()


async def test_rebuild_and_rollback_while_writers_write_and_readers_read(database: Database) -> None:
    writer = Writer(database)
    for number in range(50):
        await writer.append(f"a{number:02d}", *["counted"] * 3)
    least = dict(writer.heads)
    ops = Ops(database, database, lambda: {"ledger": ledger()})
    reads: list[int] = []
    metrics = Metrics()
    async with running(database, [ledger()], metrics, lease_seconds=1.0):
        await cut_over_to(database, "ledger", "ledger.v1")
        async with _meanwhile(_write_all_the_time(writer), _read_all_the_time(database, least, reads)):
            assert await ops.rebuild("ledger") == "ledger.v1-2"
            await cut_over_to(database, "ledger", "ledger.v1-2")
            assert await ops.rollback("ledger") == "ledger.v1"
            await cut_over_to(database, "ledger", "ledger.v1")
        assert len(reads) > 10

        async def shown() -> Any:
            return await documents(database, "ledger")

        await eventually_equal(shown, expected_ledgers(await all_events(database)))
    assert metric(metrics, "projector_rebuild_events_total", projection="ledger") > 0
    assert metric(metrics, "projector_rebuild_progress_ratio", projection="ledger") == 1
    assert metric(metrics, "projector_events_processed_total", projection="ledger", outcome="healed") == 0


async def test_a_cancelled_rebuild_ends_at_once_and_leaves_nothing(database: Database) -> None:
    writer = Writer(database)
    for number in range(100):
        await writer.append(f"a{number:02d}", "counted", "counted")
    ops = Ops(database, database, lambda: {"ledger": ledger()})
    async with running(database, [ledger()], lease_seconds=1.0):
        await cut_over_to(database, "ledger", "ledger.v1")
    async with running(database, [ledger()], lease_seconds=1.0, rebuild_events_per_second=50) as supervisor:
        await eventually(_ready(supervisor))
        await ops.rebuild("ledger")

        async def under_way() -> bool:
            status = await database[STATUS].find_one({"_id": "ledger"})
            found = (status or {}).get("rebuild") or {}
            return bool(found) and 0 < (found.get("percent") or 0) < 100 and found["eta"] is not None

        await eventually(under_way)
        await ops.cancel("ledger")

        async def only_the_live_build() -> set[str]:
            return set(supervisor.running)

        await eventually_equal(only_the_live_build, {"ledger.v1/0-of-1"})
        assert await database[SCANS].count_documents({"build": "ledger.v1-2"}) == 0
        assert "ledger.v1-2" not in await database.list_collection_names()
        assert await documents(database, "ledger") == expected_ledgers(await all_events(database))


def _ready(supervisor: Supervisor) -> Any:
    async def look() -> bool:
        return any(item.partition.progress.caught_up for item in supervisor.running.values())

    return look


async def _candidate_that_waits(database: Database) -> Build:
    """A second build that has caught up and waits for a person's word."""
    await set_control(database, "ledger", manualCutover=True)
    build = await start_rebuild(database, database, ledger(), 1)

    async def caught_up() -> bool:
        row = await database["projector.reports"].find_one({"_id": str(only(build))})
        return bool(row and row["caughtUp"])

    await eventually(caught_up)
    return build


async def _problem(database: Database) -> str:
    async def look() -> str | None:
        status = await database[STATUS].find_one({"_id": "ledger"})
        return status and status.get("error")

    return str(await eventually(look))


@pytest.mark.parametrize("damage", ["changed", "removed", "unknown"])
async def test_a_build_that_is_not_what_the_log_says_is_not_cut_over_to(database: Database, damage: str) -> None:
    writer = Writer(database)
    for number in range(30):
        await writer.append(f"a{number:02d}", "counted", "counted")
    async with running(database, [ledger()], lease_seconds=1.0):
        await cut_over_to(database, "ledger", "ledger.v1")
        build = await _candidate_that_waits(database)
        collection = database[build.collection]
        match damage:
            case "changed":
                await collection.update_one({"_id": "a07"}, {"$set": {"applied": [1, 1]}})
            case "removed":
                await collection.delete_one({"_id": "a07"})
            case "unknown":
                await collection.insert_one({"_id": "b", MARK: Int64(3), "applied": [1, 2, 3]})
        await set_control(database, "ledger", cutover=build.id)
        problem = await _problem(database)
        assert build.id in problem
        assert ("'b'" if damage == "unknown" else "'a07'") in problem
        control = await read_control(database, "ledger")
        assert control is not None
        assert (control.live, control.candidate, control.failed) == ("ledger.v1", build.id, None)
        await writer.append("a07", "counted")  # the live build goes on

        async def shown() -> Any:
            return await documents(database, "ledger")

        await eventually_equal(shown, expected_ledgers(await all_events(database)))
        ops = Ops(database, database, lambda: {"ledger": ledger()})
        await ops.cancel("ledger")
        await set_control(database, "ledger", manualCutover=False)
        await cut_over_to(database, "ledger", await ops.rebuild("ledger"))


async def test_a_build_that_lacks_what_readers_have_waits_for_a_person(database: Database) -> None:
    faults, writer = Faults(), Writer(database)
    for name in "abc":
        await writer.append(name, "counted")
    async with running(database, [ledger(faults)], retry_seconds=0.0, lease_seconds=1.0):
        await cut_over_to(database, "ledger", "ledger.v1")
        faults.fail("b", 1)
        ops = Ops(database, database, lambda: {"ledger": ledger(faults)})
        second = await ops.rebuild("ledger")
        assert f"{second} has set 1 aggregates aside, ledger.v1 0" in await _problem(database)
        assert set(await documents(database, "ledger")) == {"a", "b", "c"}
        await ops.cutover("ledger")
        await cut_over_to(database, "ledger", second)


DECLARED = {
    "name": "steps",
    "on": {
        "counted": {"$inc": {"steps": 1}, "$max": {"lastAt": "$timestamp"}, "$push": {"values": "$payload.value"}},
        "closed": {"$delete": True},
    },
}


async def test_processes_scan_a_long_log(database: Database, mongodb_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rebuild, "SHORT_LOG", 0)
    monkeypatch.setattr(scans, "RANGE_EVENTS", 100)
    writer = Writer(database)
    names = [f"{number:03d}" for number in range(100)] * 10
    await database[EVENTS].insert_many([writer.next(name, value=index) for index, name in enumerate(names)])
    projection = from_definition(DECLARED)
    started: list[int] = []
    run = rebuild.workers.run

    async def count(job: Any, processes: int) -> None:
        started.append(processes)
        await run(job, processes)

    monkeypatch.setattr(rebuild.workers, "run", count)
    catalog = FixedCatalog([projection])
    supervisor = Supervisor(
        database, database, catalog, settings(rebuild_processes=2), Metrics(), uri=SecretStr(mongodb_uri)
    )
    stopping = asyncio.Event()
    task = asyncio.create_task(supervisor.run(stopping))
    await cut_over_to(database, "steps", "steps.v1")
    stopping.set()
    await task
    assert started == [2]
    folded: dict[str, Any] = {}
    for each in sorted(await all_events(database), key=lambda row: row["sequenceNo"]):
        state = folded.setdefault(each["aggregateId"], {"_id": each["aggregateId"], "steps": 0, "values": []})
        state["steps"] += 1
        state["lastAt"] = each["timestamp"]
        state["values"].append(each["payload"]["value"])
    assert await documents(database, "steps") == folded


async def test_without_an_importable_module_the_projector_scans_by_itself(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rebuild, "SHORT_LOG", 0)
    writer = Writer(database)
    await writer.append("a", "counted")
    async with running(database, [ledger()]):
        await cut_over_to(database, "ledger", "ledger.v1")
    assert await documents(database, "ledger") == expected_ledgers(await all_events(database))


async def test_partitions_wait_for_the_scan_and_change_their_number_amid_it(database: Database) -> None:
    writer = Writer(database)
    for number in range(40):
        await writer.append(f"a{number:02d}", "counted", "counted")
    async with running(database, [ledger()], lease_seconds=1.0, rebuild_events_per_second=80):

        async def some() -> bool:
            progress = await scans.progress_of(database, "ledger.v1")
            return progress is not None and 0 < progress.events < 80

        await eventually(some)
        await set_control(database, "ledger", partitions=4)
        await cut_over_to(database, "ledger", "ledger.v1")
        rows = await database[CHECKPOINTS].find({"build": "ledger.v1"}).to_list()
        assert {(row["partitions"], row["scan"]) for row in rows} == {(4, False)}
    assert await documents(database, "ledger") == expected_ledgers(await all_events(database))
    plan = await database[SCANS].find_one({"_id": "ledger.v1/plan"})
    assert plan is not None
    assert plan["resumedWith"] > 0


async def test_a_worker_tells_why_it_ended(database: Database, mongodb_uri: str) -> None:
    """A worker without a build to find ends with its last words."""
    job = rebuild.workers.Job(
        uri=mongodb_uri, log=database.name, database=database.name, number=1, owner="nobody",
        events_per_second=0, retry_seconds=1, max_parked=1, name="steps", definition=DECLARED,
    )  # fmt: skip
    with pytest.raises(FencedError):
        await rebuild.workers.run(job, 1)
    broken = rebuild.workers.Job(**{**_fields(job), "definition": None, "module": "no.such.module"})
    with pytest.raises(rebuild.workers.WorkerError, match=r"no\.such\.module"):
        await rebuild.workers.run(broken, 2)


def _fields(job: Any) -> dict[str, Any]:
    return {name: getattr(job, name) for name in job.__struct_fields__}


async def test_the_scan_reads_only_the_fields_of_a_declared_projection() -> None:
    assert scan.scan_fields(from_definition(DECLARED)) == {
        "_id": 0, "aggregateId": 1, "sequenceNo": 1, "eventName": 1, "payload.value": 1, "timestamp": 1,
    }  # fmt: skip
    assert scan.scan_fields(ledger()) is None
    assert scan.scan_fields(Projection("some", fields=["payload.value"])) == {
        "aggregateId": 1, "sequenceNo": 1, "eventName": 1, "payload.value": 1, "slot": 1,
    }  # fmt: skip
