"""Reading the log: an aggregate's history in order, heads of aggregates, events by their id.

All reads ask the primary for what a majority has: what they return cannot be rolled back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, cast

import bson
from pymongo import ASCENDING, DESCENDING
from pymongo.read_concern import ReadConcern

from eventstore.client import CODEC
from eventstore.event import EVENTS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Mapping, Sequence

    from pymongo.asynchronous.client_session import AsyncClientSession
    from pymongo.asynchronous.cursor import AsyncCursor

    from eventstore.client import Database
    from eventstore.event import EventDocument

__all__ = [
    "all_heads",
    "batches_after",
    "events_after",
    "events_by_id",
    "fence",
    "find_by_id",
    "find_history",
    "head",
    "heads",
    "history",
    "pages",
]

_FIXED: Final = ("aggregateId", "sequenceNo", "eventName", "slot")

_BATCH: Final = 5_000

PAGE: Final = 1_000
"""Events read at once: at 1 KiB an event a page is 1 MiB, far from any limit, and the round trip is paid for."""


async def head(database: Database, aggregate_id: str) -> int:
    """The last sequenceNo of an aggregate; 0 when it has no event."""
    found = await database[EVENTS].find_one(
        {"aggregateId": aggregate_id},
        {"_id": 0, "sequenceNo": 1},
        sort=[("aggregateId", DESCENDING), ("sequenceNo", DESCENDING)],
    )
    return int(found["sequenceNo"]) if found else 0


async def heads(
    database: Database, aggregate_ids: Sequence[str], session: AsyncClientSession | None = None
) -> dict[str, int]:
    """The last sequenceNo of each of these aggregates, by one command; an aggregate without events is left out.

    The server answers from the index alone, one seek per aggregate (DISTINCT_SCAN). In a transaction (`session`) it also
    sees what a majority has not got yet: good to write on top of within the same transaction, and for nothing else.
    """
    if not aggregate_ids:
        return {}
    cursor = await database[EVENTS].aggregate(
        [
            {"$match": {"aggregateId": {"$in": list(aggregate_ids)}}},
            {"$sort": {"aggregateId": DESCENDING, "sequenceNo": DESCENDING}},
            {"$group": {"_id": "$aggregateId", "head": {"$first": "$sequenceNo"}}},
        ],
        batchSize=len(aggregate_ids) + 1,
        session=session,
    )
    return {row["_id"]: int(row["head"]) async for row in cursor}


async def all_heads(database: Database, *, from_: str = "", below: str | None = None) -> AsyncIterator[tuple[str, int]]:
    """Every aggregate with its last sequenceNo, by descending aggregateId; `from_` (inclusive) and `below` bound the ids.

    The server seeks from aggregate to aggregate in the index (DISTINCT_SCAN), which it does in descending order alone.
    Raises RuntimeError if the server ever answered in another order, since callers merge by it.
    """
    bounds = {"$gte": from_} | ({"$lt": below} if below is not None else {})
    cursor = await database[EVENTS].aggregate(
        [
            {"$match": {"aggregateId": bounds}},
            {"$sort": {"aggregateId": DESCENDING, "sequenceNo": DESCENDING}},
            {"$group": {"_id": "$aggregateId", "head": {"$first": "$sequenceNo"}}},
        ],
        batchSize=10_000,
    )
    before: str | None = None
    async for row in cursor:
        if before is not None and row["_id"] >= before:
            raise RuntimeError("heads came out of order")
        before = row["_id"]
        yield before, int(row["head"])


async def events_after(
    database: Database, marks: Mapping[str, int], *, limit: int, projection: Iterable[str] | None = None
) -> list[EventDocument]:
    """Up to `limit` events of several aggregates, each above its mark, ordered by aggregate and sequenceNo."""
    if not marks:
        return []
    above = [{"aggregateId": aggregate_id, "sequenceNo": {"$gt": mark}} for aggregate_id, mark in marks.items()]
    cursor = (
        database[EVENTS]
        .find({"$or": above}, list(projection) if projection is not None else None)
        .sort([("aggregateId", ASCENDING), ("sequenceNo", ASCENDING)])
        .limit(limit)
    )
    found: list[Any] = await cursor.to_list(limit)
    return found


async def batches_after(
    database: Database, marks: Mapping[str, int], *, limit: int = 0, fields: Iterable[str] | None = None
) -> AsyncIterator[list[dict[str, Any]]]:
    """Up to `limit` events (0: all) of several aggregates, each above its mark, ordered by aggregate and sequenceNo.

    They come in the server's own batches of at most 16 MiB, so that large events do not fill the memory. `fields` names what
    is wanted beside the fixed fields (None: all).
    """
    if not marks:
        return
    above = [{"aggregateId": aggregate_id, "sequenceNo": {"$gt": mark}} for aggregate_id, mark in marks.items()]
    wanted = None if fields is None else dict.fromkeys([*_FIXED, *fields], 1)
    cursor = (
        database[EVENTS]
        .find_raw_batches({"$or": above} if len(above) > 1 else above[0], wanted)
        .sort([("aggregateId", ASCENDING), ("sequenceNo", ASCENDING)])
        .limit(limit)
        .batch_size(limit or _BATCH)
    )
    try:
        async for raw in cursor:
            yield bson.decode_all(cast("bytes", raw), CODEC)
    finally:
        await cursor.close()


async def history(
    database: Database,
    aggregate_id: str,
    *,
    after: int = 0,
    limit: int = PAGE,
    projection: Iterable[str] | None = None,
) -> list[EventDocument]:
    """Up to `limit` events of an aggregate with a sequenceNo above `after`, in order."""
    cursor = find_history(database, aggregate_id, after=after, projection=projection).limit(limit)
    found: list[Any] = await cursor.to_list(limit)
    return found


def find_history(
    database: Database, aggregate_id: str, *, after: int = 0, projection: Iterable[str] | None = None
) -> AsyncCursor[dict[str, Any]]:
    """A cursor over the events of an aggregate with a sequenceNo above `after`, in order."""
    return (
        database[EVENTS]
        .find(
            {"aggregateId": aggregate_id, "sequenceNo": {"$gt": after}},
            list(projection) if projection is not None else None,
        )
        .sort([("aggregateId", ASCENDING), ("sequenceNo", ASCENDING)])
    )


async def pages(
    database: Database,
    aggregate_id: str,
    *,
    after: int = 0,
    size: int = PAGE,
    projection: Iterable[str] | None = None,
) -> AsyncIterator[list[EventDocument]]:
    """An aggregate's history above `after` in pages of at most `size` events, until a page comes back short."""
    while True:
        page = await history(database, aggregate_id, after=after, limit=size, projection=projection)
        if page:
            yield page
            after = int(page[-1]["sequenceNo"])
        if len(page) < size:
            return


async def events_by_id(database: Database, event_ids: Sequence[str]) -> dict[str, EventDocument]:
    """The events that have these eventIds, by eventId; one that a majority has not got yet is left out."""
    if not event_ids:
        return {}
    found: list[Any] = await find_by_id(database, event_ids).to_list(len(event_ids))
    return {event["_id"]: event for event in found}


def find_by_id(database: Database, event_ids: Sequence[str]) -> AsyncCursor[dict[str, Any]]:
    """A cursor over the events that have these eventIds, for when they may be too many to hold at once."""
    return database[EVENTS].find({"_id": {"$in": list(event_ids)}})


async def fence(database: Database) -> None:
    """Returns once the server that answers reads has proved to a majority that it is the primary now.

    A primary that was cut off does not know for a while that another was elected, and serves reads of the past: a read
    after this call returns everything that was acknowledged before it. It costs a write of the oplog (linearizable read
    concern). Raises what pymongo raises.
    """
    collection = database.get_collection(EVENTS, read_concern=ReadConcern("linearizable"))
    await collection.find_one({"_id": ""}, {"_id": 1}, max_time_ms=5_000)
