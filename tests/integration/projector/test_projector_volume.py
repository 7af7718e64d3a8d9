"""Events of every size and number, and names and values that only other writers make."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import bson
import pytest
from bson.raw_bson import RawBSONDocument

from eventstore.event import EVENTS
from projector import changes, loop, owned
from projector import stream as stream_module
from projector.declared import from_definition
from projector.projection import Projection
from projector.stream import EventStream, event_fields, position_now
from tests.eventually import eventually, eventually_equal
from tests.projecting import (
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
    import datetime

    from eventstore.client import Database


def measured(**options: Any) -> Projection:
    """How large the events' payloads were."""
    projection = Projection("measured", **options)

    @projection.on("*")
    def _(state: dict[str, Any], event: dict[str, Any]) -> None:
        state.setdefault("sizes", []).append(len(event["payload"]["text"]))

    return projection


def large_event(aggregate_id: str, sequence_no: int, room: int = 64) -> dict[str, Any]:
    """As large as MongoDB takes a document, less some bytes."""
    found = event(aggregate_id, sequence_no, text="")
    found["payload"]["text"] = "x" * (16 * 2**20 - len(bson.encode(found)) - room)
    return found


@pytest.mark.parametrize("key", ["$aggregateId", "$payload.none"], ids=["owned", "shared"])
async def test_events_as_large_as_a_document_may_be(database: Database, key: str) -> None:
    """Another writer's: before the start, so that the scan reads them, and while the stream does."""
    build = await begun(database, measured(key=key if key == "$aggregateId" else lambda event: event["aggregateId"]))
    here = Here(database)
    events = [large_event(name, number, room=0) for number in (1, 2, 3) for name in ("a", "b")]
    expected = {
        name: {"_id": name, "sizes": [len(e["payload"]["text"]) for e in events if e["aggregateId"] == name]}
        for name in ("a", "b")
    }
    for each in events[:2]:
        await database[EVENTS].insert_one(RawBSONDocument(bson.encode(each)))  # type: ignore[arg-type]
    async with here.runs(build, only(build)):
        for each in events[2:]:
            await database[EVENTS].insert_one(RawBSONDocument(bson.encode(each)))  # type: ignore[arg-type]
        await eventually_equal(lambda: documents(database, build.collection), expected)
    assert await parked(database) == {}
    assert metric(here.metrics, "projector_stream_restarts_total", projection="measured", reason="unexpected") in (
        None,
        0,
    )


async def test_many_large_events_are_not_taken_for_the_logs_end(database: Database) -> None:
    """A batch ends at 16 MiB, long before its number of events: a reader far behind must not say that it is current."""
    writer = Writer(database)
    position = await position_now(database)
    for _ in range(20):
        await writer.append("a", text="x" * 2**20)
    head = (await position_now(database)).cluster_time
    stream = EventStream(database, position)
    seen = 0
    while True:
        batch = await stream.next()
        seen += len(batch.events)
        if batch.drained:
            break
    await stream.close()
    # Less than a second behind is current; the writer took longer than that, or everything was read.
    assert seen == 20 or head.time - batch.position.cluster_time.time <= 1


async def test_ten_thousand_events_in_one_transaction(database: Database) -> None:
    build = await begun(database, ledger())
    writer, here = Writer(database), Here(database)
    async with here.runs(build, only(build)) as partition:
        await writer.insert([writer.next(f"aggregate-{number % 777}") for number in range(10_000)])
        await eventually_equal(
            lambda: documents(database, build.collection), expected_ledgers(await all_events(database))
        )
        await eventually(same(lambda: partition.progress.caught_up))
    counts = {
        outcome: metric(here.metrics, "projector_events_processed_total", projection="ledger", outcome=outcome)
        for outcome in ("applied", "healed", "duplicate", "aside", "failed")
    }
    assert counts == {"applied": 10_000, "healed": 0, "duplicate": 0, "aside": 0, "failed": 0}


async def test_a_batch_of_large_documents_is_read_in_portions(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Documents of 1 MiB, a hundred of them in one batch: no more of them at once than the bounds allow."""
    monkeypatch.setattr(changes, "PORTION_BYTES", 4 * 2**20)
    monkeypatch.setattr(owned, "CACHED_BYTES", 4 * 2**20)
    monkeypatch.setattr(loop, "PENDING_BYTES", 4 * 2**20)
    projection = Projection("large")

    @projection.on("*")
    def _(state: dict[str, Any], event: dict[str, Any]) -> None:
        state["steps"] = state.get("steps", 0) + 1
        state.setdefault("text", "x" * 2**20)

    build = await begun(database, projection)
    writer, here = Writer(database), Here(database)
    names = [f"aggregate-{number}" for number in range(60)]
    async with here.runs(build, only(build)):
        await writer.insert([writer.next(name) for name in names])
        await eventually_equal(lambda: steps(database, build.collection), dict.fromkeys(names, 1))
    held: list[int] = []
    real = owned.OwnedFolder.load

    async def load(self: owned.OwnedFolder, aggregate_ids: set[str]) -> None:
        await real(self, aggregate_ids)
        held.append(sum(entry.size for entry in self._young.values()))

    monkeypatch.setattr(owned.OwnedFolder, "load", load)
    async with here.runs(build, only(build)):
        for step in (2, 3):
            await writer.insert([writer.next(name) for name in names])
            await eventually_equal(lambda: steps(database, build.collection), dict.fromkeys(names, step))
    # The first one was read before the size of a document was known, and is in memory until another has been written.
    assert sorted(held)[len(held) // 2] <= 24 * 2**20, held


async def steps(database: Database, collection: str) -> dict[str, int]:
    return {row["_id"]: row["steps"] async for row in database[collection].find({}, {"steps": 1})}


NAMES = {"org:group": "Group 1", "naïve 名": 1, "a.b": {"c.d": 2}, "$price": 3, "": 4, "0": [5]}


async def test_names_with_dots_dollars_and_unicode(database: Database) -> None:
    """As they come out of other people's logs: kept whole, and read by the paths that can name them."""
    whole = Projection("whole")

    @whole.on("*")
    def _(state: dict[str, Any], event: dict[str, Any]) -> None:
        state["events"] = [*state.get("events", []), event["payload"]]

    declared = from_definition(
        {
            "name": "declared",
            "version": 1,
            "readModel": {"key": "$aggregateId"},
            "on": {"Bestätigung des Empfangs": {"$set": {"group": "$payload.org:group", "naive": "$payload.naïve 名"}}},
        }
    )
    writer, here = Writer(database), Here(database)
    builds = [await begun(database, each) for each in (whole, declared)]
    async with here.runs(builds[0], only(builds[0])), here.runs(builds[1], only(builds[1])):
        document = writer.next("Fall.Ä/1 $x", "Bestätigung des Empfangs")
        document["payload"] = NAMES
        # As another writer would: the driver's checks are not the server's.
        await database[EVENTS].insert_one(RawBSONDocument(bson.encode(document)))  # type: ignore[arg-type]
        await eventually_equal(
            lambda: documents(database, builds[0].collection),
            {"Fall.Ä/1 $x": {"_id": "Fall.Ä/1 $x", "events": [NAMES]}},
        )
        await eventually_equal(
            lambda: documents(database, builds[1].collection),
            {"Fall.Ä/1 $x": {"_id": "Fall.Ä/1 $x", "group": "Group 1", "naive": 1}},
        )
    assert await parked(database) == {}


async def test_dates_that_python_cannot_hold(database: Database) -> None:
    projection = Projection("dated")

    @projection.on("*")
    def _(state: dict[str, Any], event: dict[str, Any]) -> None:
        state["at"] = event["timestamp"]
        state["due"] = event["payload"]["due"]

    build = await begun(database, projection)
    here = Here(database)
    far = bson.datetime_ms.DatetimeMS(2**55)
    document = event("a", 1, due=far)
    document["timestamp"] = bson.datetime_ms.DatetimeMS(-(2**55))
    await database[EVENTS].insert_one(document)  # read by the scan
    again = event("b", 1, due=far)
    async with here.runs(build, only(build)):
        await database[EVENTS].insert_one(again)  # read by the stream
        expected: dict[Any, Any] = {
            "a": {"_id": "a", "at": document["timestamp"], "due": far},
            "b": {"_id": "b", "at": in_milliseconds(again["timestamp"]), "due": far},
        }
        await eventually_equal(lambda: documents(database, build.collection), expected)


def in_milliseconds(at: datetime.datetime) -> datetime.datetime:
    return at.replace(microsecond=at.microsecond // 1000 * 1000)


FIXED = ["_id", "aggregateId", "eventName", "sequenceNo", "slot"]


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        (None, [*FIXED, "metadata", "payload", "timestamp"]),
        ((), FIXED),
        (("payload.items.name", "payload.items", "timestamp"), [*FIXED, "payload", "timestamp"]),
    ],
    ids=["all", "none", "some"],
)
async def test_the_stream_brings_an_event_as_the_log_holds_it(
    database: Database, fields: Any, wanted: list[str]
) -> None:
    """A fold must get the same from both, or a rebuild would make another document; arrays are where it could differ."""
    position = await position_now(database)
    document = event("a", 1, items=[{"name": "x", "price": 1}, {"price": 2}, 7], other=1) | {
        "metadata": {"source": "test"}
    }
    await database[EVENTS].insert_one(document)
    stream = EventStream(database, position, fields=fields)
    [found] = (await stream.next()).events
    await stream.close()
    projection = None if fields is None else [*event_fields(fields)]
    paths = (
        None if projection is None else {path.removeprefix("fullDocument."): 1 for path in projection if "." in path}
    )
    assert found == await database[EVENTS].find_one({}, paths)
    assert sorted(found) == sorted(wanted)


async def test_every_event_comes_once_whatever_the_size_of_a_batch(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resumed after each batch of one, two, three …, also amid a transaction."""
    writer = Writer(database)
    start = await position_now(database)
    await writer.insert([writer.next(f"aggregate-{number}") for number in range(12)])
    await writer.append("aggregate-0", "counted", "counted")
    for size in (1, 2, 3, 5):
        monkeypatch.setattr(stream_module, "BATCH_EVENTS", size)
        position, seen = start, []
        while len(seen) < 14:
            stream = EventStream(database, position)
            batch = await stream.next()
            await stream.close()
            seen += [(each["aggregateId"], each["sequenceNo"]) for each in batch.events]
            position = batch.position
        assert len(seen) == len(set(seen)) == 14
