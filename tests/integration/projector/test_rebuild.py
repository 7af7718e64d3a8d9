"""A build that is filled from the log is what a fold of the log gives, whatever stops it on its way, and readers never notice."""

from __future__ import annotations

import asyncio
import contextlib
import random
import uuid
from typing import TYPE_CHECKING, Any

import pytest
from bson.int64 import Int64
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import SecretStr
from pymongo.errors import OperationFailure

from eventstore import tasks
from eventstore.client import connect, open_database
from eventstore.event import EVENTS
from eventstore.indexes import provision
from projector import rebuild, scan, scans
from projector.build import Build
from projector.builds import drop_build, ensure_build, read_builds, read_control, set_control, start_rebuild
from projector.catalog import STATUS
from projector.checkpoint import CHECKPOINTS, Checkpoint, FencedError, PartitionId
from projector.declared import from_definition
from projector.metrics import Metrics
from projector.ops import Ops
from projector.owned import MARK
from projector.parking import PARKED
from projector.projection import Projection
from projector.scan import Pace, Scanner
from projector.scans import SCANS
from projector.supervisor import Supervisor
from projector.wanted import FixedCatalog
from tests.eventually import eventually, eventually_equal
from tests.projecting import (
    Faults,
    Writer,
    documents,
    expected_ledgers,
    ledger,
    metric,
    running,
    settings,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from eventstore.client import Client, Database

TINY = {"READ_EVENTS": 3, "WRITE_DOCUMENTS": 2, "WRITE_EVENTS": 5}


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches so small that a handful of events meets every border."""
    for name, value in TINY.items():
        monkeypatch.setattr(scan, name, value)
    monkeypatch.setattr(scans, "RANGE_EVENTS", 10)


def owned_by(build: Build) -> PartitionId:
    return PartitionId(build.id, 0, 1)


async def begun(database: Database, projection: Projection) -> Build:
    """A new build, with nothing read yet."""
    await ensure_build(database, database, projection, 1)
    return Build(projection)


async def scanner(database: Database, build: Build, owner: str, **changes: Any) -> Scanner:
    """A scanner that has just taken the scan over."""
    checkpoint = await Checkpoint.take(database, owned_by(build), owner)
    await scans.begin(database, database, checkpoint, owner)
    return Scanner(database, database, build, pace=Pace(0), **({"retry_seconds": 60.0, "max_parked": 1_000} | changes))


async def log_of(database: Database) -> list[dict[str, Any]]:
    return await database[EVENTS].find().to_list()


async def marks(database: Database, build: Build) -> dict[str, int]:
    inside = {row["_id"]: row[MARK] async for row in database[build.collection].find()}
    return inside | {row["_id"]: row["mark"] async for row in database[build.marks].find()}


async def live(database: Database, name: str, build: str) -> None:
    async def look() -> str | None:
        control = await read_control(database, name)
        return control.live if control else None

    await eventually_equal(look, build)


HISTORIES = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=3),
    st.lists(st.sampled_from(["counted", "closed", "noise"]), min_size=1, max_size=12),
    max_size=12,
)


@hypothesis_settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(histories=HISTORIES, seed=st.integers(0, 2**32))
async def test_a_scan_gives_what_a_fold_of_the_log_gives(
    client: Client, histories: dict[str, list[str]], seed: int
) -> None:
    name = f"test_{uuid.uuid4().hex[:12]}"
    database = open_database(client, name)
    await provision(database)
    writer = Writer(database)
    events = [writer.next(aggregate_id, each) for aggregate_id, names in histories.items() for each in names]
    random.Random(seed).shuffle(events)  # the order on disk must not matter
    if events:
        await database[EVENTS].insert_many(events)
    build = await begun(database, ledger())
    await (await scanner(database, build, "one")).run("one")
    assert await scans.finish(database, build.id, "one")
    assert await documents(database, build.collection) == expected_ledgers(events)
    handled = {key: len(names) for key, names in histories.items() if {"counted", "closed"} & set(names)}
    assert await marks(database, build) == handled
    progress = await scans.progress_of(database, build.id)
    assert progress is not None
    assert (progress.events, progress.ratio) == (len(events), 1.0)
    await client.drop_database(name)


async def test_a_scanner_that_is_no_longer_the_owner_writes_nothing(database: Database) -> None:
    writer = Writer(database)
    for number in range(20):
        await writer.append(f"a{number:02d}", "counted")
    build = await begun(database, ledger())
    stale = await scanner(database, build, "stale")
    claimed = await scans.claim(database, build.id, "stale")
    assert claimed is not None
    await scanner(database, build, "fresh")
    with pytest.raises(FencedError):
        await stale._scan(claimed)
    with pytest.raises(FencedError):
        await stale.run("stale")
    assert not await scans.finish(database, build.id, "stale")
    assert await documents(database, build.collection) == {}


async def test_a_scan_is_not_begun_by_a_partition_s_former_owner(database: Database) -> None:
    build = await begun(database, ledger())
    former = await Checkpoint.take(database, owned_by(build), "former")
    await Checkpoint.take(database, owned_by(build), "present")
    with pytest.raises(FencedError):
        await scans.begin(database, database, former, "former")
    assert await database[SCANS].count_documents({}) == 0


async def test_a_scan_of_a_dropped_build_ends_and_leaves_nothing(database: Database) -> None:
    writer = Writer(database)
    for number in range(20):
        await writer.append(f"a{number:02d}", "counted")
    build = await begun(database, ledger())
    one = await scanner(database, build, "one")
    claimed = await scans.claim(database, build.id, "one")
    assert claimed is not None
    record = (await read_builds(database))[build.id]
    await drop_build(database, record)
    await begun(database, ledger())  # the same name again
    await drop_build(database, record)
    with pytest.raises(FencedError):
        await one._scan(claimed)
    left = await database.list_collection_names()
    assert build.collection not in left
    assert await database[SCANS].count_documents({}) == 0


async def test_a_scan_goes_on_at_once_where_a_killed_one_left_a_transaction_open(
    database: Database, mongodb_uri: str
) -> None:
    writer = Writer(database)
    for number in range(20):
        await writer.append(f"a{number:02d}", "counted")
    build = await begun(database, ledger())
    async with connect(SecretStr(mongodb_uri), "projector") as killed:
        other = open_database(killed, database.name)
        await scanner(other, build, "killed")
        claimed = await scans.claim(other, build.id, "killed")
        assert claimed is not None
        session = killed.start_session()
        await session.start_transaction()  # and it is never heard of again
        await claimed.advance(other, "a03", 4, session)
        await other[build.collection].insert_one({"_id": "a03", "applied": ["torn"]}, session=session)
        await (await scanner(database, build, "fresh")).run("fresh")
        with pytest.raises(OperationFailure):
            await session.commit_transaction()
        await session.end_session()
    assert await documents(database, build.collection) == expected_ledgers(await log_of(database))


async def test_what_another_owner_wrote_is_not_written_again(database: Database) -> None:
    writer = Writer(database)
    for number in range(40):
        await writer.append(f"a{number:02d}", "counted", "counted")
    build = await begun(database, ledger())
    first = await scanner(database, build, "first")
    claimed = await scans.claim(database, build.id, "first")
    assert claimed is not None
    await first._scan(claimed)
    done = await database[build.collection].find().to_list()
    assert 0 < len(done) < 40
    # If any of these were read again, the second scan would bring them back.
    await database[build.collection].delete_many({})
    second = await scanner(database, build, "second")
    progress = await scans.progress_of(database, build.id)
    assert progress is not None
    assert progress.events == 2 * len(done)
    await second.run("second")
    rest = await documents(database, build.collection)
    assert rest.keys() == writer.heads.keys() - {row["_id"] for row in done}


async def test_a_gap_and_a_failing_event_have_the_promised_end(database: Database) -> None:
    faults, writer = Faults(), Writer(database)
    for name in ("good", "broken", "gap"):
        await writer.append(name, *["counted"] * 5)
    await database[EVENTS].delete_one({"aggregateId": "gap", "sequenceNo": 3})
    faults.fail("broken", 4)
    metrics = Metrics()
    async with running(database, [ledger(faults)], metrics, retry_seconds=0.3):
        await live(database, "ledger", "ledger.v1")

        async def parked() -> dict[str, tuple[int, str, str]]:
            return {
                row["aggregateId"]: (row["sequenceNo"], row["category"], row["state"])
                async for row in database[PARKED].find()
            }

        await eventually_equal(parked, {"broken": (4, "fold", "parked"), "gap": (3, "gap", "parked")})
        shown = await documents(database, "ledger")
        assert {key: row["applied"] for key, row in shown.items()} == {
            "good": [1, 2, 3, 4, 5],
            "broken": [1, 2, 3],
            "gap": [1, 2],
        }
        await writer.append("good", "counted")
        faults.heal()
        ops = Ops(database, database)
        await ops.retry("ledger", "broken")
        await ops.skip("ledger", "gap", 3)

        async def applied() -> dict[str, list[int]]:
            return {key: row["applied"] for key, row in (await documents(database, "ledger")).items()}

        await eventually_equal(applied, {"good": [1, 2, 3, 4, 5, 6], "broken": [1, 2, 3, 4, 5], "gap": [1, 2, 4, 5]})


async def test_documents_that_cannot_be_stored_are_set_aside_and_the_others_are_written(database: Database) -> None:
    projection = Projection("totals")

    @projection.on("counted")
    def _(state: dict[str, Any], event: dict[str, Any]) -> None:
        state["value"] = event["payload"]["value"] if event["payload"]["value"] != "huge" else 2**70
        state["text"] = "x" * (17 * 2**20) if event["payload"]["value"] == "long" else ""

    writer = Writer(database)
    for name, value in (("a", 1), ("b", "huge"), ("c", 1), ("d", 2), ("e", "long")):
        await writer.append(name, value=value)
    build = await begun(database, projection)
    await database[build.collection].create_index("value", unique=True)
    await (await scanner(database, build, "one")).run("one")
    assert await scans.finish(database, build.id, "one")
    stored = await documents(database, build.collection)
    assert set(stored) in ({"a", "d"}, {"c", "d"})
    rows = await database[PARKED].find().to_list()
    assert {row["aggregateId"] for row in rows} == {"a", "b", "c", "e", "d"} - set(stored)
    assert {(row["category"], row["sequenceNo"]) for row in rows} == {("write", 1)}


async def test_too_many_failures_stop_the_projection(database: Database) -> None:
    faults, writer = Faults(), Writer(database)
    for number in range(10):
        await writer.append(f"a{number}", "counted")
        faults.fail(f"a{number}", 1)
    async with running(database, [ledger(faults)], max_parked=5):

        async def failed() -> str | None:
            control = await read_control(database, "ledger")
            return control.failed if control else None

        assert "more than 5 aggregates are set aside" in str(await eventually(failed))
        assert await database[PARKED].count_documents({}) <= 6


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
        await live(database, "ledger", "ledger.v1")
        async with _meanwhile(_write_all_the_time(writer), _read_all_the_time(database, least, reads)):
            assert await ops.rebuild("ledger") == "ledger.v1-2"
            await live(database, "ledger", "ledger.v1-2")
            assert await ops.rollback("ledger") == "ledger.v1"
            await live(database, "ledger", "ledger.v1")
        assert len(reads) > 10

        async def shown() -> Any:
            return await documents(database, "ledger")

        await eventually_equal(shown, expected_ledgers(await log_of(database)))
    assert metric(metrics, "projector_rebuild_events_total", projection="ledger") > 0
    assert metric(metrics, "projector_rebuild_progress_ratio", projection="ledger") == 1
    assert metric(metrics, "projector_events_processed_total", projection="ledger", outcome="healed") == 0


async def test_a_cancelled_rebuild_ends_at_once_and_leaves_nothing(database: Database) -> None:
    writer = Writer(database)
    for number in range(100):
        await writer.append(f"a{number:02d}", "counted", "counted")
    ops = Ops(database, database, lambda: {"ledger": ledger()})
    async with running(database, [ledger()], lease_seconds=1.0):
        await live(database, "ledger", "ledger.v1")
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
        assert await documents(database, "ledger") == expected_ledgers(await log_of(database))


def _ready(supervisor: Supervisor) -> Any:
    async def look() -> bool:
        return any(item.partition.progress.caught_up for item in supervisor.running.values())

    return look


async def _candidate_that_waits(database: Database) -> Build:
    """A second build that has caught up and waits for a person's word."""
    await set_control(database, "ledger", manualCutover=True)
    build = await start_rebuild(database, database, ledger(), 1)

    async def caught_up() -> bool:
        row = await database["projector.reports"].find_one({"_id": str(owned_by(build))})
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
        await live(database, "ledger", "ledger.v1")
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

        await eventually_equal(shown, expected_ledgers(await log_of(database)))
        ops = Ops(database, database, lambda: {"ledger": ledger()})
        await ops.cancel("ledger")
        await set_control(database, "ledger", manualCutover=False)
        await live(database, "ledger", await ops.rebuild("ledger"))


async def test_a_build_that_lacks_what_readers_have_waits_for_a_person(database: Database) -> None:
    faults, writer = Faults(), Writer(database)
    for name in "abc":
        await writer.append(name, "counted")
    async with running(database, [ledger(faults)], retry_seconds=0.0, lease_seconds=1.0):
        await live(database, "ledger", "ledger.v1")
        faults.fail("b", 1)
        ops = Ops(database, database, lambda: {"ledger": ledger(faults)})
        second = await ops.rebuild("ledger")
        assert f"{second} has set 1 aggregates aside, ledger.v1 0" in await _problem(database)
        assert set(await documents(database, "ledger")) == {"a", "b", "c"}
        await ops.cutover("ledger")
        await live(database, "ledger", second)


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
    await live(database, "steps", "steps.v1")
    stopping.set()
    await task
    assert started == [2]
    folded: dict[str, Any] = {}
    for each in sorted(await log_of(database), key=lambda row: row["sequenceNo"]):
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
        await live(database, "ledger", "ledger.v1")
    assert await documents(database, "ledger") == expected_ledgers(await log_of(database))


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
        await live(database, "ledger", "ledger.v1")
        rows = await database[CHECKPOINTS].find({"build": "ledger.v1"}).to_list()
        assert {(row["partitions"], row["scan"]) for row in rows} == {(4, False)}
    assert await documents(database, "ledger") == expected_ledgers(await log_of(database))
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
