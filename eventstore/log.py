"""Reading the log: an aggregate's history in order, heads of aggregates, events by their id.

All reads ask the primary for what a majority has: what they return cannot be rolled back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from pymongo import ASCENDING, DESCENDING

from eventstore.event import EVENTS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Sequence

    from eventstore.client import Database
    from eventstore.event import EventDocument

__all__ = ["events_by_id", "head", "heads", "history", "pages"]

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


async def heads(database: Database, aggregate_ids: Sequence[str]) -> dict[str, int]:
    """The last sequenceNo of each of these aggregates, by one command; an aggregate without events is left out.

    The server answers from the index alone, one seek per aggregate (DISTINCT_SCAN).
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
    )
    return {row["_id"]: int(row["head"]) async for row in cursor}


async def history(
    database: Database,
    aggregate_id: str,
    *,
    after: int = 0,
    limit: int = PAGE,
    projection: Iterable[str] | None = None,
) -> list[EventDocument]:
    """Up to `limit` events of an aggregate with a sequenceNo above `after`, in order."""
    cursor = (
        database[EVENTS]
        .find(
            {"aggregateId": aggregate_id, "sequenceNo": {"$gt": after}},
            list(projection) if projection is not None else None,
        )
        .sort([("aggregateId", ASCENDING), ("sequenceNo", ASCENDING)])
        .limit(limit)
    )
    found: list[Any] = await cursor.to_list(limit)
    return found


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
    cursor = database[EVENTS].find({"_id": {"$in": list(event_ids)}})
    found: list[Any] = await cursor.to_list(len(event_ids))
    return {event["_id"]: event for event in found}
