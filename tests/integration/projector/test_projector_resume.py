"""Resuming: a position that died, a filter that hides it, a log that was dropped, a write that nobody knows of."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import bson
import pytest
from pydantic import SecretStr
from pymongo.write_concern import WriteConcern

from eventstore.client import Client, Database, connect, open_database
from eventstore.embedded import ReplicaSet
from eventstore.event import EVENTS, slot_of
from eventstore.indexes import provision
from projector import loop as loop_module
from projector.aside import StoppedError
from projector.checkpoint import CHECKPOINTS, PartitionId, ensure_layout
from projector.partition import Partition
from projector.position import Position
from projector.status import oplog_start
from projector.stream import EventStream, position_now
from tests.conftest import need_mongod
from tests.eventually import eventually, eventually_equal
from tests.projecting import (
    KINDS,
    Here,
    Writer,
    all_events,
    begun,
    documents,
    event,
    expected_ledgers,
    ledger,
    metric,
    only,
    parked,
    same,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from bson.timestamp import Timestamp


@pytest.fixture(scope="module")
def small_oplog() -> Iterator[ReplicaSet]:
    """A server whose oplog rolls, and that fails commands when told to."""
    need_mongod()
    with ReplicaSet(oplog_mib=1, parameters={"enableTestCommands": "1"}, arguments=["--syncdelay", "1"]) as replica_set:
        yield replica_set


@pytest.fixture
async def small(small_oplog: ReplicaSet, database_name: str) -> AsyncIterator[Database]:
    """An event store on it."""
    async with connect(SecretStr(small_oplog.uri), "test") as client:
        database = open_database(client, database_name)
        await provision(database)
        yield database
        await client.drop_database(database_name)


async def roll(client: Client, past: Timestamp) -> None:
    """Fills the oplog until nothing of this time is left in it; MongoDB keeps what it needs since its last snapshot on disk."""
    filler = client.get_database("filler", write_concern=WriteConcern(w=1)).filler

    async def gone() -> bool:
        await filler.insert_many([{"x": "x" * 2**18} for _ in range(4)])
        start = await oplog_start(open_database(client, "local"))
        return start is not None and start > past.time

    await eventually(gone, "the oplog has rolled")
    await client.drop_database("filler")


async def stored_position(database: Database, number: int = 0) -> dict[str, Any]:
    found = await database[CHECKPOINTS].find_one({"_id": {"$regex": f"/{number}-of-"}})
    assert found is not None
    return found


@KINDS
@pytest.mark.parametrize("busy", [True, False], ids=["busy", "quiet"])
async def test_a_position_that_rolled_out_of_the_oplog_is_repaired(
    small: Database, make: Any, expect: Any, busy: bool
) -> None:
    """Nothing is lost, nobody is asked, and no event is read that had been applied."""
    build = await begun(small, make())
    writer = Writer(small)
    name = build.projection.name
    async with Here(small).runs(build, only(build)):
        for aggregate_id in ("a", "b", "c"):
            await writer.append(aggregate_id, *["counted"] * 20, rooms=["x", aggregate_id])
        await eventually_equal(lambda: documents(small, build.collection), expect(await all_events(small)))
    down = [("a", 3), ("d", 4)] if busy else []
    for aggregate_id, count in down:
        await writer.append(aggregate_id, *["counted"] * count, rooms=["x"])
    await roll(small.client, await position_of_now(small))

    here = Here(small)
    async with here.runs(build, only(build)) as partition:
        await eventually_equal(lambda: documents(small, build.collection), expect(await all_events(small)))
        await eventually(same(lambda: partition.progress.caught_up))
        assert metric(here.metrics, "projector_repaired_events_total", projection=name) == sum(n for _, n in down)
        assert metric(here.metrics, "projector_stream_restarts_total", projection=name, reason="history_lost") == 1
        await writer.append("b", rooms=["x"])
        await writer.append("e", rooms=["x"])
        await eventually_equal(lambda: documents(small, build.collection), expect(await all_events(small)))
    assert await parked(small) == {}


async def position_of_now(database: Database) -> Timestamp:
    return (await position_now(database)).cluster_time


async def test_the_checkpoint_of_a_quiet_partition_moves(small: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it runs, a token does not age out, though no event comes: the oplog rolls past where it began, and it does not care."""
    monkeypatch.setattr(loop_module, "IDLE_CHECKPOINT_SECONDS", 0.1)
    build = await begun(small, ledger())
    writer, here = Writer(small), Here(small)
    await writer.append("a")
    async with here.runs(build, only(build)) as partition:
        began = await position_of_now(small)
        await roll(small.client, began)

        async def moved() -> bool:
            return bool((await stored_position(small))["clusterTime"] > began)

        await eventually(moved)
        assert partition.progress.lag_seconds() == 0  # idle is not lag
    again = Here(small)
    async with again.runs(build, only(build)):
        await writer.append("a")
        await eventually_equal(lambda: documents(small, build.collection), expected_ledgers(await all_events(small)))
    for each in (here, again):
        assert metric(each.metrics, "projector_stream_restarts_total", projection="ledger", reason="history_lost") == 0


@KINDS
async def test_a_token_of_an_event_that_the_filter_hides_is_repaired(
    database: Database, make: Any, expect: Any
) -> None:
    """Error 280: an older version, or a person, stored an event's own token, and the partitions were changed since."""
    build = await begun(database, make(), partitions=2)
    first, second = (PartitionId(build.id, number, 2) for number in range(2))
    here = Here(database)
    async with here.runs(build, first), here.runs(build, second):
        pass
    writer = Writer(database)
    mine = next(name for name in map(str, range(100)) if slot_of(name) in first.slots)
    others = next(name for name in map(str, range(100)) if slot_of(name) in second.slots)
    await writer.append(others, *["counted"] * 3, rooms=["x"])
    async with await database[EVENTS].watch(
        start_at_operation_time=(await stored_position(database))["clusterTime"]
    ) as stream:
        await writer.append(mine, rooms=["x"])
        token: Any = None
        async for change in stream:
            if change["fullDocument"]["aggregateId"] == mine:
                token = change["_id"]
                break
    await database[CHECKPOINTS].update_one({"_id": str(second)}, {"$set": {"token": token}})
    here = Here(database)
    async with here.runs(build, first), here.runs(build, second):
        await writer.append(others, rooms=["x"])
        await eventually_equal(lambda: documents(database, build.collection), expect(await all_events(database)))
    name = build.projection.name
    assert metric(here.metrics, "projector_stream_restarts_total", projection=name, reason="history_lost") == 1
    # The server says so only when an event comes after it.
    assert metric(here.metrics, "projector_repaired_events_total", projection=name) == 4


@KINDS
async def test_a_log_that_was_dropped_and_restored_goes_on(database: Database, make: Any, expect: Any) -> None:
    """The drop invalidates the stream while it is read; the same events come back, and then new ones."""
    build = await begun(database, make())
    writer, here = Writer(database), Here(database)
    async with here.runs(build, only(build)):
        await writer.append("a", *["counted"] * 5, rooms=["x"])
        await writer.append("b", *["counted"] * 5, rooms=["x"])
        events = await all_events(database)
        await eventually_equal(lambda: documents(database, build.collection), expect(events))
    # Renamed away and back: for a moment there is no log at all.
    await database[EVENTS].rename("elsewhere")
    await database["elsewhere"].rename(EVENTS)
    here = Here(database)
    async with here.runs(build, only(build)):
        await writer.append("a", rooms=["x"])
        await eventually_equal(lambda: documents(database, build.collection), expect(await all_events(database)))
        await database[EVENTS].rename("elsewhere")  # now while it reads
        await database["elsewhere"].rename(EVENTS)
        await writer.append("b", rooms=["x"])
        await eventually_equal(lambda: documents(database, build.collection), expect(await all_events(database)))
    assert await parked(database) == {}


async def test_a_log_that_was_dropped_and_begun_anew_stops_the_projection_loudly(database: Database) -> None:
    build = await begun(database, ledger())
    writer = Writer(database)
    here = Here(database, max_parked=2)
    partition = Partition(here, build, only(build))
    task = asyncio.create_task(partition.run())
    for aggregate_id in ("a", "b", "c"):
        await writer.append(aggregate_id, "counted", "counted")
    before = expected_ledgers(await all_events(database))
    await eventually_equal(lambda: documents(database, build.collection), before)
    await database.drop_collection(EVENTS)
    await provision(database)
    await Writer(database).append("a")
    with pytest.raises(StoppedError):
        await asyncio.wait_for(task, 30)
    assert await documents(database, build.collection) == before  # as it was, and nothing new on top


async def test_an_oversized_change_event_is_read_from_the_log(small: Database) -> None:
    """Error 10334 on the stream: a light stream tells which events there are, the log has them."""
    build = await begun(small, ledger())
    writer, here = Writer(small), Here(small)
    async with here.runs(build, only(build)) as partition:
        await writer.append("a")
        await eventually_equal(lambda: documents(small, build.collection), expected_ledgers(await all_events(small)))
        fail = {"failCommands": ["getMore"], "errorCode": 10334, "namespace": f"{small.name}.{EVENTS}"}
        await small.client.admin.command("configureFailPoint", "failCommand", mode={"times": 1}, data=fail)
        await writer.insert([writer.next(each) for each in ("a", "b", "a", "c")])
        await eventually_equal(lambda: documents(small, build.collection), expected_ledgers(await all_events(small)))
        await writer.append("a")
        await eventually_equal(lambda: documents(small, build.collection), expected_ledgers(await all_events(small)))
        await eventually(same(lambda: partition.progress.caught_up))
    assert metric(here.metrics, "projector_stream_restarts_total", projection="ledger", reason="unexpected") == 0
    assert await parked(small) == {}


async def test_a_position_taken_now_is_one_that_reads_show(database_name: str) -> None:
    """What the primary has and a majority has not lies before the token: it must not be missed by the scan that follows."""
    with ReplicaSet(members_count=3) as replica_set:
        async with connect(SecretStr(replica_set.uri), "test") as client:
            config = (await client.admin.command("replSetGetConfig"))["config"]
            config["version"] += 1
            config["settings"]["electionTimeoutMillis"] = 60_000  # nobody is to be elected meanwhile
            await client.admin.command("replSetReconfig", config)
            database = open_database(client, database_name)
            await provision(database)
            primary = replica_set.wait_for_primary()
            with contextlib.ExitStack() as stack:
                for member in replica_set.members:
                    if member is not primary:
                        member.pause()
                        stack.callback(member.resume)
                alone = database.get_collection(EVENTS, write_concern=WriteConcern(w=1))
                await alone.insert_one(event("a", 1))
                task = asyncio.create_task(position_now(database))
                await asyncio.wait({task}, timeout=1.0)
                if task.done():
                    assert await all_events(database)
            position = await task
            # By the stream, or by a read: one of both must have it.
            stream = EventStream(database, position)
            found = [*await all_events(database), *(await stream.next()).events]
            await stream.close()
            assert [each["aggregateId"] for each in found] == ["a"]


@pytest.mark.parametrize("token", ["", "82", "8200", "not hexadecimal"])
async def test_a_token_that_the_server_cannot_read_is_repaired(database: Database, token: str) -> None:
    build = await begun(database, ledger())
    writer = Writer(database)
    async with Here(database).runs(build, only(build)):
        await writer.append("a")
        await eventually_equal(
            lambda: documents(database, build.collection), expected_ledgers(await all_events(database))
        )
    await writer.append("a", "counted", "counted")
    await database[CHECKPOINTS].update_one({"build": build.id}, {"$set": {"token": {"_data": token}}})
    here = Here(database)
    async with here.runs(build, only(build)):
        await eventually_equal(
            lambda: documents(database, build.collection), expected_ledgers(await all_events(database))
        )
        await writer.append("b")
        await eventually_equal(
            lambda: documents(database, build.collection), expected_ledgers(await all_events(database))
        )
    assert metric(here.metrics, "projector_repaired_events_total", projection="ledger") == 2
    assert metric(here.metrics, "projector_stream_restarts_total", projection="ledger", reason="history_lost") == 1


async def test_a_change_of_partitions_amid_a_transaction_loses_nothing(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two partitions stand at the same cluster time, one of them amid the events of a transaction."""
    from projector import stream

    monkeypatch.setattr(stream, "BATCH_EVENTS", 2)
    build = await begun(database, ledger(), partitions=2)
    first, second = (PartitionId(build.id, number, 2) for number in range(2))
    here = Here(database)
    async with here.runs(build, first), here.runs(build, second):
        pass
    writer = Writer(database)
    several = [f"aggregate-{number}" for number in range(100)]
    names = [name for slots in (second.slots, first.slots) for name in several if slot_of(name) in slots]
    await writer.insert([writer.next(name) for name in names])
    for number, slots in ((0, first.slots), (1, second.slots)):
        begin = Position.load(await stored_position(database, number))
        reader = EventStream(database, begin, slots=slots)
        seen: set[str] = set()
        wanted = {name for name in names if slot_of(name) in slots}
        # The second one stays amid the transaction, the first one has read it all.
        while len(seen) < (4 if number == 1 else len(wanted)):
            seen |= {each["aggregateId"] for each in (await reader.next()).events}
        await database[CHECKPOINTS].update_one(
            {"build": build.id, "_id": {"$regex": f"/{number}-of"}}, {"$set": reader.position.dump()}
        )
        await reader.close()
    times = {bson.encode({"t": each["clusterTime"]}) async for each in database[CHECKPOINTS].find()}
    assert len(times) == 1, "the server has given the events of a transaction several times"
    await ensure_layout(database, build.id, 1)
    # Nothing of it was applied, and all of it comes again.
    expected = {name: {"_id": name, "applied": [1]} for name in names}
    async with here.runs(build, only(build)):
        await eventually_equal(lambda: documents(database, build.collection), expected)


@KINDS
async def test_a_change_of_partitions_after_a_full_batch_loses_no_position(
    database: Database, make: Any, expect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The token after a full batch is its last event's own, from which no partition can resume that does not read that event."""
    from projector import stream

    build = await begun(database, make())
    first, second = (PartitionId(build.id, number, 2) for number in range(2))
    several = [f"{number:03}" for number in range(100)]
    names = [name for part in (first, second) for name in [each for each in several if slot_of(each) in part.slots][:4]]
    here, writer = Here(database), Writer(database)
    for name in names:
        await writer.append(name, rooms=["x"])
    monkeypatch.setattr(stream, "BATCH_EVENTS", 4)
    reader = EventStream(database, Position.load(await stored_position(database)))
    seen: list[dict[str, Any]] = []
    while len(seen) < 4:
        seen += (await reader.next()).events
    await reader.close()
    await database[CHECKPOINTS].update_one({"build": build.id}, {"$set": reader.position.dump()})
    monkeypatch.undo()
    await ensure_layout(database, build.id, 2)
    async with here.runs(build, first), here.runs(build, second):
        for name in names:  # what was passed and never applied is a gap before these
            await writer.append(name, rooms=["x"])
        await eventually_equal(lambda: documents(database, build.collection), expect(await all_events(database)))
    restarts = {"projection": build.projection.name, "reason": "history_lost"}
    assert metric(here.metrics, "projector_stream_restarts_total", **restarts) == 0
