"""Reading the log, against a real MongoDB."""

from __future__ import annotations

import asyncio
import datetime
from typing import TYPE_CHECKING, Any

import pytest
from bson.int64 import Int64
from pymongo.errors import DuplicateKeyError, WriteError

from eventstore import indexes, log
from eventstore.errors import Meaning, classify, duplicate_index
from eventstore.event import EVENTS, new_event_id, slot_of

if TYPE_CHECKING:
    from eventstore.client import Database


def event(aggregate_id: str, sequence_no: int, **changes: Any) -> dict[str, Any]:
    """An event document as the appender writes it."""
    return {
        "_id": new_event_id(),
        "aggregateId": aggregate_id,
        "sequenceNo": Int64(sequence_no),
        "eventName": "happened",
        "timestamp": datetime.datetime.now(datetime.UTC),
        "payload": {},
        "slot": slot_of(aggregate_id),
    } | changes


async def fill(database: Database, **counts: int) -> None:
    await database[EVENTS].insert_many([event(name, n + 1) for name, count in counts.items() for n in range(count)])


async def test_history_comes_in_order_and_in_pages(database: Database) -> None:
    await fill(database, a=25, b=3)
    assert [e["sequenceNo"] for e in await log.history(database, "a", after=10, limit=5)] == [
        11,
        12,
        13,
        14,
        15,
    ]
    sizes = [len(page) async for page in log.pages(database, "a", size=10)]
    assert sizes == [10, 10, 5]
    assert [page async for page in log.pages(database, "nobody")] == []


async def test_heads(database: Database) -> None:
    await fill(database, a=25, b=3)
    assert await log.heads(database, ["a", "b", "nobody"]) == {"a": 25, "b": 3}
    assert await log.heads(database, []) == {}
    assert await log.head(database, "a") == 25
    assert await log.head(database, "nobody") == 0


async def test_heads_seek_in_the_index_and_read_no_document(database: Database) -> None:
    await fill(database, a=500, b=500)
    pipeline = [
        {"$match": {"aggregateId": {"$in": ["a", "b"]}}},
        {"$sort": {"aggregateId": -1, "sequenceNo": -1}},
        {"$group": {"_id": "$aggregateId", "head": {"$first": "$sequenceNo"}}},
    ]
    plan = await database.command(
        "explain", {"aggregate": EVENTS, "pipeline": pipeline, "cursor": {}}, verbosity="executionStats"
    )
    stats = (plan["stages"][0]["$cursor"] if "stages" in plan else plan)["executionStats"]
    assert stats["totalDocsExamined"] == 0
    assert stats["totalKeysExamined"] <= 10


async def test_events_by_id(database: Database) -> None:
    one = event("a", 1)
    await database[EVENTS].insert_one(one)
    found = await log.events_by_id(database, [one["_id"], "none"])
    assert list(found) == [one["_id"]]


async def test_provision_can_be_called_by_many_at_once_and_again(database: Database) -> None:
    await asyncio.gather(*(indexes.provision(database) for _ in range(8)))
    information = await database[EVENTS].index_information()
    assert set(information) == {"_id_", "aggregate_sequence"}
    assert information["aggregate_sequence"]["unique"] is True


async def test_provision_puts_a_missing_validator_back(database: Database) -> None:
    await database.command("collMod", EVENTS, validator={})
    await indexes.provision(database)
    with pytest.raises(WriteError):
        await database[EVENTS].insert_one({"_id": "x"})


@pytest.mark.parametrize(
    "changes",
    [
        {"sequenceNo": 1},  # int32
        {"sequenceNo": Int64(0)},
        {"slot": 1024},
        {"slot": Int64(1)},
        {"aggregateId": 7},
        {"_id": "x" * 129},
        {"timestamp": "2026-01-01"},
        {"payload": []},
        {"metadata": "x"},
        {"extra": 1},
    ],
    ids=str,
)
async def test_the_validator_refuses_what_is_no_event(database: Database, changes: dict[str, Any]) -> None:
    with pytest.raises(WriteError) as caught:
        await database[EVENTS].insert_one(event("a", 1, **changes))
    assert classify(caught.value) is Meaning.REJECTED


async def test_a_duplicate_names_its_index(database: Database) -> None:
    one = event("a", 1)
    await database[EVENTS].insert_one(one)
    with pytest.raises(DuplicateKeyError) as sequence:
        await database[EVENTS].insert_one(event("a", 1))
    with pytest.raises(DuplicateKeyError) as identity:
        await database[EVENTS].insert_one(event("a", 2, _id=one["_id"]))
    assert classify(sequence.value) is Meaning.DUPLICATE
    assert duplicate_index(sequence.value.details) == ("aggregateId", "sequenceNo")
    assert duplicate_index(identity.value.details) == ("_id",)
